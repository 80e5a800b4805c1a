"""Which layers become mixtures, of how many models, in which dtype; and what cannot be."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import config, model, upcycle
from tanuki_jax.errors import UserError
from tanuki_jax.train.optimizer import make_optimizer
from tests.tiny import random_params, small
from tests.upcycle.trees import (
    FFN,
    ODD,
    STRATEGIES,
    convert,
    drawn,
    logits,
    made_of,
    numpy_groups,
)

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
SLOW = ((2, 1), (6, 1))  # the others too have dense layers first, and the last layer alone


@pytest.mark.parametrize(
    ("first", "every", "strategy"),
    [
        *((*layers, "copy") for layers in MIXTURES if layers not in SLOW),
        *((1, 2, s) for s in STRATEGIES if s != "copy"),
        *(pytest.param(*layers, "copy", marks=pytest.mark.slow) for layers in SLOW),
    ],
)
def test_the_layers_asked_for_become_mixtures_and_the_others_keep_every_bit(first, every, strategy):
    dense, chosen = drawn(SEVEN), MIXTURES[first, every]
    shape = dict(first_dense=first, moe_every=every, expert_d_ff=3 if strategy == "groups" else 0)
    cfg = upcycle.moe_config(SEVEN, n_experts=3, **shape)
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


@pytest.mark.parametrize(("first", "every"), [(0, 2)])
def test_copies_in_some_layers_compute_what_the_dense_model_does(first, every):
    shape = dict(n_experts=3, first_dense=first, moe_every=every)
    dense = small(n_layers=3)
    cfg, params = upcycle.moe_config(dense, **shape), random_params(dense, 5)
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
    refused(lambda: upcycle.check(upcycle.moe_config(ODD, **shape), config.Upcycle(strategy)), *words)


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
    ("first", "every", "moments"),
    [(0, 1, "float32"), pytest.param(2, 1, "float32", marks=pytest.mark.slow), (1, 3, "float32"), (1, 3, "bfloat16")],
)
def test_moments_of_what_survives_are_carried_to_the_last_bit_and_the_rest_starts_from_zero(first, every, moments):
    optimizer = make_optimizer(config.Optimizer(moment_dtype=moments))
    cfg = upcycle.moe_config(SEVEN, n_experts=3, first_dense=first, moe_every=every, router_bias=True)
    rng = np.random.default_rng(0)
    zeros = optimizer.init(drawn(SEVEN))
    dense = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) if a.ndim else 17, a.dtype), zeros)
    made = convert(drawn(SEVEN), cfg, config.Upcycle(), jax.random.key(0))
    fresh = optimizer.init(made)
    found = jax.jit(lambda f, d: upcycle.carry_moments(f, d, cfg))(fresh, dense)
    directions, _ = jax.eval_shape(optimizer.update, made, found, made)
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
