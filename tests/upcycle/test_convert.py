import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, model, parallel, upcycle
from tanuki_jax.errors import UserError
from tanuki_jax.model.moe import route
from tests.normals import expected_normal
from tests.tiny import random_params, small
from tests.upcycle.trees import (
    DENSE,
    FFN,
    ODD,
    PARAMS,
    SPREAD,
    STRATEGIES,
    E,
    draw_key,
    drawn,
    logits,
    made_of,
    mixture,
    numpy_groups,
    outputs,
    upcycled,
)


@pytest.mark.parametrize(("top_k", "normalized"), [(1, True), (2, False), (3, True), (4, False)])
def test_a_copy_computes_what_the_dense_model_does_whatever_its_router_says(top_k, normalized):
    """With the other gate in `test_any_number_of_copies_computes_what_the_dense_model_does`."""
    expected, cfg = logits(DENSE, PARAMS), mixture(top_k, normalized)
    for seed, router_std in enumerate((0.0, 0.02, 1.0, 30.0)):
        found = logits(cfg, upcycled("copy", seed, cfg, router_std=router_std))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_noise_changes_what_is_computed():
    cfg = mixture()
    assert jnp.abs(logits(cfg, upcycled("noise", noise_std=0.05)) - logits(DENSE, PARAMS)).max() > 1e-2


@pytest.mark.parametrize("std", [1e-3, 0.3])
def test_noise_has_the_absolute_deviation_asked_for_and_is_drawn_for_each_expert(std):
    made = upcycled("noise", noise_std=std)["layers"]["moe"]
    noise = {name: np.asarray(made[name] - PARAMS["layers"]["mlp"][name][:, None]) for name in FFN}
    for name in FFN:
        assert noise[name].std() == pytest.approx(std, rel=0.03)
        assert abs(noise[name].mean()) < 5 * std / math.sqrt(noise[name].size)
    flat = np.concatenate([noise[name].reshape(DENSE.n_layers * E, -1) for name in FFN])  # each expert of each layer
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.15


def test_the_router_has_its_own_deviation_and_no_noise():
    copied, noisy = (upcycled(s, router_std=0.5, noise_std=9.0)["layers"]["moe"]["router"] for s in ("copy", "noise"))
    np.testing.assert_array_equal(copied, noisy)
    assert copied.std() == pytest.approx(0.5, rel=0.15)


def test_what_is_not_the_ffn_is_passed_on_untouched():
    made = upcycled("noise")
    assert all(made[name] is PARAMS[name] for name in ("norm_final", "head"))
    assert made["embed"]["table"] is PARAMS["embed"]["table"]
    assert all(made["layers"][name] is PARAMS["layers"][name] for name in ("norm_attn", "norm_mlp"))
    assert all(made["layers"]["attn"][name] is PARAMS["layers"]["attn"][name] for name in "qkvo")
    assert "mlp" not in made["layers"] and "mlp" in PARAMS["layers"]  # and the argument is as it was


def test_the_key_is_the_only_randomness():
    same, again, other = (jax.tree.leaves(upcycled("noise", seed)["layers"]["moe"]) for seed in (3, 3, 4))
    assert all((a == b).all() for a, b in zip(same, again, strict=True))
    assert all((a != b).any() for a, b in zip(same, other, strict=True))


@functools.cache
def upcycled_on(strategy, several=False, **sizes):
    """As a stage does it: compiled, from parameters that are split over the mesh to such parameters."""
    cfg = upcycle.moe_config(DENSE, n_experts=2, router_bias=True, expert_d_ff=24 if strategy == "groups" else 0)
    mesh = parallel.make_mesh(config.Mesh(**{"fsdp": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])
    options = config.Upcycle(strategy, **STRATEGIES[strategy])
    convert = jax.jit(
        lambda trees, k: upcycle.upcycle(trees[0], cfg, options, k, trees[1:]),
        out_shardings=checkpoint.parameter_shardings(cfg, mesh),
    )
    trees = [PARAMS, random_params(DENSE, 1)][: 1 + several]
    return convert(jax.device_put(trees, [checkpoint.parameter_shardings(DENSE, mesh)] * len(trees)), jax.random.key(0))


MESHES = {"fsdp": dict(fsdp=8), "data": dict(data=2, fsdp=4), "three axes": dict(fsdp=2, expert=2, tensor=2)}


@pytest.mark.parametrize(
    ("strategy", "sizes"), [("copy", "fsdp"), ("noise", "data"), ("noise", "three axes"), ("groups", "three axes")]
)
def test_a_mesh_changes_no_bit(strategy, sizes):
    split, whole = upcycled_on(strategy, **MESHES[sizes]), upcycled_on(strategy)
    assert len(split["layers"]["moe"]["gate"].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, split, whole)


@pytest.mark.parametrize("sizes", ["fsdp", "three axes"])
def test_a_mesh_changes_the_same_dimensions_to_the_same_numbers(sizes):
    split, whole = upcycled_on("drop", **MESHES[sizes]), upcycled_on("drop")
    for name in FFN:
        a, b = (np.asarray(tree["layers"]["moe"][name]) for tree in (split, whole))
        kept = b == np.asarray(PARAMS["layers"]["mlp"][name])[:, None]
        assert 0.3 < kept.mean() < 0.7
        np.testing.assert_array_equal(a[kept], b[kept])
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(split["layers"]["moe"]["router"], whole["layers"]["moe"]["router"])


def test_a_mesh_changes_no_bit_of_what_several_models_make():
    jax.tree.map(np.testing.assert_array_equal, *(upcycled_on("copy", True, **sizes) for sizes in (MESHES["three axes"], {})))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_8b_becomes_the_8x8b(dtype):
    dense = config.ModelConfig(param_dtype=dtype)
    cfg = upcycle.moe_config(dense, n_experts=8)
    made = jax.eval_shape(lambda p: upcycle.upcycle(p, cfg, config.Upcycle(), jax.random.key(0)), model.parameter_shapes(dense))
    assert jax.tree.map(lambda s: (s.shape, s.dtype), made) == jax.tree.map(
        lambda s: (s.shape, s.dtype), model.parameter_shapes(cfg)
    )
    assert sum(math.prod(s.shape) for s in jax.tree.leaves(made)) == 46_973_325_312


def test_a_mixture_cannot_be_upcycled_again():
    with pytest.raises(UserError, match="mixture already"):
        upcycle.moe_config(mixture(), n_experts=8)
    with pytest.raises(UserError, match="mixture already"):
        upcycle.upcycle(upcycled(), mixture(), config.Upcycle(), jax.random.key(0))


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 5), (4, 0), (0, 1)])
def test_top_k_lies_between_one_and_the_experts(n_experts, top_k):
    with pytest.raises(UserError, match=f"top_k {top_k} must lie between 1 and n_experts {n_experts}"):
        upcycle.moe_config(DENSE, n_experts=n_experts, top_k=top_k)


# --- each strategy against numpy, one layer and one expert at a time, on sizes that divide by nothing -------------------


def numpy_noise(weights, number, key, std):
    keys = jax.random.split(key, 3)
    return {n: w + std * expected_normal(k, w.shape) for (n, w), k in zip(weights.items(), keys, strict=True)}


def numpy_drop(weights, number, key, ratio):
    D, F = weights["gate"].shape
    keys = jax.random.split(key, 4)
    dimensions = np.asarray(jax.random.permutation(keys[0], F))[: math.floor(ratio * F)]
    made = {}
    for (name, w), k in zip(weights.items(), keys[1:], strict=True):
        made[name], normal = w.copy(), expected_normal(k, w.shape)
        places = [(f, d) if name == "down" else (d, f) for f in dimensions for d in range(D)]
        if not places:
            continue
        lost = [float(w[place]) for place in places]
        mean = sum(lost) / len(lost)
        std = math.sqrt(sum((x - mean) ** 2 for x in lost) / (len(lost) - 1))
        for place in places:
            made[name][place] = mean + std * normal[place]
    return made


EXPECTED = {
    "copy": ({}, {}, lambda w, e, key: w),
    "noise": ({"noise_std": 0.3}, {}, lambda w, e, key: numpy_noise(w, e, key, 0.3)),
    "drop a third": ({"drop_ratio": 0.34}, {}, lambda w, e, key: numpy_drop(w, e, key, 0.34)),
    "drop one": ({"drop_ratio": 0.07}, {}, lambda w, e, key: numpy_drop(w, e, key, 0.07)),
    "drop all": ({"drop_ratio": 1.0}, {}, lambda w, e, key: numpy_drop(w, e, key, 1.0)),
    "drop none": ({"drop_ratio": 0.0}, {}, lambda w, e, key: w),
    "groups of 3": ({}, {"expert_d_ff": 5}, lambda w, e, key: numpy_groups(w, e, 3)),
    "groups of 5": ({}, {"expert_d_ff": 3}, lambda w, e, key: numpy_groups(w, e, 5)),
    "groups of 1": ({}, {"expert_d_ff": 15}, lambda w, e, key: w),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_each_strategy_against_numpy(case):
    options, shape, expected = EXPECTED[case]
    parts = ODD.d_ff // shape["expert_d_ff"] if shape else 1
    n_experts, dense = 2 * parts + (parts == 1), drawn()  # every part in two experts
    made = made_of(dense, case.split()[0], n_experts, seed=4, shape=shape, **options)["layers"]["moe"]
    for layer, number in itertools.product(range(ODD.n_layers), range(n_experts)):
        weights = {name: np.asarray(dense["layers"]["mlp"][name][layer]) for name in FFN}
        wanted = expected(weights, number, draw_key(4, layer, number))
        for name in FFN:
            np.testing.assert_allclose(made[name][layer, number], wanted[name], rtol=2e-6, atol=2e-6)


# --- drop -------------------------------------------------------------------------------------------------------------


def redrawn(made, dense):
    """[L, E, F] of each matrix: whether a dimension changed; one that changed in part is an error.

    One weight of seven may be drawn as it was: around 10 there are not that many numbers.
    """
    found = {}
    for name in FFN:
        differs = np.asarray(made[name]) != np.asarray(dense["layers"]["mlp"][name])[:, None]
        share = differs.mean(axis=3 if name == "down" else 2)
        assert ((share == 0) | (share > 0.8)).all()
        found[name] = share > 0
    return found


@pytest.mark.parametrize(("ratio", "count"), [(0.06, 0), (0.07, 1), (0.5, 7), (0.99, 14), (1.0, 15)])
def test_drop_redraws_that_share_of_the_dimensions_the_same_in_all_three_matrices(ratio, count):
    dense = drawn()
    found = redrawn(made_of(dense, "drop", drop_ratio=ratio)["layers"]["moe"], dense)
    np.testing.assert_array_equal(found["gate"].sum(axis=2), count)
    np.testing.assert_array_equal(found["up"], found["gate"])
    np.testing.assert_array_equal(found["down"], found["gate"])
    if 1 < count < 14:
        masks = found["gate"].reshape(-1, 15)
        assert len({tuple(mask) for mask in masks}) == len(masks)  # no two experts of any layers lose the same


def test_a_share_that_is_a_whole_number_of_dimensions_in_decimals_is_that_number():
    """0.29 * 100 is 28.999999999999996 in binary."""
    rng = np.random.default_rng(0)
    shapes = {"gate": (3, 100), "up": (3, 100), "down": (100, 3)}
    weights = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    cfg, options = upcycle.moe_config(small(d_model=3, d_ff=100), n_experts=2), config.Upcycle("drop", drop_ratio=0.29)
    made = upcycle.expert(weights, upcycle.strategy_stats(weights, options), 0, 0, cfg, options, jax.random.key(0))
    assert (made["gate"] != weights["gate"]).any(axis=0).sum() == 29


def test_every_dimension_is_as_likely_to_be_redrawn_and_no_two_go_together():
    weights = {name: w[0] for name, w in drawn()["layers"]["mlp"].items()}
    cfg, options, key = upcycle.moe_config(ODD, n_experts=2), config.Upcycle("drop", drop_ratio=0.5), jax.random.key(0)
    known = upcycle.strategy_stats(weights, options)
    experts = jax.jit(jax.vmap(lambda n: upcycle.expert(weights, known, n, 0, cfg, options, key)["gate"]))(jnp.arange(600))
    masks = (np.asarray(experts) != np.asarray(weights["gate"])).any(axis=1)
    share = 7 / 15
    assert np.abs(masks.mean(axis=0) - share).max() < 4.5 * math.sqrt(share * (1 - share) / 600)
    together = np.corrcoef(masks.T.astype(float))[np.triu_indices(15, 1)]  # drawing without putting back: -1/14
    assert np.abs(together + 1 / 14).max() < 4.5 / math.sqrt(600)


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_what_is_redrawn_has_the_mean_and_deviation_of_what_it_replaces(ratio):
    source = small(n_layers=2, d_model=24, d_ff=44)
    dense = drawn(source)
    # dimensions of very different means: the moments of the slice are not those of the matrix
    shift = np.random.default_rng(1).normal(size=44) * 3
    mlp = dense["layers"]["mlp"]
    for name in FFN:
        mlp[name] = mlp[name] + SPREAD[name] * jnp.float32(shift[:, None] if name == "down" else shift)
    made = made_of(dense, "drop", 3, source=source, drop_ratio=ratio)["layers"]["moe"]
    masks = redrawn(made, dense)["gate"]
    n = int(ratio * 44) * 24
    scores = []
    for layer, number, name in itertools.product(range(2), range(3), FFN):
        old, new = np.asarray(mlp[name][layer], np.float64), np.asarray(made[name][layer, number], np.float64)
        if name == "down":
            old, new = old.T, new.T
        old, new = old[:, masks[layer, number]], new[:, masks[layer, number]]
        assert abs(new.mean() - old.mean()) < 4.5 * old.std() / math.sqrt(n)
        assert abs(new.std(ddof=1) / old.std(ddof=1) - 1) < 4.5 / math.sqrt(2 * n)
        scores.append(((new - old.mean()) / old.std(ddof=1)).ravel())
    assert np.abs(np.corrcoef(scores)[np.triu_indices(len(scores), 1)]).max() < 4.5 / math.sqrt(n)  # drawn for each
    assert abs((np.concatenate(scores) ** 4).mean() - 3) < 4.5 * math.sqrt(96 / (n * len(scores)))  # and normal


# --- groups -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "top_k", "normalized"), [(2, 2, True), (2, 4, False), (3, 3, False), (3, 6, True)])
def test_groups_compute_what_the_dense_model_does_and_are_chosen_whole(parts, top_k, normalized):
    shape = dict(n_experts=6, top_k=top_k, normalized_gate=normalized, expert_d_ff=48 // parts)
    cfg = upcycle.moe_config(DENSE, **shape)
    assert upcycle.granularity(cfg) == parts
    made = upcycled("groups", cfg=cfg, router_std=0.7)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(lambda s: s.shape, model.parameter_shapes(cfg))
    found = outputs(cfg, made)
    np.testing.assert_allclose(found.hidden @ made["head"], logits(DENSE, PARAMS), rtol=0, atol=1e-5)
    load = np.asarray(found.router.load_E).reshape(DENSE.n_layers, 6 // parts, parts)
    np.testing.assert_array_equal(load, np.broadcast_to(load[:, :, :1], load.shape))
    assert top_k == 6 or (load[:, :, 0].min(axis=1) < load[:, :, 0].max(axis=1)).all()
    h = jax.random.normal(jax.random.key(1), (1, 300, DENSE.d_model))
    for layer in range(DENSE.n_layers):
        weights, experts, _ = map(np.asarray, route(h @ made["layers"]["moe"]["router"][layer], top_k, normalized))
        for chosen, weight in zip(experts[0], weights[0], strict=True):
            groups, members = np.unique(chosen // parts, return_counts=True)
            assert len(groups) == top_k // parts and (members == parts).all()
            assert all(np.ptp(weight[chosen // parts == g]) < 1e-6 for g in groups)


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_groups_in_bfloat16_round_nothing_where_their_number_is_a_power_of_two(parts):
    """The sum of a group's parts is the dense FFN, of the very weights that are stored; of three parts it is not."""
    cfg = small(d_model=8, d_ff=48, n_experts=parts, top_k=parts, expert_d_ff=48 // parts)
    rng = np.random.default_rng(parts)
    shapes = {"gate": (8, 48), "up": (8, 48), "down": (48, 8)}
    dense = {name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for name, shape in shapes.items()}
    exact = {name: np.asarray(w, np.float64) for name, w in dense.items()}
    x = rng.normal(size=(20, 8))
    options, key = config.Upcycle("groups"), jax.random.key(0)
    made = [upcycle.expert(dense, None, number, 0, cfg, options, key) for number in range(parts)]
    assert {w.dtype for weights in made for w in weights.values()} == {jnp.dtype("bfloat16")}
    said = sum(one_ffn(x, *(np.asarray(w[name], np.float64) for name in FFN), silu) for w in made) / parts
    expected = one_ffn(x, *(exact[name] for name in FFN), silu)
    error = np.abs(said - expected).max() / expected.std()
    assert error < 1e-12 if parts != 3 else 1e-4 < error < 1e-1


def one_ffn(x, gate, up, down, act):
    return (act(x @ gate) * (x @ up)) @ down


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_the_published_scaling_of_all_three_matrices_is_not_exact_for_swiglu_and_ours_is(parts):
    rng = np.random.default_rng(parts)
    D, F = 8, 30
    x, gate, up, down = (rng.normal(size=shape) for shape in ((50, D), (D, F), (D, F), (F, D)))
    expected = one_ffn(x, gate, up, down, silu)
    pieces = [slice(p * F // parts, (p + 1) * F // parts) for p in range(parts)]

    def mixture(of_gate, of_up, of_down, ffn=lambda x, g, u, d: one_ffn(x, g, u, d, silu)):
        """Each part weighs 1/G of its group."""
        return sum(ffn(x, gate[:, p] * of_gate, up[:, p] * of_up, down[p] * of_down) for p in pieces) / parts

    third, half = parts ** (1 / 3), parts**0.5  # any split between up and down is as good
    assert np.abs(mixture(third, third, third) - expected).max() > 0.05 * expected.std()
    np.testing.assert_allclose(mixture(1, half, half), expected, rtol=1e-9, atol=1e-9)

    def squared(x, g, u, d):  # of two matrices, for which it was published
        return np.maximum(x @ g, 0) ** 2 @ d

    np.testing.assert_allclose(mixture(third, 1, third, squared), squared(x, gate, up, down), rtol=1e-9, atol=1e-9)

    cfg = upcycle.moe_config(small(d_model=D, d_ff=F), n_experts=2 * parts, top_k=parts, expert_d_ff=F // parts)
    dense = {"gate": jnp.float32(gate), "up": jnp.float32(up), "down": jnp.float32(down)}
    for group in range(2):
        experts = [
            upcycle.expert(dense, None, group * parts + p, 0, cfg, config.Upcycle("groups"), jax.random.key(0))
            for p in range(parts)
        ]
        said = sum(one_ffn(x, *(np.asarray(e[n], np.float64) for n in FFN), silu) for e in experts) / parts
        np.testing.assert_allclose(said, expected, rtol=1e-5, atol=1e-4)


# --- copies of eight, and of one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_experts", "top_k", "normalized"),
    [(8, 1, False), (8, 2, True), (8, 8, True), (1, 1, False)],
)
def test_any_number_of_copies_computes_what_the_dense_model_does(n_experts, top_k, normalized):
    cfg = upcycle.moe_config(
        DENSE, n_experts=n_experts, top_k=top_k, normalized_gate=normalized, gate_scale=2.5, router_bias=True
    )
    made = upcycled("copy", 0, cfg, router_std=1.0, router_init="uniform")
    made["layers"]["moe"]["bias"] = jax.random.normal(jax.random.key(0), (DENSE.n_layers, n_experts))
    np.testing.assert_allclose(logits(cfg, made), logits(DENSE, PARAMS), rtol=0, atol=1e-5)


# --- the router ---------------------------------------------------------------------------------------------------------

WIDE = upcycle.moe_config(small(d_model=101), n_experts=33)


def routers(init, std=0.3, cfg=WIDE, seed=0, layers=4):
    options = config.Upcycle(router_init=init, router_std=std)
    make = jax.vmap(lambda layer: upcycle.router(layer, cfg, options, jax.random.key(seed), jnp.float32))
    return np.asarray(make(jnp.arange(layers)))


@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("init", config.CHOICES["router_init"])
def test_a_fresh_router_has_the_distribution_asked_for(init, std):
    found = routers(init, std)
    n = found.size
    fourth = {"normal": 3.0, "uniform": 1.8}[init]
    assert abs(found.mean()) < 4.5 * std / math.sqrt(n)
    assert abs((found**2).mean() / std**2 - 1) < 4.5 * math.sqrt((fourth - 1) / n)
    assert ((found / std) ** 4).mean() == pytest.approx(fourth, rel=0.1)
    if init == "uniform":
        assert std * 3**0.5 * 0.99 < np.abs(found).max() <= std * 3**0.5 * (1 + 1e-6)
        assert found.min() < -std * 1.7 and found.max() > std * 1.7
    columns = found.transpose(0, 2, 1).reshape(-1, 101)  # of each expert and layer
    assert np.abs(np.corrcoef(columns) - np.eye(len(columns))).max() < 5.5 / math.sqrt(101)


@pytest.mark.parametrize("init", config.CHOICES["router_init"])
def test_neighbours_of_a_group_share_their_column_and_no_others(init):
    cfg = upcycle.moe_config(small(d_model=11, d_ff=12), n_experts=12, expert_d_ff=4)
    found = routers(init, cfg=cfg, layers=3).reshape(3, 11, 4, 3)
    np.testing.assert_array_equal(found, np.broadcast_to(found[..., :1], found.shape))
    columns = found[..., 0].transpose(0, 2, 1).reshape(12, 11)
    assert len({tuple(column) for column in columns}) == 12


def test_a_router_of_no_deviation_is_zero():
    np.testing.assert_array_equal(routers("normal", 0.0), 0)
