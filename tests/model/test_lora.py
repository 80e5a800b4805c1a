"""Adapters against their definition: W + scale * A B, matrix by matrix."""

import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, model, parallel
from tanuki_jax.data import loader
from tanuki_jax.model import lora
from tanuki_jax.train import losses
from tanuki_jax.train.step import gradients
from tests import plain
from tests.tiny import QUICK, apply, packed_batch, prompt_scores, random_params, small, with_options

# Inputs and outputs of all matrices differ, so that none can be taken for another.
SHAPE = dict(n_heads=6, n_kv_heads=2, head_dim=4, d_ff=40)
MODELS = {
    "dense": small(**SHAPE),
    "mixture": small(n_experts=4, **SHAPE),
    # All experts of a mixture in the middle: nothing jumps, so differences are gradients.
    "mixed": small(n_layers=3, n_experts=3, moe_every=2, top_k=3, expert_d_ff=12, normalized_gate=False, **SHAPE, **QUICK),
}
EVERY = dict(rank=3, alpha=6.0, targets={"*": 0, "attn/o": 5, "mlp/*": 2, "mlp/up": 0, "moe/*": 2, "moe/router": 1})
ATTENTION = ("layers/attn/k", "layers/attn/o", "layers/attn/q", "layers/attn/v")
# Ranks that EVERY gives, by hand: the last pattern that fits counts, and 0 stands for `rank`.
MLP = {"layers/mlp/down": 2, "layers/mlp/gate": 2, "layers/mlp/up": 3}
MOE = {"layers/moe/down": 2, "layers/moe/gate": 2, "layers/moe/router": 1, "layers/moe/up": 2}
RANKS = {"dense": MLP, "mixture": MOE, "mixed": MLP | MOE}
RANKS = {name: dict.fromkeys(ATTENTION, 3) | {"layers/attn/o": 5} | more for name, more in RANKS.items()}
# Of the axes of an adapter's A, those that number the matrices.
LEADING = {"layers/moe/gate": 2, "layers/moe/up": 2, "layers/moe/down": 2}


@functools.cache
def adapted(name, **changes):
    """A base, adapters that do something, and their scales, another one in each layer."""
    cfg = MODELS[name]
    base = random_params(cfg)
    trained, scales = lora.init_adapters(cfg, config.Lora(**{**EVERY, **changes}), jax.random.key(1))
    rng = np.random.default_rng(2)
    trained = jax.tree.map(lambda w: w + jnp.float32(rng.normal(size=w.shape) * 0.2), trained)
    scales = jax.tree.map(lambda s: s * (1 + jnp.arange(len(s)) / 4), scales)
    return base, trained, scales


merge = jax.jit(lora.merge)


def everything(name):
    base, trained, scales = adapted(name)
    return {**base, **trained, **scales}


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def added_by_hand(params):
    """Every matrix of every layer and expert with its A B, in a loop, in float64."""
    found = flat(params)
    result = {path: w for path, w in found.items() if not path.startswith("lora")}
    for path in [p.removeprefix("lora_scale/") for p in found if p.startswith("lora_scale/")]:
        a, b, scale = found[f"lora/{path}/a"], found[f"lora/{path}/b"], found[f"lora_scale/{path}"]
        w = result[path].astype(np.float64)
        for at in np.ndindex(*a.shape[: LEADING.get(path, 1)]):
            matrix = a[at].reshape(-1, a.shape[-1]).astype(np.float64)
            w[at] += float(scale[at[0]]) * (matrix @ b[at].reshape(a.shape[-1], -1)).reshape(w[at].shape)
        result[path] = w.astype(np.float32)
    return flax.traverse_util.unflatten_dict({tuple(p.split("/")): w for p, w in result.items()})


def batch_of(cfg, rows=2):
    return {name: jnp.asarray(value) for name, value in packed_batch(np.random.default_rng(0), cfg, rows).items()}


def assert_close(found, expected, limit=1e-5):
    """Relative to the largest value of each leaf."""
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for path, wanted in expected.items():
        assert found[path].shape == wanted.shape, path
        assert np.abs(found[path] - wanted).max() <= limit * np.abs(wanted).max() + 1e-12, path


def assert_equal(found, expected):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for path, wanted in expected.items():
        np.testing.assert_array_equal(found[path], wanted, err_msg=path)


# --- which matrices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_ranks_by_pattern(name):
    assert lora.ranks(MODELS[name], config.Lora(**EVERY)) == RANKS[name]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({}, dict.fromkeys(ATTENTION, 4)),
        ({"attn/q": 0}, {"layers/attn/q": 4}),
        ({"attn/q": 7, "attn/*": 0}, dict.fromkeys(ATTENTION, 4) | {"layers/attn/q": 7}),
        ({"attn/*": 0, "attn/q": 7}, dict.fromkeys(ATTENTION, 4) | {"layers/attn/q": 7}),
        ({"*/up": 1, "attn/[kv]": 2}, {"layers/attn/k": 2, "layers/attn/v": 2, "layers/moe/up": 1}),
    ],
)
def test_the_pattern_that_fits_the_fewest_matrices_counts(targets, expected):
    assert lora.ranks(MODELS["mixture"], config.Lora(rank=4, targets=targets)) == expected


def test_nothing_but_matrices_of_layers_can_have_one():
    cfg = small(n_experts=4, router_bias=True, moe_every=2)
    found = lora.ranks(cfg, config.Lora(rank=1, targets={"*": 0, "**": 0, "layers/*": 0}))
    assert {path.removeprefix("layers/") for path in found} == set(lora.SPLITS)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_axes_and_scales_belong_to_the_adapters(name):
    cfg, options = MODELS[name], config.Lora(**EVERY)
    trained, scales = lora.init_adapters(cfg, options, jax.random.key(0))
    shapes, (axes, scale_axes) = lora.adapter_shapes(cfg, RANKS[name]), lora.adapter_axes(cfg, RANKS[name])
    found = flax.traverse_util.flatten_dict(axes["lora"], sep="/")
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(lambda w: (w.shape, w.dtype), trained)
    assert {w.dtype for w in jax.tree.leaves((trained, scales))} == {jnp.dtype("float32")}
    named = {path: (axes, shape) for path, axes, shape in model.named_parameters(cfg)}
    for path, rank in RANKS[name].items():
        letters, shape = named[path]
        sizes = {**dict(zip(letters, shape, strict=True)), "r": rank}
        a, b = found[f"{path}/a"], found[f"{path}/b"]
        # Side by side, without r and what numbers the matrices, both have the axes of the matrix.
        leading = LEADING.get(path, 1)
        assert "".join(a[:-1] + b[leading + 1 :]) == letters and a[-1] == b[leading] == "r" and a[:leading] == b[:leading]
        for side, letters_of_side in (("a", a), ("b", b)):
            assert flat(trained["lora"])[f"{path}/{side}"].shape == tuple(sizes[x] for x in letters_of_side)
        assert flat(scales["lora_scale"])[path].shape == shape[:1]
    assert flax.traverse_util.flatten_dict(scale_axes["lora_scale"], sep="/") == dict.fromkeys(RANKS[name], ("L",))
    assert {target.path: target.rank for target in lora.targets(cfg, RANKS[name])} == RANKS[name]


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_are_alpha_over_the_rank_or_its_root(rslora):
    options = config.Lora(**EVERY, rslora=rslora)
    scales = lora.scales(MODELS["mixed"], options)
    assert scales.keys() == RANKS["mixed"].keys()
    for path, rank in RANKS["mixed"].items():
        layers = {"attn": 3, "mlp": 2, "moe": 1}[path.split("/")[1]]
        assert scales[path] == pytest.approx([6.0 / (math.sqrt(rank) if rslora else rank)] * layers)
    tree = lora.scale_tree(scales)
    assert_equal(lora.init_adapters(MODELS["mixed"], options, jax.random.key(0))[1], tree)


def test_fresh_adapters_are_pefts():
    """kaiming_uniform with a = sqrt(5), which is uniform within 1 / sqrt(inputs), and zeros."""
    options = config.Lora(rank=24, targets={"*": 0})
    drawn, again = (
        flat(lora.init_adapters(MODELS["mixed"], options, jax.random.key(seed))[0]["lora"]["layers"]) for seed in (0, 1)
    )
    firsts = []
    for path, w in drawn.items():
        if path.endswith("/b"):
            assert not w.any()
            continue
        bound = {"attn/o/a": 24, "mlp/down/a": 40, "moe/down/a": 12}.get(path, 32) ** -0.5
        assert 0.98 * bound < np.abs(w).max() <= bound, path
        assert np.abs(w).mean() == pytest.approx(bound / 2, rel=0.05) and abs(w.mean()) < bound / 20
        assert (w != again[path]).mean() > 0.99
        matrices = w.reshape(-1, round(bound**-2), 24)
        firsts += [(m[0, :4] / bound).round(5).tobytes() for m in matrices]
    assert len(firsts) == len(set(firsts)) == 4 * 3 + 3 * 2 + 3 * 3 + 1  # of each matrix, layer and expert its own


# --- what they compute ----------------------------------------------------------------------------------------------


MIXED = [*(pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "mixture")), "mixed"]  # which has both's layers


@pytest.mark.parametrize("name", MIXED)
def test_fresh_adapters_change_no_bit(name):
    cfg = MODELS[name]
    base, batch = random_params(cfg), batch_of(cfg)
    trained, scales = lora.init_adapters(cfg, config.Lora(**EVERY), jax.random.key(1))
    found, expected = apply(cfg, {**base, **trained, **scales}, batch), apply(cfg, base, batch)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert_equal(merge({**base, **trained, **scales}), base)
    assert lora.merge(base).keys() == base.keys()


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_has_its_own_product_added(name):
    merged = merge(everything(name))
    expected = added_by_hand(everything(name))
    assert_close(merged, expected, 1e-6)
    base = flat(adapted(name)[0])
    changed = {path for path, w in flat(merged).items() if (w != base[path]).any()}
    assert changed == set(RANKS[name])


@pytest.mark.parametrize("name", [pytest.param("dense", marks=pytest.mark.slow), "mixture", "mixed"])
def test_beside_the_matrices_they_compute_what_they_do_inside(name):
    cfg, batch = MODELS[name], batch_of(MODELS[name])
    found = apply(cfg, everything(name), batch)
    byhand = added_by_hand(everything(name))
    expected = apply(cfg, jax.tree.map(jnp.asarray, byhand), batch)
    assert_close({"h": found.hidden}, {"h": expected.hidden})
    slow, _ = jax.jit(plain.forward, static_argnums=0)(cfg, byhand, batch)
    real = (batch["segment_ids"] > 0)[..., None]
    assert_close({"h": found.hidden * real}, {"h": slow * real})
    without = apply(cfg, adapted(name)[0], batch).hidden
    assert np.abs(found.hidden - without).max() > 0.5  # it is no comparison of models without adapters
    if cfg.n_experts:
        assert_close({"z": found.router.z_B}, {"z": expected.router.z_B})


@pytest.mark.parametrize("target", ["mlp/down", "moe/router"])
def test_a_single_target_is_enough(target):
    """Others have no branch; in layers of the other kind there is nothing at all."""
    cfg = MODELS["mixed"]
    base, trained, scales = adapted("mixed")
    only = {"lora": one_branch(trained["lora"], target), "lora_scale": one_branch(scales["lora_scale"], target)}
    params = {**base, **only}
    assert_close(
        {"h": apply(cfg, params, batch_of(cfg)).hidden}, {"h": apply(cfg, added_by_hand(params), batch_of(cfg)).hidden}
    )


def one_branch(tree, target):
    kind, name = target.split("/")
    return {"layers": {kind: {name: tree["layers"][kind][name]}}}


@pytest.mark.parametrize("target", ["everything", "attn/v", "mlp/up", "moe/down", "moe/router"])
def test_decoding_uses_them_too(target):
    """In layers of either kind, beside the others or as the only one."""
    cfg, params = MODELS["mixed"], everything("mixed")
    if target != "everything":
        base, trained, scales = adapted("mixed")
        params = {**base, "lora": one_branch(trained["lora"], target), "lora_scale": one_branch(scales["lora_scale"], target)}
    tokens = np.random.default_rng(0).integers(1, 96, (2, 6))
    found = prompt_scores(cfg, model.slots.unstack(cfg, params), tokens)
    expected = prompt_scores(cfg, model.slots.unstack(cfg, added_by_hand(params)), tokens)
    assert_close({"scores": found.logprobs}, {"scores": expected.logprobs})


def test_flops_are_four_per_frozen_weight_plus_attention():
    cfg, S = small(n_experts=4), 64
    L, D, N, K, H, F, E, V = 2, 32, 4, 2, 8, 48, 4, 96
    weights = L * (2 * D * N * H + 2 * D * K * H + 2 * 3 * D * F + D * E + 2 * D) + D + D * V
    assert model.flops_per_token(cfg, S, frozen=True) == 4 * weights + 6 * L * N * H * S


# --- a base of another dtype ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_frozen_base_is_cast_once_and_computes_the_same():
    cfg = with_options(MODELS["mixture"], dtype="bfloat16")
    base, trained, scales = adapted("mixture")
    below = jax.jit(lora.frozen_params, static_argnums=0)(cfg, base)
    exact = {"layers/moe/router", "layers/norm_attn", "layers/norm_mlp", "norm_final"}
    assert {path for path, w in flat(below).items() if w.dtype == np.float32} == exact
    assert_equal({p: w for p, w in flat(below).items() if p in exact}, {p: w for p, w in flat(base).items() if p in exact})
    batch = batch_of(cfg)
    jax.tree.map(np.testing.assert_array_equal, apply(cfg, below, batch), apply(cfg, base, batch))
    attention = {name: {"layers": {"attn": part[name]["layers"]["attn"]}} for part in (trained, scales) for name in part}
    found, expected = (apply(cfg, {**b, **attention}, batch) for b in (below, base))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    merged = flat(lora.merge({**below, **trained, **scales}))
    assert {path: w.dtype for path, w in merged.items()} == {path: w.dtype for path, w in flat(below).items()}
    summed = flat(added_by_hand({**jax.tree.map(lambda w: w.astype(jnp.float32), below), **trained, **scales}))
    for path in RANKS["mixture"]:  # added in float32, rounded once
        assert np.abs(merged[path].astype(np.float32) - summed[path]).max() <= 2**-8 * np.abs(summed[path]).max(), path


@pytest.mark.slow
def test_float32_adapters_learn_over_a_bfloat16_base():
    base, trained, scales = adapted("dense")
    low, high = with_options(MODELS["dense"], dtype="bfloat16"), MODELS["dense"]
    found, exact = (grads_of(cfg)(trained, {**lora.frozen_params(cfg, base), **scales}, batch_of(cfg)) for cfg in (low, high))
    assert {w.dtype for w in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    for path, wanted in flat(exact).items():
        cosine = (flat(found)[path] * wanted).sum() / np.linalg.norm(flat(found)[path]) / np.linalg.norm(wanted)
        assert cosine > 0.9, (path, cosine)


# --- gradients ------------------------------------------------------------------------------------------------------


@functools.cache
def loss_of(cfg, kind="pretrain", **options):
    made = losses.make_loss(kind, cfg, config.Loss(router_z_loss=1e-2, **options))
    return lambda trained, frozen, batch: made({**frozen, **trained}, batch, {}, None)[0] / batch["loss_weights"].sum()


@functools.cache
def grads_of(cfg):
    return jax.jit(jax.grad(loss_of(cfg)))


@pytest.mark.parametrize("name", MIXED)
def test_gradients_are_those_through_the_merged_weights(name):
    cfg = MODELS[name]
    base, trained, scales = adapted(name)
    found = grads_of(cfg)(trained, {**base, **scales}, batch_of(cfg))
    merged = lambda t, frozen, batch: loss_of(cfg)(lora.merge({**frozen, **t}), {}, batch)  # noqa: E731
    expected = jax.jit(jax.grad(merged))(trained, {**base, **scales}, batch_of(cfg))
    assert_close(found, expected, 3e-5)
    assert all(np.abs(g).max() > 1e-6 for g in flat(found).values())


@pytest.mark.parametrize("name", [pytest.param("dense", marks=pytest.mark.slow), "mixed"])
def test_gradients_are_those_of_finite_differences(name):
    cfg = MODELS[name]
    base, trained, scales = adapted(name)
    frozen, batch, step = {**base, **scales}, batch_of(cfg), 1e-3
    value, found = jax.jit(loss_of(cfg)), flat(grads_of(cfg)(trained, frozen, batch))
    rng = np.random.default_rng(4)
    for path, gradient in found.items():
        along = gradient / np.linalg.norm(gradient) + rng.normal(size=gradient.shape) / math.sqrt(gradient.size)
        moved = [{**flat(trained), path: flat(trained)[path] + sign * np.float32(step * along)} for sign in (1, -1)]
        high, low = (
            float(value(flax.traverse_util.unflatten_dict({tuple(p.split("/")): w for p, w in m.items()}), frozen, batch))
            for m in moved
        )
        assert (high - low) / (2 * step) == pytest.approx((gradient * along).sum(), rel=0.02, abs=1e-3), path


# --- on many devices ------------------------------------------------------------------------------------------------

MESHES = [
    pytest.param("dense", dict(data=2, fsdp=2, tensor=2), 2, marks=pytest.mark.slow),  # test_lora_dropout.py has these two
    pytest.param("dense", dict(fsdp=2, context=4), 1, marks=pytest.mark.slow),
    ("mixture", dict(fsdp=2, expert=2, tensor=2), 1),
    pytest.param("mixed", dict(data=2, context=4), 2, marks=pytest.mark.slow),
]


@functools.cache
def step_of(name, gradient_accumulation_steps):
    loss = losses.make_loss("pretrain", MODELS[name], config.Loss(router_z_loss=1e-2))
    return jax.jit(lambda t, f, batch: gradients(loss, t, batch, gradient_accumulation_steps, None, f))


@functools.cache
def on_one_device(name):
    base, trained, scales = adapted(name)
    return jax.device_get(step_of(name, 1)(trained, {**base, **scales}, batch_of(MODELS[name], 8)))


@pytest.mark.parametrize(("name", "sizes", "gradient_accumulation_steps"), MESHES)
def test_loss_and_gradients_are_those_of_one_device(name, sizes, gradient_accumulation_steps):
    cfg, mesh = MODELS[name], parallel.make_mesh(config.Mesh(**{"fsdp": 1, **sizes}))
    base, trained, scales = adapted(name)
    axes, shapes = lora.adapter_axes(cfg, RANKS[name])[0], lora.adapter_shapes(cfg, RANKS[name])
    trained = jax.device_put(trained, parallel.tree_shardings(mesh, axes, shapes))
    frozen = jax.device_put(base, checkpoint.parameter_shardings(cfg, mesh))
    frozen |= jax.device_put(scales, checkpoint.replicated(mesh))
    with jax.set_mesh(mesh):
        batch = loader.on_devices(packed_batch(np.random.default_rng(0), cfg, 8), mesh, 8)
        grads, metrics = step_of(name, gradient_accumulation_steps)(trained, frozen, batch)
    expected, wanted = on_one_device(name)
    assert jax.tree.structure(grads) == jax.tree.structure(trained)  # what is frozen has none
    assert_close(grads, expected, 2e-5)
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-5)


def test_large_adapters_are_split_over_the_devices():
    mesh, cfg = parallel.make_mesh(config.Mesh(fsdp=8)), MODELS["mixture"]
    shapes = lora.adapter_shapes(cfg, RANKS["mixture"])
    stored = parallel.tree_shardings(mesh, lora.adapter_axes(cfg, RANKS["mixture"])[0], shapes)
    share = {path: np.prod(s.shard_shape(shape.shape)) / np.prod(shape.shape) for path, (shape, s) in _pairs(shapes, stored)}
    assert share["lora/layers/attn/q/a"] == share["lora/layers/moe/down/b"] == 1 / 8  # along D


def _pairs(*trees):
    flattened = [flax.traverse_util.flatten_dict(tree, sep="/") for tree in trees]
    return [(path, [tree[path] for tree in flattened]) for path in flattened[0]]
