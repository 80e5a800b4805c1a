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
from tanuki_jax.train.optimizer import make_optimizer
from tests.tiny import apply, init, packed_batch, small

DENSE, E = small(), 4
BATCH = {name: jnp.asarray(value) for name, value in packed_batch(np.random.default_rng(0), DENSE, rows=2).items()}
PARAMS = init(DENSE, jax.random.key(0))
FFN = ("gate", "up", "down")


def mixture(top_k=2, normalized=True, n_experts=E):
    return upcycle.mixture_of(DENSE, n_experts=n_experts, top_k=top_k, normalized_gate=normalized)


def upcycled(strategy="copy", seed=0, cfg=None, **options):
    return upcycle.upcycle(PARAMS, cfg or mixture(), config.Upcycle(strategy, **options), jax.random.key(seed))


def logits(cfg, params):
    return apply(cfg, params, BATCH).hidden @ params["head"]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("top_k", range(1, E + 1))
def test_a_copy_computes_what_the_dense_model_does_whatever_its_router_says(top_k, normalized):
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


STRATEGIES = {"copy": {}, "noise": {}, "drop": {"drop_ratio": 0.4}, "groups": {}}


@functools.cache
def upcycled_on(strategy, several=False, **sizes):
    """As a stage does it: compiled, from parameters that are split over the mesh to such parameters."""
    cfg = upcycle.mixture_of(DENSE, n_experts=E, router_bias=True, expert_d_ff=24 if strategy == "groups" else 0)
    mesh = parallel.make_mesh(config.Mesh(**{"fsdp": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])
    options = config.Upcycle(strategy, **STRATEGIES[strategy])
    convert = jax.jit(
        lambda trees, k: upcycle.upcycle(trees[0], cfg, options, k, trees[1:]),
        out_shardings=checkpoint.parameter_shardings(cfg, mesh),
    )
    trees = [PARAMS, init(DENSE, jax.random.key(1))][: 1 + several]
    return convert(jax.device_put(trees, [checkpoint.parameter_shardings(DENSE, mesh)] * len(trees)), jax.random.key(0))


MESHES = {"fsdp": dict(fsdp=8), "data": dict(data=2, fsdp=4), "three axes": dict(fsdp=2, expert=2, tensor=2)}


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("strategy", ["copy", "noise", "groups"])
def test_a_mesh_changes_no_bit(strategy, sizes):
    split, whole = upcycled_on(strategy, **MESHES[sizes]), upcycled_on(strategy)
    assert len(split["layers"]["moe"]["gate"].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, split, whole)


@pytest.mark.parametrize("sizes", MESHES)
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
    dense = config.Model(param_dtype=dtype)
    cfg = upcycle.mixture_of(dense, n_experts=8)
    made = jax.eval_shape(lambda p: upcycle.upcycle(p, cfg, config.Upcycle(), jax.random.key(0)), model.parameter_shapes(dense))
    assert jax.tree.map(lambda s: (s.shape, s.dtype), made) == jax.tree.map(
        lambda s: (s.shape, s.dtype), model.parameter_shapes(cfg)
    )
    assert sum(math.prod(s.shape) for s in jax.tree.leaves(made)) == 46_973_325_312


def test_a_mixture_cannot_be_upcycled_again():
    with pytest.raises(UserError, match="mixture already"):
        upcycle.mixture_of(mixture(), n_experts=8)
    with pytest.raises(UserError, match="mixture already"):
        upcycle.upcycle(upcycled(), mixture(), config.Upcycle(), jax.random.key(0))


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 5), (4, 0), (0, 1)])
def test_top_k_lies_between_one_and_the_experts(n_experts, top_k):
    with pytest.raises(UserError, match=f"top_k {top_k} must lie between 1 and n_experts {n_experts}"):
        upcycle.mixture_of(DENSE, n_experts=n_experts, top_k=top_k)


# --- each strategy against numpy, one layer and one expert at a time, on sizes that divide by nothing -------------------

ODD = small(n_layers=3, d_model=7, d_ff=15, vocab_size=19, n_heads=1, n_kv_heads=1, head_dim=6)
CENTRE, SPREAD = {"gate": 1.0, "up": -3.0, "down": 10.0}, {"gate": 2.0, "up": 0.5, "down": 0.01}


def drawn(cfg=ODD, seed=0, dtype=None):
    """A dense tree of random numbers, no two matrices of one mean and deviation."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name = path[-1].key
        return jnp.asarray(rng.normal(CENTRE.get(name, 0), SPREAD.get(name, 1), shape.shape), dtype or shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, model.parameter_shapes(cfg))


convert = jax.jit(upcycle.upcycle, static_argnums=(1, 2))


def made_of(dense, strategy, n_experts=5, seed=0, others=(), shape=None, source=ODD, **options):
    cfg = upcycle.mixture_of(source, n_experts=n_experts, **shape or {})
    return convert(dense, cfg, config.Upcycle(strategy, **options), jax.random.key(seed), tuple(others))


def draw_key(seed, layer, number):
    key = jax.random.key(seed)
    for part in (1, layer, number):
        key = jax.random.fold_in(key, part)
    return key


def numpy_noise(weights, number, key, std):
    keys = jax.random.split(key, 3)
    return {n: w + std * np.asarray(jax.random.normal(k, w.shape)) for (n, w), k in zip(weights.items(), keys, strict=True)}


def numpy_drop(weights, number, key, ratio):
    D, F = weights["gate"].shape
    keys = jax.random.split(key, 4)
    dimensions = np.asarray(jax.random.permutation(keys[0], F))[: math.floor(ratio * F)]
    made = {}
    for (name, w), k in zip(weights.items(), keys[1:], strict=True):
        made[name], normal = w.copy(), np.asarray(jax.random.normal(k, w.shape), np.float64)
        places = [(f, d) if name == "down" else (d, f) for f in dimensions for d in range(D)]
        if not places:
            continue
        lost = [float(w[place]) for place in places]
        mean = sum(lost) / len(lost)
        std = math.sqrt(sum((x - mean) ** 2 for x in lost) / (len(lost) - 1))
        for place in places:
            made[name][place] = mean + std * normal[place]
    return made


def numpy_groups(weights, number, parts):
    width = weights["gate"].shape[1] // parts
    of_part = slice(number % parts * width, (number % parts + 1) * width)
    return {
        "gate": weights["gate"][:, of_part],
        "up": weights["up"][:, of_part] * parts**0.5,
        "down": weights["down"][of_part] * parts**0.5,
    }


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
    n_experts, dense = (15 if shape else 5), drawn()
    made = made_of(dense, case.split()[0], n_experts, seed=4, shape=shape, **options)["layers"]["moe"]
    for layer, number in itertools.product(range(ODD.n_layers), range(n_experts)):
        weights = {name: np.asarray(dense["layers"]["mlp"][name][layer]) for name in FFN}
        wanted = expected(weights, number, draw_key(4, layer, number))
        for name in FFN:
            np.testing.assert_allclose(made[name][layer, number], wanted[name], rtol=2e-6, atol=2e-6)


# --- drop -------------------------------------------------------------------------------------------------------------


def redrawn(made, dense):
    """[L, E, F] of each matrix: whether all of a dimension changed; a dimension that changed in part is an error."""
    found = {}
    for name in FFN:
        differs = np.asarray(made[name]) != np.asarray(dense["layers"]["mlp"][name])[:, None]
        whole, any_of_it = (f(differs, axis=3 if name == "down" else 2) for f in (np.all, np.any))
        np.testing.assert_array_equal(whole, any_of_it)
        found[name] = whole
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
    source = small(n_layers=1, d_model=3, d_ff=100, vocab_size=7, n_heads=1, n_kv_heads=1, head_dim=2)
    dense = drawn(source)
    made = made_of(dense, "drop", 2, source=source, drop_ratio=0.29)["layers"]["moe"]
    np.testing.assert_array_equal(redrawn(made, dense)["gate"].sum(axis=2), 29)


def test_every_dimension_is_as_likely_to_be_redrawn_and_no_two_go_together():
    weights = {name: w[0] for name, w in drawn()["layers"]["mlp"].items()}
    cfg, options, key = upcycle.mixture_of(ODD, n_experts=2), config.Upcycle("drop", drop_ratio=0.5), jax.random.key(0)
    experts = jax.jit(jax.vmap(lambda n: upcycle.expert(weights, n, 0, cfg, options, key)["gate"]))(jnp.arange(600))
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


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("parts", "top_k"), [(2, 2), (2, 4), (3, 3), (3, 6)])
def test_groups_compute_what_the_dense_model_does_and_are_chosen_whole(parts, top_k, normalized):
    shape = dict(n_experts=6, top_k=top_k, normalized_gate=normalized, expert_d_ff=48 // parts)
    cfg = upcycle.mixture_of(DENSE, **shape)
    assert upcycle.granularity(cfg) == parts
    made = upcycled("groups", cfg=cfg, router_std=0.7)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(lambda s: s.shape, model.parameter_shapes(cfg))
    found = apply(cfg, made, BATCH)
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

    third, half = parts ** (1 / 3), parts**0.5
    assert np.abs(mixture(third, third, third) - expected).max() > 0.05 * expected.std()
    np.testing.assert_allclose(mixture(1, half, half), expected, rtol=1e-9, atol=1e-9)

    def squared(x, g, u, d):  # of two matrices, for which it was published
        return np.maximum(x @ g, 0) ** 2 @ d

    np.testing.assert_allclose(mixture(third, 1, third, squared), squared(x, gate, up, down), rtol=1e-9, atol=1e-9)

    cfg = upcycle.mixture_of(small(d_model=D, d_ff=F), n_experts=2 * parts, top_k=parts, expert_d_ff=F // parts)
    dense = {"gate": jnp.float32(gate), "up": jnp.float32(up), "down": jnp.float32(down)}
    for group in range(2):
        experts = [
            upcycle.expert(dense, group * parts + p, 0, cfg, config.Upcycle("groups"), jax.random.key(0)) for p in range(parts)
        ]
        said = sum(one_ffn(x, *(np.asarray(e[n], np.float64) for n in FFN), silu) for e in experts) / parts
        np.testing.assert_allclose(said, expected, rtol=1e-5, atol=1e-4)


# --- copies of eight, and of one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_experts", "top_k", "normalized"),
    [*((8, top_k, normalized) for top_k in (1, 2, 8) for normalized in (True, False)), (1, 1, False)],
)
def test_any_number_of_copies_computes_what_the_dense_model_does(n_experts, top_k, normalized):
    cfg = upcycle.mixture_of(
        DENSE, n_experts=n_experts, top_k=top_k, normalized_gate=normalized, gate_scale=2.5, router_bias=True
    )
    made = upcycled("copy", 0, cfg, router_std=1.0, router_init="uniform")
    made["layers"]["moe"]["bias"] = jax.random.normal(jax.random.key(0), (DENSE.n_layers, n_experts))
    np.testing.assert_allclose(logits(cfg, made), logits(DENSE, PARAMS), rtol=0, atol=1e-5)


# --- the router ---------------------------------------------------------------------------------------------------------

WIDE = upcycle.mixture_of(small(d_model=101), n_experts=33)


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
    cfg = upcycle.mixture_of(small(d_model=11, d_ff=12), n_experts=12, expert_d_ff=4)
    found = routers(init, cfg=cfg, layers=3).reshape(3, 11, 4, 3)
    np.testing.assert_array_equal(found, np.broadcast_to(found[..., :1], found.shape))
    columns = found[..., 0].transpose(0, 2, 1).reshape(12, 11)
    assert len({tuple(column) for column in columns}) == 12


def test_a_router_of_no_deviation_is_zero():
    np.testing.assert_array_equal(routers("normal", 0.0), 0)


# --- layers of two kinds ------------------------------------------------------------------------------------------------

SEVEN = small(n_layers=7, d_model=6, d_ff=9, vocab_size=11, n_heads=1, n_kv_heads=1, head_dim=4)
MIXTURES = {  # (first_dense, moe_every): the layers that become mixtures, counted by hand
    (0, 1): [0, 1, 2, 3, 4, 5, 6],
    (2, 1): [2, 3, 4, 5, 6],
    (6, 1): [6],
    (0, 2): [1, 3, 5],
    (1, 2): [2, 4, 6],
    (1, 3): [3, 6],
    (3, 4): [6],
}


@pytest.mark.parametrize(
    ("first", "every", "strategy"),
    [*((*layers, "copy") for layers in MIXTURES), *((1, 2, s) for s in STRATEGIES if s != "copy"), (3, 4, "groups")],
)
def test_the_layers_asked_for_become_mixtures_and_the_others_keep_every_bit(first, every, strategy):
    dense, chosen = drawn(SEVEN), MIXTURES[first, every]
    shape = dict(first_dense=first, moe_every=every, expert_d_ff=3 if strategy == "groups" else 0)
    cfg = upcycle.mixture_of(SEVEN, n_experts=3, **shape)
    left = [layer for layer in range(7) if layer not in chosen]
    assert upcycle.dense_layers(cfg) == left
    made = convert(dense, cfg, config.Upcycle(strategy), jax.random.key(0))
    shapes = model.parameter_shapes(cfg)
    assert jax.tree.map(lambda p: (p.shape, p.dtype), made) == jax.tree.map(lambda s: (s.shape, s.dtype), shapes)
    assert ("mlp" in made["layers"]) == bool(left)
    for name in FFN:
        for at, layer in enumerate(left):
            np.testing.assert_array_equal(made["layers"]["mlp"][name][at], dense["layers"]["mlp"][name][layer])
        for at, layer in enumerate(chosen):  # whatever was done to it, it came from this layer
            of_layers = dense["layers"]["mlp"][name]
            if strategy == "groups":
                of_layers = np.stack(
                    [numpy_groups({n: dense["layers"]["mlp"][n][i] for n in FFN}, 1, 3)[name] for i in range(7)]
                )
            off = [float(np.abs(made["layers"]["moe"][name][at, 1] - of_layers[i]).mean()) for i in range(7)]
            assert int(np.argmin(off)) == layer


@pytest.mark.parametrize("strategy", ["noise", "drop"])
def test_what_is_drawn_belongs_to_a_layer_and_an_expert_whatever_others_there_are(strategy):
    dense = drawn(SEVEN)
    few, many = (
        made_of(dense, strategy, n, shape=dict(first_dense=first, moe_every=every), source=SEVEN)["layers"]["moe"]
        for n, first, every in ((2, 0, 2), (5, 3, 1))
    )
    for name in FFN:  # layers 1, 3, 5 and 3, 4, 5, 6
        np.testing.assert_allclose(few[name][1:], many[name][[0, 2], :2], rtol=1e-6)
        assert np.abs(few[name][0] - many[name][0, :2]).max() > 1e-4


@pytest.mark.parametrize(("first", "every"), [(1, 1), (0, 2)])
def test_copies_in_some_layers_compute_what_the_dense_model_does(first, every):
    shape = dict(n_experts=3, first_dense=first, moe_every=every)
    dense = small(n_layers=3)
    cfg, params = upcycle.mixture_of(dense, **shape), init(dense, jax.random.key(5))
    made = convert(params, cfg, config.Upcycle("copy", router_std=1.0), jax.random.key(0))
    np.testing.assert_allclose(logits(cfg, made), logits(dense, params), rtol=0, atol=1e-5)


# --- several dense models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_experts_come_from_the_models_in_turn_and_the_rest_is_their_mean(count):
    trees = [drawn(SEVEN, seed) for seed in range(count)]
    made = made_of(trees[0], "copy", 5, others=trees[1:], shape=dict(first_dense=1, moe_every=2), source=SEVEN)
    for name in FFN:
        for at, layer in enumerate([2, 4, 6]):
            for e in range(5):
                expected = trees[e % count]["layers"]["mlp"][name][layer]
                np.testing.assert_array_equal(made["layers"]["moe"][name][at, e], expected)
        for at, layer in enumerate([0, 1, 3, 5]):
            mean = np.mean([np.asarray(tree["layers"]["mlp"][name][layer], np.float64) for tree in trees], axis=0)
            np.testing.assert_allclose(made["layers"]["mlp"][name][at], mean, rtol=1e-6, atol=1e-6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(made):
        keys = [part.key for part in path]
        if "moe" not in keys and "mlp" not in keys:
            of_each = [functools.reduce(lambda t, k: t[k], keys, tree) for tree in trees]
            np.testing.assert_allclose(leaf, np.mean(np.float64(of_each), axis=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("strategy", "options"), [("noise", {"noise_std": 1e-4}), ("drop", {"drop_ratio": 0.2})])
def test_every_strategy_starts_from_the_experts_own_model(strategy, options):
    trees = [drawn(ODD, seed) for seed in range(2)]
    made = made_of(trees[0], strategy, 5, others=trees[1:], **options)["layers"]["moe"]
    for name, e in itertools.product(FFN, range(5)):
        off = [np.median(np.abs(made[name][:, e] - tree["layers"]["mlp"][name])) for tree in trees]
        assert off[e % 2] <= 1e-4 and off[1 - e % 2] > 1e-3


def test_one_model_several_times_is_that_model():
    dense = drawn()
    one, thrice = (made_of(dense, "noise", others=[dense] * n) for n in (0, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, thrice)


def test_the_mean_of_low_precision_models_is_rounded_once():
    trees = [drawn(ODD, seed, jnp.bfloat16) for seed in range(3)]
    made = made_of(trees[0], "copy", 3, others=trees[1:])
    heads = [np.asarray(tree["head"].astype(jnp.float32), np.float64) for tree in trees]
    np.testing.assert_array_equal(made["head"], jnp.asarray(np.float32(np.mean(heads, axis=0)), jnp.bfloat16))


@pytest.mark.parametrize("first", ["bfloat16", "float32"])
def test_the_mixture_has_the_dtype_of_the_first_model(first):
    other = {"bfloat16": "float32", "float32": "bfloat16"}[first]
    made = made_of(drawn(ODD, 0, first), "copy", 4, others=[drawn(ODD, 1, other)])
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(made)} == {first}


# --- low precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bfloat16_parameters_stay_bfloat16_and_are_rounded_once(strategy):
    shape = dict(expert_d_ff=5 if strategy == "groups" else 0, router_bias=True)
    low = drawn(dtype=jnp.bfloat16)
    high = jax.tree.map(lambda w: w.astype(jnp.float32), low)
    found, expected = (made_of(tree, strategy, 6, shape=shape) for tree in (low, high))
    assert (
        found["layers"]["moe"].pop("bias").dtype == jnp.float32 and expected["layers"]["moe"].pop("bias").dtype == jnp.float32
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


# --- what cannot be -----------------------------------------------------------------------------------------------------


def refused(make, *words):
    with pytest.raises(UserError) as error:
        make()
    found = str(error.value)
    assert "\n" not in found and found.startswith("upcycle: ") and all(word in found for word in words), found


SHAPES = {
    "FFN width": (dict(expert_d_ff=4), "groups", ["d_ff 15", "expert_d_ff 4", "split evenly"]),
    "an expert wider than the FFN": (dict(expert_d_ff=30), "groups", ["d_ff 15", "expert_d_ff 30"]),
    "experts and parts": (dict(expert_d_ff=5, n_experts=8), "groups", ["n_experts 8", "3 parts"]),
    **{
        f"{strategy} of another width": (dict(expert_d_ff=5, n_experts=6), strategy, ["expert_d_ff 5", "d_ff 15", "groups"])
        for strategy in ("copy", "noise", "drop")
    },
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_shape_that_cannot_be_is_named(case):
    shape, strategy, words = SHAPES[case]
    n_experts = shape.get("n_experts", 6)
    refused(lambda: made_of(drawn(), strategy, n_experts, shape={k: v for k, v in shape.items() if k != "n_experts"}), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(noise_std=-1e-3), ["noise_std is -0.001", "not negative"]),
        (dict(router_std=-1.0), ["router_std is -1.0", "not negative"]),
        (dict(drop_ratio=1.5), ["drop_ratio 1.5", "between 0 and 1"]),
        (dict(drop_ratio=-0.1), ["drop_ratio -0.1", "between 0 and 1"]),
        (dict(drop_ratio=float("nan")), ["drop_ratio nan"]),
        (dict(noise_std=float("nan")), ["noise_std is nan"]),
        (dict(router_std=float("inf")), ["router_std is inf"]),
    ],
)
def test_an_option_that_cannot_be_is_named(options, words):
    refused(lambda: made_of(drawn(), "noise", **options), *words)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (dict(n_experts=4, top_k=5), ["top_k 5", "n_experts 4"]),
        (dict(n_experts=1, top_k=1), ["normalised gate", "two experts", "plain gate"]),
        (dict(n_experts=4, first_dense=3), ["first_dense 3", "no mixture", "3 layers"]),
        (dict(n_experts=4, first_dense=1, moe_every=3), ["moe_every 3", "no mixture"]),
        (dict(n_experts=4, first_dense=-1), ["first_dense is -1"]),
        (dict(n_experts=4, moe_every=0), ["moe_every is 0"]),
        (dict(n_experts=4, moe_every=-2), ["moe_every is -2"]),
        (dict(n_experts=4, gate_scale=0.0), ["gate_scale"]),
        (dict(n_experts=4, gate_scale=-1.0), ["gate_scale"]),
        (dict(n_experts=6, expert_d_ff=-5), ["expert_d_ff"]),
    ],
)
def test_a_mixture_that_cannot_be_is_named(shape, words):
    strategy = "groups" if "expert_d_ff" in shape else "copy"
    refused(lambda: upcycle.check(upcycle.mixture_of(ODD, **shape), config.Upcycle(strategy)), *words)


def test_models_of_other_shapes_are_one_message():
    other = drawn(small(n_layers=3, d_model=7, d_ff=16, vocab_size=19, n_heads=1, n_kv_heads=1, head_dim=6))
    refused(lambda: made_of(drawn(), "copy", others=[drawn(ODD, 1), other]), "experts_from", "other shapes")
    lacking = drawn(ODD, 1)
    del lacking["head"]
    refused(lambda: made_of(drawn(), "copy", others=[lacking]), "experts_from")


@pytest.mark.parametrize("first_dense", [0, 1])
def test_a_mixture_is_refused_as_any_of_the_models_where_only_some_layers_are_one_too(first_dense):
    mixture_tree = made_of(drawn(), "copy", shape=dict(first_dense=first_dense))
    refused(lambda: made_of(mixture_tree, "copy", shape=dict(first_dense=2)), "mixture already")
    refused(lambda: made_of(drawn(), "copy", others=[mixture_tree]), "mixture already")


# --- the optimizer's state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "every", "moments"), [(0, 1, "float32"), (2, 1, "float32"), (1, 3, "float32"), (1, 3, "bfloat16")]
)
def test_moments_of_what_survives_are_carried_to_the_last_bit_and_the_rest_starts_from_zero(first, every, moments):
    optimizer = make_optimizer(config.Optimizer(moment_dtype=moments))
    cfg = upcycle.mixture_of(SEVEN, n_experts=3, first_dense=first, moe_every=every, router_bias=True)
    rng = np.random.default_rng(0)
    zeros = optimizer.init(drawn(SEVEN))
    dense = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) if a.ndim else 17, a.dtype), zeros)
    made = convert(drawn(SEVEN), cfg, config.Upcycle(), jax.random.key(0))
    fresh = optimizer.init(made)
    found = jax.jit(lambda f, d: upcycle.carry_moments(f, d, cfg))(fresh, dense)
    directions, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, made), found, made)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), directions) == jax.tree.map(lambda a: (a.shape, jnp.float32), made)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(lambda a: (a.shape, a.dtype), fresh)
    assert found[0].count == 17
    left = [layer for layer in range(7) if layer not in MIXTURES[first, every]]
    for of_found, of_dense in ((found[0].mu, dense[0].mu), (found[0].nu, dense[0].nu)):
        for leaf in jax.tree.leaves(of_found["layers"].pop("moe")):
            np.testing.assert_array_equal(leaf, 0)
        old = dict(of_dense["layers"].pop("mlp"))
        if left:
            for name in FFN:
                np.testing.assert_array_equal(of_found["layers"]["mlp"][name], np.asarray(old[name])[left])
            del of_found["layers"]["mlp"]
        jax.tree.map(np.testing.assert_array_equal, of_found, of_dense)
