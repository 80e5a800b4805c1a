"""The step gives the same loss and gradients on any mesh and with any accumulation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, parallel
from tanuki_jax.data import loader
from tanuki_jax.train import losses
from tanuki_jax.train.optimizer import make_optimizer, make_schedule
from tanuki_jax.train.step import gradients, init_state, make_train_step, make_update
from tests.tiny import init, packed_batch, problem, small

LOSS = config.Loss(z_loss=1e-3, router_z_loss=1e-3)
# The first layer of "both" is dense, the second a mixture.
MODELS = {"dense": small(), "mixture": small(n_experts=4), "both": small(n_experts=4, first_dense=1)}


@functools.cache
def compiled(kind, name, gradient_accumulation_steps):
    loss = losses.make_loss(kind, MODELS[name], LOSS)
    return jax.jit(lambda params, batch: gradients(loss, params, batch, gradient_accumulation_steps))


@functools.cache
def expected(kind, name):
    cfg = MODELS[name]
    batch = {n: jnp.asarray(v) for n, v in problem(kind, cfg).items()}
    return jax.tree.map(np.asarray, compiled(kind, name, 1)(init(cfg, jax.random.key(0)), batch))


def close(found, wanted):
    """Relative to the largest gradient of each parameter, 1e-5."""
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (found, wanted)), strict=True):
        scale = np.abs(b).max() + 1e-12
        assert np.abs(np.asarray(a) - b).max() / scale < 1e-5, (
            jax.tree_util.keystr(path),
            np.abs(np.asarray(a) - b).max() / scale,
        )


MESHES = {
    "fsdp 2": dict(fsdp=2),
    "data 2": dict(data=2),
    "expert 2": dict(expert=2),
    "context 2": dict(context=2),
    "tensor 2": dict(tensor=2),
    "data 2 x fsdp 2": dict(data=2, fsdp=2),
    "slices 2 x context 2": dict(slices=2, context=2),
    "data 2 x fsdp 2 x tensor 2": dict(data=2, fsdp=2, tensor=2),
    "fsdp 4 x expert 2": dict(fsdp=4, expert=2),
    "fsdp 2 x expert 4": dict(fsdp=2, expert=4),
    "fsdp 2 x context 4": dict(fsdp=2, context=4),
    "data 2 x expert 2 x tensor 2": dict(data=2, expert=2, tensor=2),
    "expert 2 x context 2 x tensor 2": dict(expert=2, context=2, tensor=2),
}
CASES = [  # mesh, gradient_accumulation_steps, kind of stage, model
    ("one device", 4, "pretrain", "dense"),
    ("one device", 4, "dpo", "both"),
    ("fsdp 2", 1, "pretrain", "dense"),
    ("slices 2 x context 2", 1, "sft", "both"),
    ("expert 2 x context 2 x tensor 2", 1, "sft", "both"),
    ("fsdp 2 x context 4", 2, "sft", "both"),
    ("data 2 x expert 2 x tensor 2", 2, "dpo", "both"),
    *(
        pytest.param(mesh, parts, kind, name, marks=pytest.mark.slow)
        for mesh, parts, kind, name in (
            ("one device", 4, "pretrain", "mixture"),
            ("data 2", 1, "dpo", "both"),
            ("one device", 4, "sft", "both"),
            ("expert 2", 1, "sft", "both"),
            ("tensor 2", 1, "sft", "both"),
            ("context 2", 1, "dpo", "both"),
            ("fsdp 2", 1, "sft", "both"),
            ("fsdp 2", 1, "dpo", "mixture"),
            ("data 2 x fsdp 2", 1, "dpo", "both"),
            ("fsdp 4 x expert 2", 1, "sft", "both"),
            ("fsdp 2 x expert 4", 1, "dpo", "both"),
            ("fsdp 2 x context 4", 1, "dpo", "both"),
            ("data 2 x fsdp 2 x tensor 2", 1, "dpo", "both"),
            ("data 2 x expert 2 x tensor 2", 1, "pretrain", "mixture"),
        )
    ),
]


@pytest.mark.parametrize(("mesh", "gradient_accumulation_steps", "kind", "name"), CASES)
def test_loss_and_gradients_are_those_of_one_device(mesh, gradient_accumulation_steps, kind, name):
    cfg, sizes = MODELS[name], MESHES.get(mesh, {})
    mesh = parallel.make_mesh(config.Mesh(**{"fsdp": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])
    params = jax.device_put(init(cfg, jax.random.key(0)), checkpoint.parameter_shardings(cfg, mesh))
    with jax.set_mesh(mesh):
        batch = loader.on_devices(problem(kind, cfg), mesh, 8)
        grads, metrics = compiled(kind, name, gradient_accumulation_steps)(params, batch)
    wanted_grads, wanted = expected(kind, name)
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-5)
    close(grads, wanted_grads)
    for key in wanted:
        np.testing.assert_allclose(metrics[key], wanted[key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_a_step_that_is_not_finite_keeps_the_parameters():
    cfg = small()
    optimizer = make_optimizer(config.Optimizer())

    def loss(params, batch, balance, key):
        total, weight, metrics = losses.next_token(cfg, config.Loss())(params, batch, balance, key)
        poison = jnp.where(batch["tokens"].sum() > 0, 1.0, jnp.nan)
        return total * poison, weight, metrics

    step = make_train_step(loss, make_update(optimizer, make_schedule(config.Optimizer(), 10), 1.0))
    state = init_state(init(cfg, jax.random.key(0)), optimizer, jax.random.key(0))
    good = {n: jnp.asarray(v) for n, v in packed_batch(np.random.default_rng(0), cfg).items()}
    state, metrics = step(state, good)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    state, metrics = step(state, {**good, "tokens": good["tokens"] * 0})
    assert not np.isfinite(metrics["grad_norm"]) and state.step == 2
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
