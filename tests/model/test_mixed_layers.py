"""Models in which some layers are dense and the others are mixtures."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, model, parallel
from tanuki_jax.data import loader
from tanuki_jax.model import layer_groups as groups
from tests import plain
from tests.tiny import QUICK, apply, assert_close, init, packed_batch, random_params, small, with_options

MODELS = {
    "dense first": small(n_layers=3, n_experts=4, first_dense=1, **QUICK),
    "every second": small(n_layers=4, n_experts=5, moe_every=2, top_k=3, expert_d_ff=13, normalized_gate=False),
    "in the middle": small(n_layers=4, n_experts=4, first_dense=1, moe_every=2, router_bias=True, gate_scale=1.7, **QUICK),
}
# Which layers are mixtures, and the runs that follow, counted by hand.
KINDS = {
    "dense first": ([1, 2], [(False, 0, 1), (True, 1, 3)]),
    "every second": ([1, 3], [(False, 0, 1), (True, 1, 2), (False, 2, 3), (True, 3, 4)]),
    "in the middle": ([2], [(False, 0, 2), (True, 2, 3), (False, 3, 4)]),
}


@functools.cache
def params_of(name):
    """Random parameters, the biases too where there are any."""
    params = random_params(MODELS[name])
    moe = params["layers"]["moe"]
    if "bias" in moe:
        moe["bias"] = jax.random.normal(jax.random.key(1), moe["bias"].shape)
    return params


def batch_of(cfg, rows=2):
    return {name: jnp.asarray(value) for name, value in packed_batch(np.random.default_rng(0), cfg, rows).items()}


def tied(tree):
    return jax.tree.structure(jax.tree.map(lambda _: 0, tree, is_leaf=lambda a: isinstance(a, tuple)))


# --- which layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_neighbours_of_one_kind_are_one_group(name):
    mixtures, runs = KINDS[name]
    assert list(config.moe_layers(MODELS[name])) == mixtures
    assert groups.layer_groups(MODELS[name]) == runs


@pytest.mark.parametrize(("first", "every"), [(f, e) for f in range(6) for e in range(1, 6)])
def test_of_the_layers_after_the_first_every_nth_is_a_mixture(first, every):
    cfg, counted, mixtures = small(n_layers=6, n_experts=4, first_dense=first, moe_every=every), 0, []
    for layer in range(6):
        if layer >= first:
            counted += 1
            if counted == every:
                mixtures.append(layer)
                counted = 0
    assert list(config.moe_layers(cfg)) == mixtures
    runs = groups.layer_groups(cfg)
    assert [i for mixture, a, b in runs if mixture for i in range(a, b)] == mixtures
    assert [i for _, a, b in runs for i in range(a, b)] == list(range(6))
    assert all(one[0] != other[0] for one, other in zip(runs, runs[1:], strict=False))
    assert config.moe_layers(dataclasses.replace(cfg, n_experts=0)) == ()


# --- the tree -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_axes_are_those_of_each_kind_of_layer(name):
    cfg, (mixtures, _) = MODELS[name], KINDS[name]
    L, M, D, N, K, H, E, V = cfg.n_layers, len(mixtures), 32, 4, 2, 8, cfg.n_experts, 96
    F, G = 48, cfg.expert_d_ff or 48
    expected = {
        "embed/table": ("VD", (V, D)),
        "head": ("DV", (D, V)),
        "layers/attn/q": ("LDNH", (L, D, N, H)),
        "layers/attn/k": ("LDKH", (L, D, K, H)),
        "layers/attn/v": ("LDKH", (L, D, K, H)),
        "layers/attn/o": ("LNHD", (L, N, H, D)),
        "layers/mlp/gate": ("LDF", (L - M, D, F)),
        "layers/mlp/up": ("LDF", (L - M, D, F)),
        "layers/mlp/down": ("LFD", (L - M, F, D)),
        "layers/moe/router": ("LDE", (M, D, E)),
        "layers/moe/gate": ("LEDF", (M, E, D, G)),
        "layers/moe/up": ("LEDF", (M, E, D, G)),
        "layers/moe/down": ("LEFD", (M, E, G, D)),
        "layers/norm_attn": ("LD", (L, D)),
        "layers/norm_mlp": ("LD", (L, D)),
        "norm_final": ("D", (D,)),
    }
    if cfg.router_bias:
        expected["layers/moe/bias"] = ("LE", (M, E))
    assert {n: (axes, shape) for n, axes, shape in model.named_parameters(cfg)} == expected
    params, shapes = params_of(name), model.parameter_shapes(cfg)
    assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == jax.tree.map(lambda s: (s.shape, s.dtype), shapes)
    assert tied(model.logical_axes(cfg)) == jax.tree.structure(params)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_are_counted_by_kind_of_layer(name):
    cfg, (mixtures, _) = MODELS[name], KINDS[name]
    D, V, E = 32, 96, cfg.n_experts
    attention = 2 * D * 4 * 8 + 2 * D * 2 * 8
    expert = 3 * D * (cfg.expert_d_ff or 48)
    total = active = 2 * V * D + D
    for layer in range(cfg.n_layers):
        both = attention + 2 * D
        if layer in mixtures:
            both += D * E + (E if cfg.router_bias else 0)
            total, active = total + both + E * expert, active + both + cfg.top_k * expert
        else:
            total, active = total + both + 3 * D * 48, active + both + 3 * D * 48
    assert model.count_parameters(cfg) == (total, active)
    assert total == sum(p.size for p in jax.tree.leaves(params_of(name)))
    S = 40
    causal_attention = 6 * cfg.n_layers * (2 * 4 * 8 * S / 2)
    assert model.flops_per_token(cfg, S) == 6 * (active - V * D) + causal_attention


def test_a_first_initialisation_has_the_deviation_asked_for_in_both_kinds():
    cfg = MODELS["every second"]
    layers = init(cfg, jax.random.key(0))["layers"]
    outer = cfg.init_std / math.sqrt(2 * cfg.n_layers)
    for kind in ("mlp", "moe"):
        for name, std in (("gate", cfg.init_std), ("up", cfg.init_std), ("down", outer)):
            for layer in layers[kind][name]:
                assert float(layer.std()) == pytest.approx(std, rel=0.08)
        a, b = layers[kind]["gate"]
        assert jnp.abs(a - b).max() > cfg.init_std
    np.testing.assert_array_equal(layers["norm_mlp"], 1)


@pytest.mark.parametrize("n_layers", [5, 26])
def test_layers_by_run_and_by_kind_are_the_same_layers(n_layers):
    """Through a map over the tree too, which sorts the names of the runs."""
    cfg = small(n_layers=n_layers, n_experts=2, moe_every=2)
    mixtures, dense = range(1, n_layers, 2), range(0, n_layers, 2)
    by_kind = {
        "head": np.arange(3),
        "layers": {
            "norm_attn": np.arange(n_layers),
            "mlp": {"up": np.array(dense) * 10},
            "moe": {"up": np.array(mixtures) * 100, "router": np.array(mixtures) * 1000},
        },
    }
    by_run = groups.split_groups(cfg, by_kind)
    assert len(by_run) == n_layers + 1
    for layer in range(n_layers):
        run = by_run[f"run_{layer}"]
        assert run["norm_attn"].tolist() == [layer]
        assert run["moe" if layer % 2 else "mlp"]["up"].tolist() == [layer * (100 if layer % 2 else 10)]
    for tree in (by_run, jax.tree.map(lambda leaf: leaf, by_run)):
        back = groups.merge_groups(tree, lambda *leaves: np.concatenate(leaves))
        jax.tree.map(np.testing.assert_array_equal, back, by_kind)


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_a_loop_over_its_layers(name):
    cfg, params = MODELS[name], params_of(name)
    batch = batch_of(cfg, rows=3)
    found = apply(cfg, params, batch)
    hidden, routers = jax.jit(plain.forward, static_argnums=0)(cfg, params, batch)
    np.testing.assert_allclose(found.hidden, hidden, rtol=1e-4, atol=1e-5)
    valid = np.asarray(batch["segment_ids"] > 0)
    assert found.router.load_E.shape == (len(KINDS[name][0]), cfg.n_experts)
    for layer, router in enumerate(routers):
        chosen = np.asarray(router["chosen"])
        load = [sum(chosen[b, s, e] for b, s in zip(*np.nonzero(valid), strict=True)) for e in range(cfg.n_experts)]
        np.testing.assert_array_equal(found.router.load_E[layer], load)
    aux, z = plain.router_losses(cfg, routers, {**batch, "loss_weights": jnp.ones((3, 1))})
    np.testing.assert_allclose(found.router.aux_B.sum(1), aux, rtol=1e-4)
    np.testing.assert_allclose(found.router.z_B.sum(1), z, rtol=1e-4)


def test_the_model_is_its_own_modules_one_layer_at_a_time():
    cfg, params = MODELS["dense first"], params_of("dense first")
    batch, layers, parts = batch_of(cfg), params["layers"], model.layerwise
    place = {"mlp": 0, "moe": 0}
    x = parts.embed(cfg, params["embed"]["table"], batch["tokens"])
    for layer in range(cfg.n_layers):
        shared = {name: part for name, part in layers.items() if name not in place}
        x, h = parts.attend(cfg, jax.tree.map(lambda w, i=layer: w[i], shared), x, batch)
        kind = "moe" if layer in KINDS["dense first"][0] else "mlp"
        mine = jax.tree.map(lambda w, i=place[kind]: w[i], layers[kind])
        place[kind] += 1
        if kind == "mlp":
            x += parts.ffn(mine, h)
            continue
        weights = parts.gates(cfg, mine["router"], h)
        for e in range(cfg.n_experts):
            expert = {name: mine[name][e] for name in model.FFN_MATRICES}
            x += weights[..., e : e + 1] * parts.ffn(expert, h)
    found = parts.logits(cfg, params["norm_final"], params["head"], x)
    np.testing.assert_allclose(apply(cfg, params, batch).hidden @ params["head"], found, rtol=1e-4, atol=1e-5)


def test_an_ffn_of_bfloat16_weights_is_computed_in_float32():
    rng, (D, F) = np.random.default_rng(0), (96, 160)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    weights = {name: jnp.asarray(rng.normal(size=shape) / 10, jnp.bfloat16) for name, shape in shapes.items()}
    h = rng.normal(size=(2, 5, D)).astype(np.float32)
    gate, up, down = (np.asarray(weights[name], np.float64) for name in shapes)
    expected = (h @ gate / (1 + np.exp(-(h @ gate))) * (h @ up)) @ down
    found = jax.jit(model.layerwise.ffn)(weights, h)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())  # bfloat16: 3e-3


def loss(cfg, params, batch):
    """Of the hidden states and of the routers' statistics, so that every parameter but the head has a gradient."""
    outputs = model.apply(cfg, params, batch)
    valid = (batch["segment_ids"] > 0)[..., None]
    return (outputs.hidden**3 * valid).sum() + outputs.router.aux_B.sum() + outputs.router.z_B.sum()


gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)


def plain_loss(cfg, params, batch):
    hidden, routers = plain.forward(cfg, params, batch)
    aux, z = plain.router_losses(cfg, routers, {**batch, "loss_weights": jnp.ones((2, 1))})
    return (hidden**3 * (batch["segment_ids"] > 0)[..., None]).sum() + aux.sum() + z.sum()


@functools.cache
def gradient_of(name):
    return gradient(MODELS[name], params_of(name), batch_of(MODELS[name]))


# Both kinds of layers first and last, single and in groups; the third model differs in no more than their number.
VARIED = ["in the middle", "every second", pytest.param("dense first", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", VARIED)
def test_gradients_are_those_of_the_loop_and_have_the_parameters_tree(name):
    found, params = gradient_of(name), params_of(name)
    assert jax.tree.map(lambda g: (g.shape, g.dtype), found) == jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    expected = jax.jit(jax.grad(plain_loss, argnums=1), static_argnums=0)(MODELS[name], params, batch_of(MODELS[name]))
    if "bias" in expected["layers"]["moe"]:
        np.testing.assert_array_equal(found["layers"]["moe"]["bias"], 0)
    assert_close(found, expected, 2e-4)
    silent = {"head"} | ({"bias"} if MODELS[name].router_bias else set())
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        rows = np.asarray(leaf).reshape(leaf.shape[0], -1)
        assert path[-1].key in silent or path[-1].key == "table" or np.abs(rows).max(axis=1).min() > 0, path


@pytest.mark.parametrize(
    "options",
    [
        dict(remat="attention", scan_unroll=2),
        *(pytest.param(options, marks=pytest.mark.slow) for options in (dict(remat="full"), dict(scan_unroll=9))),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_what_is_kept_for_the_backward_pass_and_the_unrolling_change_no_gradient(options):
    cfg = with_options(MODELS["in the middle"], **options)
    assert_close(gradient(cfg, params_of("in the middle"), batch_of(cfg)), gradient_of("in the middle"), 1e-5)


def test_eight_devices_compute_what_one_does():
    # An expert's F of 13 does not divide over tensor.
    cfg = with_options(MODELS["in the middle"], n_layers=3, expert_d_ff=13, expert_impl="auto")
    mesh = parallel.make_mesh(config.Mesh(fsdp=2, expert=2, tensor=2), jax.devices())
    base = random_params(cfg)
    base["layers"]["moe"]["bias"] = jax.random.normal(jax.random.key(1), base["layers"]["moe"]["bias"].shape)
    params = jax.device_put(base, checkpoint.parameter_shardings(cfg, mesh))
    batch = packed_batch(np.random.default_rng(0), cfg, rows=8)
    with jax.set_mesh(mesh):
        on_mesh = loader.on_devices(batch, mesh, 8)
        compute = jax.jit(lambda p, b: jax.value_and_grad(lambda p: loss(cfg, p, b))(p))
        value, found = compute(params, on_mesh)
    whole = {n: jnp.asarray(v) for n, v in batch.items()}
    expected_value, expected = jax.jit(lambda p: jax.value_and_grad(lambda p: loss(cfg, p, whole))(p))(base)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert_close(found, expected, 1e-4)
