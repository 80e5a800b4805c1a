"""The losses that balance the experts, the coefficient that adapts, and the bias that needs no loss."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import config, model
from tanuki_jax.train import balance, losses
from tanuki_jax.train.step import gradients
from tests import plain
from tests.tiny import QUICK, as_arrays, assert_close, packed_batch, pair_batch, random_params, small

# --- the pieces against numpy loops -------------------------------------------------------------------------------------


def numpy_bias(bias, load, rate):
    bias, found = np.asarray(bias, np.float64), []
    for b, layer in zip(bias, np.asarray(load), strict=True):
        mean = layer.sum() / len(layer)
        step = [1 if x < mean else -1 if x > mean else 0 for x in layer]
        found.append([old + rate * (s - sum(step) / len(step)) for old, s in zip(b, step, strict=True)])
    return np.array(found)


def loads(seed=0, L=5, E=7):
    rng = np.random.default_rng(seed)
    load = np.float32(rng.integers(0, 100, (L, E)) ** 2)
    load[1] = 30  # even
    load[2] = [0, 0, 900, 0, 0, 0, 0]
    load[3] = [10, 10, 10, 12.5, 10, 10, 7.5]  # the fullest has just the room there is
    return load


@pytest.mark.parametrize("unit", [1.0, 1 / 4096])
def test_overflow_is_the_share_beyond_a_capacity_of_one_and_a_quarter(unit):
    found = balance.overflow(jnp.asarray(loads() * unit))
    np.testing.assert_allclose(found, plain.overflow(loads()), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found[1:4], [0, 1 - 1.25 / 7, 0], atol=1e-7)


def test_no_load_is_no_overflow():
    np.testing.assert_array_equal(balance.overflow(jnp.zeros((2, 3))), 0)


@pytest.mark.parametrize(("xi", "largest"), [(0.2, 0.02), (0.05, 1.0)])
def test_the_coefficient_is_the_moving_average_of_what_the_overflow_asks_for(xi, largest):
    rng = np.random.default_rng(0)
    coefficient, expected = jnp.full(4, 0.01), [0.01] * 4
    for _ in range(50):
        overflow = rng.random(4) * np.array([0.0, 0.05, 0.5, 1.0])
        coefficient = balance.adapt_coefficients(coefficient, jnp.float32(overflow), xi, largest)
        expected = [0.99 * c + 0.01 * min(xi * o, largest) for c, o in zip(expected, overflow, strict=True)]
    np.testing.assert_allclose(coefficient, expected, rtol=1e-5)
    assert coefficient.max() <= largest


@pytest.mark.parametrize("rate", [1e-3, 0.5])
def test_the_bias_goes_against_the_load_and_keeps_its_mean(rate):
    bias, load = np.float32(np.random.default_rng(1).normal(size=(5, 7))), loads()
    found = balance.update_bias(jnp.asarray(bias), jnp.asarray(load), rate)
    np.testing.assert_allclose(found, numpy_bias(bias, load, rate), atol=1e-6)
    np.testing.assert_allclose(found.mean(axis=1), bias.mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(found[1], bias[1])  # an even load moves nothing
    assert (np.argmax(found - bias, axis=1)[2] != 2) and (found - bias)[2, 2] < 0


def test_it_begins_at_the_largest_coefficient_in_each_mixture_and_only_where_it_adapts():
    cfg, on = small(n_layers=5, n_experts=4, first_dense=1, moe_every=2), config.Loss(router_aux_adaptive=0.2)
    found = balance.init_balance(cfg, dataclasses.replace(on, router_aux_loss=0.03))
    assert list(found) == ["coefficient"] and found["coefficient"].dtype == jnp.float32
    np.testing.assert_array_equal(found["coefficient"], np.float32([0.03, 0.03]))
    assert balance.init_balance(cfg, config.Loss()) == {}
    assert balance.init_balance(small(), on) == {} and balance.make_rebalance(small(), on) is None


@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_a_step_shows_the_health_of_the_load_and_moves_bias_and_coefficient(capacity):
    cfg = small(n_layers=5, n_experts=7, router_bias=True, capacity_factor=capacity)
    options = config.Loss(router_aux_loss=0.1, router_aux_adaptive=0.3, router_bias_rate=0.01)
    load = loads()
    share = load / load.sum(1, keepdims=True)
    bias = jax.random.normal(jax.random.key(0), (5, 7))
    params = {"head": jnp.ones(3), "layers": {"norm_mlp": jnp.ones(2), "moe": {"router": jnp.ones(4), "bias": bias}}}
    before = {"coefficient": jnp.linspace(0.0, 0.1, 5)}
    metrics = {"moe/load": jnp.asarray(share), "loss": jnp.float32(3)}
    overflow = plain.overflow(load)
    if capacity:
        metrics["moe/overflow"] = jnp.linspace(0.5, 0.1, 5)
        overflow = np.linspace(0.5, 0.1, 5)
    made, after, found = balance.make_rebalance(cfg, options)(params, before, metrics)
    np.testing.assert_allclose(made["layers"]["moe"].pop("bias"), numpy_bias(bias, load, 0.01), atol=1e-6)
    params["layers"]["moe"].pop("bias")
    jax.tree.map(np.testing.assert_array_equal, made, params)
    expected = [0.99 * c + 0.01 * min(0.3 * o, 0.1) for c, o in zip(np.linspace(0, 0.1, 5), overflow, strict=True)]
    np.testing.assert_allclose(after["coefficient"], expected, rtol=1e-5, atol=1e-9)
    assert set(found) == {*metrics, "moe/load_max", "moe/load_entropy", "moe/overflow", "moe/coefficient"}
    np.testing.assert_array_equal(found["moe/coefficient"], before["coefficient"])
    np.testing.assert_allclose(found["moe/overflow"], overflow, rtol=1e-5, atol=1e-7)
    for layer in range(5):
        p = np.float64(share[layer])
        entropy = -sum(x * math.log(x) for x in p if x > 0) / math.log(7)
        assert float(found["moe/load_max"][layer]) == pytest.approx(p.max() * 7, rel=1e-5)
        assert float(found["moe/load_entropy"][layer]) == pytest.approx(entropy, abs=1e-5)


# --- the losses of the whole model ----------------------------------------------------------------------------------------

MODELS = {
    "normalised": small(n_experts=4, gate_scale=1.5, **QUICK),
    "plain, mixed, biased": small(
        n_layers=3, n_experts=5, top_k=3, first_dense=1, normalized_gate=False, router_bias=True, **QUICK
    ),
}
COEFFICIENT = {"normalised": [0.7, 0.2], "plain, mixed, biased": [0.1, 0.9]}


@functools.cache
def params_of(name):
    params = random_params(MODELS[name])
    if "bias" in params["layers"]["moe"]:
        params["layers"]["moe"]["bias"] = jax.random.normal(jax.random.key(1), (2, 5))
    return params


@pytest.mark.parametrize("name", ["normalised", pytest.param("plain, mixed, biased", marks=pytest.mark.slow)])
def test_the_whole_loss_and_all_its_gradients_are_those_of_a_plain_loop(name):
    cfg, options = MODELS[name], config.Loss(z_loss=1e-2, router_z_loss=0.3, router_aux_adaptive=0.2)
    batch, coefficient = (
        as_arrays(packed_batch(np.random.default_rng(0), cfg, rows=3, length=12)),
        jnp.float32(COEFFICIENT[name]),
    )
    loss = losses.make_loss("pretrain", cfg, options)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def ours(params):
        total, weight, metrics = loss(params, batch, {"coefficient": coefficient}, None)
        return total / weight, (weight, metrics)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def theirs(params):
        parts = plain.router_losses(cfg, plain.forward(cfg, params, batch)[1], batch)
        return plain.next_token(cfg, options, params, batch, coefficient), parts

    (total, (weight, metrics)), grads = jax.jit(ours)(params_of(name))
    (value, (aux, z)), expected = jax.jit(theirs)(params_of(name))
    np.testing.assert_allclose(total, value, rtol=1e-5)
    if cfg.router_bias:
        np.testing.assert_array_equal(grads["layers"]["moe"]["bias"], 0)
        np.testing.assert_array_equal(expected["layers"]["moe"].pop("bias"), 0)
        del grads["layers"]["moe"]["bias"]
    assert_close(grads, expected, 2e-4)
    for metric, layers in (("moe/aux_loss", aux), ("moe/z_loss", z)):
        found, count = metrics[metric]
        np.testing.assert_allclose(found / count, layers.mean() / weight, rtol=1e-4)


def numpy_router_loss(cfg, W, bias, h, batch, coefficient, z_coefficient, shares=None):
    """Of one layer, in float64, one row and one token after the other; `shares` of the assignments count as given."""
    E, total, found = W.shape[1], 0.0, []
    for b in range(len(h)):
        tokens, probs, squares, counts = np.flatnonzero(batch["segment_ids"][b] > 0), np.zeros(E), 0.0, np.zeros(E)
        for s in tokens:
            x = h[b, s] @ W
            squares += math.log(sum(math.exp(v) for v in x)) ** 2
            z = x
            if cfg.normalized_gate:
                mean = sum(x) / E
                std = math.sqrt(sum((v - mean) ** 2 for v in x) / (E - 1))
                z = cfg.gate_scale * (x - mean) / (std + 1e-5)
            probs += np.exp(z) / np.exp(z).sum()
            for e in sorted(range(E), key=lambda e: -(z + bias)[e])[: cfg.top_k]:
                counts[e] += 1
        n = max(len(tokens), 1)
        found.append(counts / (n * cfg.top_k))
        share = found[-1] if shares is None else shares[b]
        aux = E * sum(f * p for f, p in zip(share, probs / n, strict=True))
        total += batch["loss_weights"][b].sum() * (coefficient * aux + z_coefficient * squares / n)
    return total / batch["loss_weights"].sum(), found


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_routers_against_differences_of_a_numpy_loop(name):
    """With experts that say nothing, only the balance losses reach the routers, each only its own."""
    cfg, z_coefficient = MODELS[name], 0.4
    params = jax.tree.map(lambda w: w, params_of(name))
    params["layers"]["moe"]["down"] *= 0
    batch = packed_batch(np.random.default_rng(2), cfg, rows=3, length=12)
    batch["segment_ids"][2, :] = 0  # nothing but padding
    batch["loss_weights"][2, :] = 0
    options = config.Loss(router_z_loss=z_coefficient, router_aux_adaptive=0.2)
    loss = losses.make_loss("pretrain", cfg, options)
    given = {"coefficient": jnp.float32(COEFFICIENT[name])}
    grads = jax.jit(lambda p: gradients(loss, p, as_arrays(batch), 1, given)[0])(params)["layers"]["moe"]["router"]
    routers = jax.jit(plain.forward, static_argnums=0)(cfg, params, as_arrays(batch))[1]
    rng = np.random.default_rng(0)
    for layer, router in enumerate(routers):
        W, h = (np.asarray(a, np.float64) for a in (params["layers"]["moe"]["router"][layer], router["h"]))
        bias = np.asarray(params["layers"]["moe"]["bias"][layer]) if cfg.router_bias else 0.0
        value = functools.partial(numpy_router_loss, cfg, bias=bias, h=h, batch=batch, z_coefficient=z_coefficient)
        value = functools.partial(value, coefficient=COEFFICIENT[name][layer])
        shares = value(W)[1]  # what counts as given: the assignments have no gradient
        for _ in range(4):
            direction = rng.normal(size=W.shape)
            ahead, behind = (value(W + s * direction, shares=shares)[0] for s in (1e-5, -1e-5))
            slope = (np.asarray(grads[layer]) * direction).sum()
            np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-3, atol=1e-5)
        for d, e in [(0, 0), (5, 3), (31, 1)]:
            one = np.zeros_like(W)
            one[d, e] = 1e-5
            slope = (value(W + one, shares=shares)[0] - value(W - one, shares=shares)[0]) / 2e-5
            np.testing.assert_allclose(grads[layer, d, e], slope, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("kind", ["pretrain", "dpo"])
def test_each_layer_has_its_own_coefficient(kind):
    cfg = MODELS["normalised"]
    batch = as_arrays((pair_batch if kind == "dpo" else packed_batch)(np.random.default_rng(0), cfg, rows=3))
    loss = losses.make_loss(kind, cfg, config.Loss(router_aux_loss=0.5, router_aux_adaptive=0.2))
    params = params_of("normalised")  # made outside of what is traced, for it is kept
    compute = jax.jit(lambda c: loss(params, batch, {"coefficient": c}, None))
    none, first, second = (compute(jnp.float32(c)) for c in ([0, 0], [2, 0], [0, 3]))
    labels = (batch["pair_segments"][..., 0] > 0).sum(1) if kind == "dpo" else batch["loss_weights"].sum(1)
    router = jax.jit(model.apply, static_argnums=0)(cfg, params, batch).router
    aux = [sum(float(a) * float(w) for a, w in zip(row, labels, strict=True)) for row in router.aux_B]
    np.testing.assert_allclose(first[0] - none[0], 2 * aux[0], rtol=1e-3)
    np.testing.assert_allclose(second[0] - none[0], 3 * aux[1], rtol=1e-3)
    np.testing.assert_array_equal(first[2]["loss"][0], none[2]["loss"][0])
    without = jax.jit(lambda: loss(params, batch, {}, None)[0])()  # no balance: the fixed coefficient
    np.testing.assert_allclose(without - none[0], 0.5 * sum(aux), rtol=1e-3)
