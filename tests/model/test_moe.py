import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax.model import moe
from tanuki_jax.model.moe import GATE_BINS, MoE, Routing, router_stats
from tests.tiny import small

route = jax.jit(moe.route, static_argnums=(1, 2))


def numpy_gate(logits, top_k, normalized, scale=1.0, bias=0.0):
    """Tanuki's and Mixtral's gates, one token at a time; a bias has a say in the choice alone."""
    weights, experts = np.zeros((*logits.shape[:-1], top_k)), np.zeros((*logits.shape[:-1], top_k), int)
    for index in np.ndindex(logits.shape[:-1]):
        z = logits[index].astype(np.float64)
        if normalized:
            z = scale * (z - z.mean()) / (z.std(ddof=1) + 1e-5)
        chosen = sorted(range(len(z)), key=lambda e: -(z + bias)[e])[:top_k]
        top = np.exp(z[chosen] - z[chosen].max())
        weights[index], experts[index] = top / top.sum(), chosen
    return weights, experts


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_gate_against_a_numpy_loop(top_k, normalized):
    logits = np.random.default_rng(0).normal(size=(2, 9, 8)) * 3 + 5
    weights, experts, probs = route(jnp.float32(logits), top_k, normalized)
    expected_weights, expected_experts = numpy_gate(np.float32(logits), top_k, normalized)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
    np.testing.assert_array_equal(experts, expected_experts)
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_lambda_and_bias_against_a_numpy_loop(normalized, with_bias, scale):
    rng = np.random.default_rng(1)
    logits, bias = np.float32(rng.normal(size=(2, 40, 7)) * 2 - 3), np.float32(rng.normal(size=7) * 1.5)
    weights, experts, probs = route(jnp.asarray(logits), 3, normalized, scale, jnp.asarray(bias) if with_bias else None)
    expected_weights, expected_experts = numpy_gate(logits, 3, normalized, scale, bias if with_bias else 0.0)
    np.testing.assert_array_equal(experts, expected_experts)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-4)
    plain_weights, plain_experts, plain_probs = route(jnp.asarray(logits), 3, normalized, scale)
    np.testing.assert_array_equal(probs, plain_probs)  # the losses do not see the bias
    if with_bias:
        same = (np.sort(experts, -1) == np.sort(plain_experts, -1)).all(-1)
        assert 0 < same.sum() < same.size  # it does choose otherwise, at times
        order = lambda w, e: np.take_along_axis(np.asarray(w), np.argsort(e, -1), -1)  # noqa: E731
        np.testing.assert_allclose(order(weights, experts)[same], order(plain_weights, plain_experts)[same], rtol=1e-6)


@pytest.mark.parametrize(("top_k", "before"), [(1, True), (2, False)], ids=["padding first", "padding last"])
def test_with_a_capacity_padding_takes_no_room_and_is_not_counted(top_k, before):
    """What 24 real tokens get, drop and count does not depend on the length to which their rows are padded."""
    cfg = small(d_model=8, d_ff=8, n_experts=4, top_k=top_k, capacity_factor=0.9, init_std=0.5)
    rows, real, module = 3, 8, MoE(cfg)
    x = jax.random.normal(jax.random.key(0), (rows, real, 8))
    params, found = jax.jit(module.init)(jax.random.key(1), x, jnp.ones((rows, real), bool)), {}
    compute = jax.jit(module.apply)
    for length in (8, 9, 16):
        pad = [(0, 0), (length - real, 0) if before else (0, length - real), (0, 0)]
        valid = jnp.pad(jnp.ones((rows, real), bool), pad[:2])
        y, stats = compute(params, jnp.pad(x, pad, constant_values=1.0), valid)
        found[length] = y[valid], *stats
        assert not np.asarray(y[~valid]).any()
    assert found[8][-2] > 0  # some are dropped
    for length in (9, 16):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found[length], found[8])


@pytest.mark.parametrize("normalized", [True, False])
def test_the_part_of_a_bias_that_all_experts_share_chooses_nothing(normalized):
    rng = np.random.default_rng(2)
    logits, bias = jnp.float32(rng.normal(size=(1, 60, 6))), jnp.float32(rng.normal(size=6))
    (a, i, _), (b, j, _) = (route(logits, 2, normalized, 1.0, bias + c) for c in (0.0, 0.5))
    np.testing.assert_array_equal(i, j)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_bias_gets_no_gradient_and_the_logits_get_theirs(normalized):
    rng = np.random.default_rng(3)
    logits, bias = jnp.float32(rng.normal(size=(1, 9, 5))), jnp.float32(rng.normal(size=5))
    target = jnp.float32(rng.normal(size=(1, 9, 2)))

    def value(logits, bias):
        weights, _, probs = route(logits, 2, normalized, 1.3, bias)
        return (weights * target).sum() + (probs**2).sum()

    of_logits, of_bias = jax.jit(jax.grad(value, argnums=(0, 1)))(logits, bias)
    np.testing.assert_array_equal(of_bias, 0)
    direction = jnp.float32(rng.normal(size=logits.shape))
    ends = [logits + s * direction for s in (1e-3, -1e-3)]
    assert (route(ends[0], 2, normalized, 1.3, bias)[1] == route(ends[1], 2, normalized, 1.3, bias)[1]).all()  # no jump
    ahead, behind = (jax.jit(value)(end, bias) for end in ends)
    np.testing.assert_allclose((of_logits * direction).sum(), (ahead - behind) / 2e-3, rtol=2e-2)


def test_a_larger_lambda_makes_the_normalised_gate_sharper_and_leaves_the_plain_one_alone():
    logits = jnp.float32(np.random.default_rng(0).normal(size=(1, 80, 8)))
    soft, sharp = (route(logits, 2, True, scale) for scale in (0.5, 3.0))
    np.testing.assert_array_equal(soft[1], sharp[1])
    assert (sharp[0][..., 0] > soft[0][..., 0]).all()
    np.testing.assert_array_equal(route(logits, 2, False, 0.5)[0], route(logits, 2, False, 3.0)[0])


def test_a_bfloat16_router_is_computed_in_float32():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 4)), jnp.bfloat16)
    for found, expected in zip(route(logits, 2, True), route(logits.astype(jnp.float32), 2, True), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_the_normalised_gate_ignores_scale_and_is_bounded():
    logits = jnp.float32(np.random.default_rng(0).normal(size=(1, 50, 8)))
    a, b = route(logits, 2, True)[0], route(logits * 40 + 7, 2, True)[0]
    np.testing.assert_allclose(a, b, atol=1e-3)
    assert a.max() <= 1 / (1 + np.exp(-8 / np.sqrt(8))) + 1e-6  # reached by a single non-zero logit


def test_equal_logits_have_a_finite_gradient():
    gradient = jax.jit(jax.grad(lambda x: route(x, 2, True).weights_BSk[..., 0].sum()))(jnp.zeros((1, 3, 8)))
    assert jnp.isfinite(gradient).all()


def test_statistics_against_numpy():
    rng = np.random.default_rng(0)
    B, S, E, k = 3, 10, 4, 2
    logits = rng.normal(size=(B, S, E))
    valid = rng.random((B, S)) < 0.7
    valid[2] = False
    routing = _, experts, probs = route(jnp.float32(logits), k, False)
    kept = rng.random((B, S, k)) < 0.8
    stats = jax.jit(router_stats)(jnp.float32(logits), routing, jnp.asarray(kept), jnp.asarray(valid))
    load = np.zeros(E)
    for b in range(B):
        tokens = np.flatnonzero(valid[b])
        counts = np.zeros(E)
        for t in tokens:
            for e in np.asarray(experts[b, t]):
                counts[e] += 1
        load += counts
        n = max(len(tokens), 1)
        expected = E * sum((counts[e] / (n * k)) * np.asarray(probs)[b, tokens, e].sum() / n for e in range(E))
        np.testing.assert_allclose(stats.aux_B[b], expected, rtol=1e-5)
        z = np.log(np.exp(logits[b, tokens]).sum(-1)) ** 2
        np.testing.assert_allclose(stats.z_B[b], z.sum() / n, rtol=1e-5)
    np.testing.assert_allclose(stats.load_E, load)
    assert stats.dropped == (~kept & valid[..., None]).sum()


def test_perfect_balance_costs_one():
    experts = jnp.array([[[0, 1], [2, 3], [1, 2], [3, 0]]])
    kept = jnp.ones(experts.shape, bool)
    routing = Routing(jnp.full((1, 4, 2), 0.5), experts, jnp.full((1, 4, 4), 0.25))
    stats = jax.jit(router_stats)(jnp.zeros((1, 4, 4)), routing, kept, jnp.ones((1, 4)))
    np.testing.assert_allclose(stats.aux_B, 1.0, rtol=1e-6)
    assert stats.dropped == 0


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_tokens_are_counted_by_their_largest_weight(top_k):
    rng = np.random.default_rng(0)
    logits, bias = rng.normal(size=(4, 30, 6)) * 2, jnp.float32(rng.normal(size=6) * 3)
    valid = rng.random((4, 30)) < 0.6
    routing = weights, experts, _ = route(jnp.float32(logits), top_k, False, 1.0, bias)
    stats = jax.jit(router_stats)(jnp.float32(logits), routing, jnp.ones(experts.shape, bool), jnp.asarray(valid))
    expected = np.zeros(GATE_BINS)
    for b, s in zip(*np.nonzero(valid), strict=True):
        largest = max(float(w) for w in weights[b, s])
        expected[min(int(largest * GATE_BINS), GATE_BINS - 1)] += 1
    np.testing.assert_array_equal(stats.gate_bins, expected)
    assert stats.gate_bins.sum() == valid.sum()
    if top_k == 2:  # the larger of two weights is never below a half
        assert expected[:5].sum() == 0 and (expected[5:] > 0).all()
        assert (weights[..., 0] < weights[..., 1]).any()  # the first choice, by the bias, need not weigh most


def test_the_edges_of_the_bins():
    largest = jnp.array([1.0, 0.5, 0.4999, 0.0, 0.9999, 0.95, 0.11])
    experts, kept = jnp.zeros((1, 7, 1), jnp.int32), jnp.ones((1, 7, 1), bool)
    routing = Routing(largest[None, :, None], experts, jnp.ones((1, 7, 3)) / 3)
    stats = jax.jit(router_stats)(jnp.zeros((1, 7, 3)), routing, kept, jnp.ones((1, 7)))
    np.testing.assert_array_equal(stats.gate_bins, [1, 1, 0, 0, 1, 1, 0, 0, 0, 3])


def test_counts_get_no_gradient_and_the_losses_do():
    logits, valid = jnp.float32(np.random.default_rng(0).normal(size=(2, 9, 5))), jnp.ones((2, 9))

    def stats(x):
        return router_stats(x, route(x, 2, True), jnp.ones((2, 9, 2), bool), valid)

    gradients = jax.jit(jax.jacrev(lambda x: jax.tree.map(jnp.sum, stats(x))))(logits)
    for name in ("load_E", "dropped", "gate_bins"):
        np.testing.assert_array_equal(getattr(gradients, name), 0)
    for name in ("aux_B", "z_B"):
        assert jnp.abs(getattr(gradients, name)).max() > 1e-4
