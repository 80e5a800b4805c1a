"""Balance in real train steps: coefficient and bias over many of them, accumulation, devices, restarts and failures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, model, parallel
from tanuki_jax.data import loader
from tanuki_jax.recipe import placement
from tanuki_jax.train import balance, losses
from tanuki_jax.train.optimizer import make_optimizer, make_schedule
from tanuki_jax.train.step import gradients, init_state, make_train_step, make_update
from tests import plain
from tests.tiny import QUICK, as_arrays, assert_close, packed_batch, random_params, small, with_options

# --- in a real train step -------------------------------------------------------------------------------------------------

TINY = dict(d_model=16, d_ff=8, n_heads=1, n_kv_heads=1, router_bias=True)
STEERED = small(n_layers=2, vocab_size=16, n_experts=4, top_k=1, **TINY, **QUICK)
LARGEST, XI = 0.02, 0.06


def steered():
    """Token t goes to expert t mod 4 in the first layer, and to expert 0 or 1 by its parity in the second."""
    params = random_params(STEERED)
    table = jnp.eye(16) + 0.01 * params["embed"]["table"]
    layers = params["layers"]
    layers["attn"]["o"] *= 0
    layers["moe"]["down"] *= 0
    by_four, by_two = jnp.eye(4)[jnp.arange(16) % 4], jnp.eye(4)[jnp.arange(16) % 2]
    layers["moe"]["router"] = jnp.stack([by_four, by_two])
    return {**params, "embed": {"table": table}}


def tokens_batch(choose, rows=8, length=12):
    """Rows of the tokens `choose(i)`, with some padding at the end, which counts for nothing."""
    number = np.arange(rows * length).reshape(rows, length)
    segments = np.ones((rows, length), np.int32)
    segments[:, length - 4 :] = 0
    index = np.cumsum(segments.ravel()).reshape(rows, length) - 1
    return as_arrays(
        {
            "tokens": np.where(segments > 0, choose(index), 0).astype(np.int32),
            "targets": (number % 16).astype(np.int32),
            "loss_weights": segments.astype(np.float32),
            "segment_ids": segments,
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy(),
        }
    )


EVEN, SKEWED = tokens_batch(lambda i: i % 16), tokens_batch(lambda i: 4 * (i % 4))
ADAPTIVE = config.Loss(router_aux_loss=LARGEST, router_aux_adaptive=XI, router_bias_rate=0.01)
RATE = config.Optimizer(learning_rate=1e-3, schedule="constant", clip_norm=1.0)


PROGRAMS = {}


def program(cfg, options, optimizer_options=RATE, gradient_accumulation_steps=1):
    """The compiled step of these settings, and the state it starts from, given parameters."""
    name = repr((cfg, options, optimizer_options, gradient_accumulation_steps))
    if name not in PROGRAMS:
        optimizer = make_optimizer(optimizer_options)
        rate, clip_norm = make_schedule(optimizer_options, 1000), optimizer_options.clip_norm
        update = make_update(optimizer, rate, clip_norm, balance.make_rebalance(cfg, options))
        step = make_train_step(losses.make_loss("pretrain", cfg, options), update, gradient_accumulation_steps)

        def start(params):
            return init_state(params, optimizer, jax.random.key(0), balance.init_balance(cfg, options))

        PROGRAMS[name] = step, start
    return PROGRAMS[name]


def test_the_coefficient_falls_under_an_even_load_and_rises_again_under_a_skewed_one():
    """The routers' preferences are too strong for so few steps of the bias to change a choice."""
    step, start = program(STEERED, ADAPTIVE)
    state, expected, seen = start(steered()), np.array([LARGEST, LARGEST]), []
    for batch, load in [(EVEN, [[1, 1, 1, 1], [2, 2, 0, 0]])] * 12 + [(SKEWED, [[1, 0, 0, 0], [1, 0, 0, 0]])] * 8:
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["moe/load"], np.array(load) / np.sum(load, axis=1, keepdims=True), atol=1e-6)
        np.testing.assert_allclose(metrics["moe/coefficient"], expected, rtol=1e-5)  # as this step used it
        expected = 0.99 * expected + 0.01 * np.minimum(XI * plain.overflow(load), LARGEST)
        np.testing.assert_allclose(state.balance["coefficient"], expected, rtol=1e-5)
        seen.append(np.asarray(state.balance["coefficient"]))
    first, second = np.array(seen).T
    assert (np.diff(first[:12]) < 0).all() and (np.diff(first[12:]) > 0).all()
    assert first[11] == pytest.approx(LARGEST * 0.99**12, rel=1e-5)
    np.testing.assert_allclose(second, LARGEST, rtol=1e-5)  # skewed all along: it stays at its largest
    assert int(state.step) == 20


def test_the_coefficient_is_the_one_the_losss_gradient_has():
    """Twice the coefficient, twice the auxiliary loss's part of the routers' gradients."""
    loss, params = losses.make_loss("pretrain", STEERED, ADAPTIVE), steered()
    of = jax.jit(lambda c: gradients(loss, params, SKEWED, 1, {"coefficient": c})[0]["layers"]["moe"]["router"])
    none, once, twice = (of(jnp.float32(c)) for c in ([0, 0], [0.5, 1], [1, 2]))
    assert jnp.abs(once - none).max(axis=(1, 2)).min() > 1e-4
    np.testing.assert_allclose(twice - none, 2 * (once - none), rtol=1e-3, atol=1e-6)
    ratio = jnp.abs(once - none).max(axis=(1, 2))
    assert ratio[0] != ratio[1]


def test_microbatches_change_neither_coefficient_nor_bias():
    # rows of very different loads, so that the parts of a batch have loads unlike the whole's
    uneven = tokens_batch(lambda i: np.where(i // 8 % 4 == 0, 4 * (i % 4), i % 7))
    found = {}
    for parts in (1, 4):
        step, start = program(STEERED, ADAPTIVE, gradient_accumulation_steps=parts)
        state = start(steered())
        for _ in range(3):
            state, metrics = step(state, uneven)
        found[parts] = state.balance["coefficient"], state.params["layers"]["moe"]["bias"], metrics["moe/load"]
    whole, part = found[1], found[4]
    assert float(plain.overflow(whole[2])[0]) > 0.01
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def numbers(state):
    leaves = jax.tree.leaves(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    return [np.asarray(leaf) for leaf in leaves]


def test_coefficient_and_bias_survive_a_checkpoint_to_the_last_bit_and_go_on_as_if_nothing_had_happened(tmp_path):
    step, start = program(STEERED, ADAPTIVE)
    state = start(steered())
    for batch in (EVEN, SKEWED, EVEN):
        state, _ = step(state, batch)
    before = numbers(state)
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(3, state, {"model": config.to_dict(STEERED)})
    saved.close()
    went_on = state
    for batch in (EVEN, SKEWED):
        went_on, _ = step(went_on, batch)

    mesh = parallel.make_mesh(config.Mesh(fsdp=1), jax.devices()[:1])
    abstract, _ = placement.state_shardings(STEERED, make_optimizer(RATE), mesh, ADAPTIVE)
    assert jax.tree.map(jnp.shape, abstract.balance) == {"coefficient": (2,)}
    opened = checkpoint.Checkpoints(tmp_path)
    restored = opened.restore(opened.latest(), abstract)
    bare = opened.restore(3, dataclasses.replace(abstract, balance={}))  # as where another stage takes the moments
    opened.close()
    assert jax.tree.structure(restored) == jax.tree.structure(abstract) and bare.balance == {}
    for a, b in zip(numbers(restored), before, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert len(np.unique(restored.balance["coefficient"])) == 2
    for batch in (EVEN, SKEWED):
        restored, _ = step(restored, batch)
    for a, b in zip(numbers(restored), numbers(went_on), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_eight_devices_adapt_as_one_does():
    step, start = program(STEERED, ADAPTIVE)
    alone, cfg = start(steered()), with_options(STEERED, expert_impl="auto")
    mesh = parallel.make_mesh(config.Mesh(data=2, fsdp=2, expert=2), jax.devices())
    optimizer = make_optimizer(RATE)
    abstract, shardings = placement.state_shardings(cfg, optimizer, mesh, ADAPTIVE)
    with jax.set_mesh(mesh):
        make = jax.jit(lambda p: init_state(p, optimizer, jax.random.key(0), balance.init_balance(cfg, ADAPTIVE)))
        together = jax.device_put(make(steered()), shardings)
        together_step = make_train_step(
            losses.make_loss("pretrain", cfg, ADAPTIVE),
            make_update(optimizer, make_schedule(RATE, 1000), 1.0, balance.make_rebalance(cfg, ADAPTIVE)),
            state_shardings=shardings,
        )
        for batch in (EVEN, SKEWED):
            batch = {name: np.asarray(value) for name, value in batch.items()}
            together, _ = together_step(together, loader.on_devices(batch, mesh, 8))
    for batch in (EVEN, SKEWED):
        alone, _ = step(alone, batch)
    np.testing.assert_allclose(together.balance["coefficient"], alone.balance["coefficient"], rtol=1e-6)
    np.testing.assert_allclose(together.params["layers"]["moe"]["bias"], alone.params["layers"]["moe"]["bias"], atol=1e-7)
    assert jnp.abs(alone.params["layers"]["moe"]["bias"]).max() > 0
    assert together.balance["coefficient"].sharding.is_fully_replicated
    for leaf, like in zip(jax.tree.leaves(together.params), jax.tree.leaves(abstract.params), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


# --- the bias ---------------------------------------------------------------------------------------------------------------

BIASED = small(n_layers=1, n_experts=8, **TINY, **QUICK)


def skewed(cfg, dtype=jnp.float32):
    """Router logits with a strong constant preference for two of eight experts, whatever the token."""
    params = random_params(cfg)
    table = jax.random.normal(jax.random.key(1), (96, 16)).at[:, 0].set(2.0)
    router = 0.1 * jax.random.normal(jax.random.key(2), (16, 8))
    params["layers"]["moe"]["router"] = router.at[0].set(0).at[0, jnp.array([2, 5])].set(2.0)[None]
    params["layers"]["attn"]["o"] *= 0
    bias = params["layers"]["moe"].pop("bias")
    params = jax.tree.map(lambda w: w.astype(dtype), {**params, "embed": {"table": table}})
    params["layers"]["moe"]["bias"] = bias
    return params


def with_bias(params, bias):
    layers = params["layers"]
    return {**params, "layers": {**layers, "moe": {**layers["moe"], "bias": bias}}}


def trained(cfg, rate, steps=60, dtype=jnp.float32, unbiased=False):
    """The state after so many steps, and the largest load of each; unbiased: each step begins with a bias of zero."""
    options = config.Loss(router_aux_loss=0.0, router_bias_rate=rate)
    step, start = program(cfg, options, config.Optimizer(learning_rate=1e-5, schedule="constant"))
    state, batch, skew = start(skewed(cfg, dtype)), as_arrays(packed_batch(np.random.default_rng(0), cfg)), []
    for _ in range(steps):
        if unbiased:
            state = dataclasses.replace(state, params=with_bias(state.params, jnp.zeros((1, 8))))
        state, metrics = step(state, batch)
        skew.append(float(metrics["moe/load_max"][0]))
    return state, skew


@pytest.mark.parametrize("normalized", [True, False])
def test_the_bias_evens_out_a_load_that_is_skewed_without_it(normalized):
    cfg = dataclasses.replace(BIASED, normalized_gate=normalized)
    state, evened = trained(cfg, 0.02, steps=120)  # at the end the load swings about 1 by what a step of the bias moves
    _, left_alone = trained(cfg, 0.02, unbiased=True)
    assert min(left_alone) > 3
    assert evened[0] == left_alone[0] > 3
    assert max(evened[-10:]) <= 1.5, evened
    bias = np.asarray(state.params["layers"]["moe"]["bias"][0])
    assert abs(bias.mean()) < 1e-5  # of the order of as many roundings
    assert set(np.argsort(bias)[:2]) == {2, 5}


def test_a_bias_neither_decays_nor_learns_and_has_no_moments():
    cfg = dataclasses.replace(BIASED, normalized_gate=False)
    options = config.Loss(router_aux_loss=0.5, router_z_loss=0.1, router_bias_rate=0.0)
    step, start = program(cfg, options, config.Optimizer(learning_rate=0.1, weight_decay=0.5, schedule="constant"))
    params = skewed(cfg)
    drawn = jax.random.normal(jax.random.key(3), (1, 8))
    params["layers"]["moe"]["bias"] = jnp.copy(drawn)
    router, state = np.asarray(params["layers"]["moe"]["router"]), start(params)
    batch = as_arrays(packed_batch(np.random.default_rng(0), cfg))
    for _ in range(3):
        state, _ = step(state, batch)
    np.testing.assert_array_equal(state.params["layers"]["moe"]["bias"], drawn)
    assert np.abs(state.params["layers"]["moe"]["router"] - router).max() > 0.1
    for moments in (state.opt_state[0].mu, state.opt_state[0].nu):
        np.testing.assert_array_equal(moments["layers"]["moe"]["bias"], 0)


def test_a_bias_stays_float32_among_bfloat16_parameters_and_takes_small_steps():
    cfg = dataclasses.replace(BIASED, param_dtype="bfloat16")
    shapes = model.parameter_shapes(cfg)
    dtypes = {path[-1].key: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert dtypes.pop("bias") == jnp.float32
    assert {dtype for name, dtype in dtypes.items() if not name.startswith("norm")} == {jnp.dtype("bfloat16")}
    rate, steps = 1e-3, 5
    state, _ = trained(cfg, rate, steps, dtype=jnp.bfloat16)
    bias = state.params["layers"]["moe"]["bias"]
    assert bias.dtype == jnp.float32 and state.params["layers"]["moe"]["router"].dtype == jnp.bfloat16
    # the same two are above the mean all along: each step is -1, and +1 for the other six, less the mean of 1/2
    expected = np.full(8, 0.5)
    expected[[2, 5]] = -1.5
    np.testing.assert_allclose(bias[0], rate * steps * expected, rtol=1e-4)


def test_a_bias_that_leaves_the_choice_as_it_is_changes_nothing():
    cfg = dataclasses.replace(BIASED, normalized_gate=False)
    batch = as_arrays(packed_batch(np.random.default_rng(0), cfg))
    loss = losses.make_loss("pretrain", cfg, config.Loss(router_z_loss=0.1, router_aux_loss=0.1))
    value = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, {}, None)[0]))
    params = skewed(cfg)
    moved = jax.tree.map(jnp.copy, params)
    moved["layers"]["moe"]["bias"] = jnp.full((1, 8), -1.0).at[0, jnp.array([2, 5])].set(4.0)  # the choice there is anyway
    chosen = jax.jit(model.apply, static_argnums=0)(cfg, params, batch).router.load_E
    assert set(np.flatnonzero(np.asarray(chosen[0]))) == {2, 5}
    (a, of_a), (b, of_b) = value(params), value(moved)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    assert_close(of_b, of_a, 1e-5)


# --- steps that fail --------------------------------------------------------------------------------------------------------


@functools.cache
def poisoned():
    """A step whose batch says what its loss is multiplied by, and what of the head is added to it without being reported."""
    honest = losses.make_loss("pretrain", STEERED, ADAPTIVE)

    def loss(params, batch, given, key):
        factor, addend = batch["factor"], batch["addend"]
        total, weight, metrics = honest(params, {n: batch[n] for n in SKEWED}, given, key)
        total = total + addend * (params["head"] ** 2).sum()
        return total, weight, metrics | {"loss": (metrics["loss"][0] * factor, weight)}

    optimizer = make_optimizer(RATE)
    step = make_train_step(loss, make_update(optimizer, make_schedule(RATE, 9), 1.0, balance.make_rebalance(STEERED, ADAPTIVE)))

    def start():
        return init_state(steered(), optimizer, jax.random.key(0), balance.init_balance(STEERED, ADAPTIVE))

    return start, step


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_neither_bias_nor_coefficient(where, poison):
    start, step = poisoned()
    honest = {"factor": jnp.float32(1), "addend": jnp.float32(0)}
    state, _ = step(start(), EVEN | honest)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state, state.balance))
    state, metrics = step(state, SKEWED | honest | {"factor" if where == "loss" else "addend": jnp.float32(poison)})
    assert not np.isfinite(metrics["loss"] if where == "loss" else metrics["grad_norm"])
    assert np.isfinite(metrics["grad_norm"] if where == "loss" else metrics["loss"])
    assert int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state, state.balance), before)
    assert np.isfinite(metrics["moe/load"]).all()
    state, _ = step(state, SKEWED | honest)  # and the next good one moves both again
    assert (np.asarray(state.balance["coefficient"]) != before[2]["coefficient"]).any()
    assert (np.asarray(state.params["layers"]["moe"]["bias"]) != before[0]["layers"]["moe"]["bias"]).any()
