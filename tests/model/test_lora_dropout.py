"""Dropout of the inputs of adapters: what is drawn, when, and that nothing else changes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, model, parallel
from tanuki_jax.data import loader
from tanuki_jax.model import layers
from tanuki_jax.model.layers import Matrix, project
from tanuki_jax.train import losses
from tanuki_jax.train.optimizer import make_optimizer, make_schedule
from tanuki_jax.train.step import gradients, init_state, make_train_step, make_update
from tests.model.test_lora import MODELS, adapted, assert_close, batch_of, everything
from tests.tiny import apply, packed_batch, small, with_options

CFG, DENSE = small(), MODELS["dense"]


class Projection(nn.Module):
    """A single matrix."""

    @nn.compact
    def __call__(self, x, rate=None):
        return project(self, CFG, x, Matrix("q", "DNH"), None if rate is None else jnp.float32(rate))


def identity(D):
    """An adapter that is the identity, beside a matrix of zeros."""
    adapter = {"a": jnp.eye(D), "b": jnp.eye(D).reshape(D, 4, 8), "scale": jnp.float32(1)}
    return {"params": {"q": jnp.zeros((D, 4, 8))}, "lora": {"q": adapter}}


def dropped(x, rate, keys):
    """What is left of x for each key."""
    run = jax.vmap(lambda key: Projection().apply(identity(x.shape[-1]), x, rate, rngs={"dropout": key}))
    return np.asarray(run(keys)).reshape(len(keys), *x.shape)


def test_an_input_is_dropped_or_grows_by_what_was_dropped():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)
    found = dropped(x, 0.3, jax.random.split(jax.random.key(0), 500))
    left = found != 0
    np.testing.assert_allclose(found, np.where(left, x / 0.7, 0), rtol=1e-5)
    assert left.mean() == pytest.approx(0.7, abs=0.005)
    shares = left.mean(axis=0)  # every input alike, whatever its row, its place and its channel
    assert np.abs(shares - 0.7).max() < 5 * (0.3 * 0.7 / 500) ** 0.5
    np.testing.assert_allclose(found.mean(axis=0), x, atol=5 * 3.5 * (0.3 / 0.7 / 500) ** 0.5)
    pairs = (left[:, :-1] == left[:, 1:]).mean()  # two rows of a batch have nothing to do with each other
    assert pairs == pytest.approx(0.7**2 + 0.3**2, abs=0.01)
    halves = (left[..., :16] == left[..., 16:]).mean()  # nor have two channels that come from one random word
    assert halves == pytest.approx(0.7**2 + 0.3**2, abs=0.01)


def test_what_dropout_leaves_is_made_before_the_products_that_read_it():
    """A compiler that may draw it inside them does so once for every block: on TPUs that doubled the time to compile."""

    def program(*rate, **rngs):
        return jax.jit(lambda x: Projection().apply(identity(32), x, *rate, rngs=rngs)).lower(jnp.ones((2, 5, 32))).as_text()

    assert "optimization_barrier" in program(0.1, dropout=jax.random.key(0))
    assert "optimization_barrier" not in program()


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.999])
@pytest.mark.parametrize("width", [1, 7])
def test_what_is_kept_has_the_shape_asked_for_and_its_share(width, rate):
    kept = np.asarray(layers.dropout_mask(jax.random.key(0), jnp.float32(rate), (1000, 50, width)))
    assert kept.shape == (1000, 50, width) and kept.dtype == bool
    assert abs(kept.mean() - (1 - rate)) <= 5 * (rate * (1 - rate) / kept.size) ** 0.5 + 2**-17


def test_the_base_is_not_dropped():
    """Only what goes through A is: with B = 0 nothing changes."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(32, 4, 8)), jnp.float32)
    adapter = {"a": jnp.ones((32, 2)), "b": jnp.zeros((2, 4, 8)), "scale": jnp.float32(1)}
    found = Projection().apply({"params": {"q": w}, "lora": {"q": adapter}}, x, 0.5, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(found, Projection().apply({"params": {"q": w}}, x))


dropping = jax.jit(lambda params, batch, rate, key: model.apply(DENSE, params, batch, model.Dropout(rate, key)).hidden)


def test_a_rate_of_nothing_changes_nothing_and_a_rate_does():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)
    np.testing.assert_array_equal(dropped(x, 0.0, jax.random.split(jax.random.key(0), 3)), np.stack([x] * 3))
    params, batch = everything("dense"), batch_of(DENSE)
    without = apply(DENSE, params, batch).hidden
    np.testing.assert_allclose(dropping(params, batch, 0.0, jax.random.key(0)), without, rtol=1e-5, atol=1e-5)
    one, same, other = (dropping(params, batch, 0.2, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - without).max() > 0.1 and np.abs(one - other).max() > 0.1
    base = adapted("dense")[0]  # without adapters there is nothing to drop
    np.testing.assert_array_equal(dropping(base, batch, 0.2, jax.random.key(0)), apply(DENSE, base, batch).hidden)


def test_small_adapters_are_on_average_as_if_nothing_were_dropped():
    base, trained, scales = adapted("dense")
    scales = jax.tree.map(lambda s: s * 1e-3, scales)  # so small that the model is linear in them
    params, batch = {**base, **trained, **scales}, batch_of(DENSE)
    plain, without = (apply(DENSE, p, batch).hidden for p in (params, base))
    keys = jax.random.split(jax.random.key(0), 200)
    mean = sum(np.asarray(dropping(params, batch, 0.4, key), np.float64) for key in keys) / len(keys)
    effect = np.linalg.norm(plain - without)
    assert np.linalg.norm(mean - plain) < 0.15 * effect
    assert np.linalg.norm(dropping(params, batch, 0.4, keys[0]) - plain) > 0.3 * effect


def test_every_layer_and_every_matrix_has_a_draw_of_its_own(monkeypatch):
    drawn, draw = [], layers.dropout_mask

    def noted(kept):
        drawn.append(np.asarray(kept))
        return kept

    def watched(*arguments):
        kept = draw(*arguments)
        return jax.pure_callback(noted, jax.ShapeDtypeStruct(kept.shape, kept.dtype), kept)

    monkeypatch.setattr(layers, "dropout_mask", watched)
    batch = batch_of(DENSE)
    jax.block_until_ready(
        jax.jit(lambda p: model.apply(DENSE, p, batch, model.Dropout(0.5, jax.random.key(0))))(everything("dense"))
    )
    assert len(drawn) == DENSE.n_layers * 7  # q, k, v, o, gate, up, down
    wide = [kept for kept in drawn if kept.shape == (2, 24, 32)]
    assert len(wide) == DENSE.n_layers * 5
    for i, one in enumerate(wide):
        for other in wide[:i]:
            assert (one == other).mean() == pytest.approx(0.5, abs=0.06)


@functools.cache
def grads_of(**changes):
    cfg = with_options(DENSE, **changes)
    made = losses.make_loss("pretrain", cfg, config.Loss(), dropout=0.3)
    return jax.jit(lambda t, f, batch, key: gradients(made, t, batch, 1, None, f, key))


@pytest.mark.slow
def test_what_is_computed_again_is_drawn_alike():
    base, trained, scales = adapted("dense")
    arguments = trained, {**base, **scales}, batch_of(DENSE, 8), jax.random.key(3)  # as on one device below
    (expected, wanted), (found, metrics) = (grads(*arguments) for grads in (grads_of(remat="full"), grads_of(scan_unroll=2)))
    assert_close(found, expected)
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-6)


@pytest.mark.parametrize(
    "sizes", [pytest.param(dict(data=2, fsdp=4), marks=pytest.mark.slow), dict(fsdp=2, context=2, tensor=2)]
)
def test_devices_draw_what_one_device_draws(sizes):
    base, trained, scales = adapted("dense")
    expected, wanted = grads_of(remat="full")(trained, {**base, **scales}, batch_of(DENSE, 8), jax.random.key(3))
    mesh = parallel.make_mesh(config.Mesh(**{"fsdp": 1, **sizes}))
    frozen = jax.device_put(base, checkpoint.parameter_shardings(DENSE, mesh))
    frozen |= jax.device_put(scales, checkpoint.replicated(mesh))
    with jax.set_mesh(mesh):
        batch = loader.on_devices(packed_batch(np.random.default_rng(0), DENSE, 8), mesh, 8)
        key = jax.device_put(jax.random.key(3), checkpoint.replicated(mesh))
        found, metrics = grads_of(remat="full")(jax.device_put(trained, checkpoint.replicated(mesh)), frozen, batch, key)
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-5)
    assert_close(found, jax.device_get(expected), 2e-5)


def test_steps_and_microbatches_draw_anew():
    """The same rows twice in a batch, and the same batch in two steps, without learning: other losses."""
    base, trained, scales = adapted("dense")
    made = losses.make_loss("pretrain", DENSE, config.Loss(), dropout=0.3)
    options = config.Optimizer(learning_rate=0.0, weight_decay=0.0)
    optimizer = make_optimizer(options)
    update = make_update(optimizer, make_schedule(options, 9))
    step = make_train_step(made, update, gradient_accumulation_steps=2, stochastic=True)
    fresh = lambda: jax.tree.map(jnp.copy, init_state(trained, optimizer, jax.random.key(5), frozen={**base, **scales}))  # noqa: E731
    one = batch_of(DENSE, 1)
    twice = {name: jnp.concatenate([rows, rows]) for name, rows in one.items()}
    only = {**twice, "loss_weights": twice["loss_weights"].at[1].set(0)}  # what the first microbatch alone makes of them
    (state, first), (_, half) = step(fresh(), twice), step(fresh(), only)
    assert abs(first["loss"] - half["loss"]) > 1e-3
    again, second = step(state, twice)
    assert abs(first["loss"] - second["loss"]) > 1e-3 and int(again.step) == 2
