"""What a stage runs, compiled from its options: the train step with its loss, optimizer, schedule and shardings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tanuki_jax import config, parallel
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.config.schema import Recipe
from tanuki_jax.recipe import placement
from tanuki_jax.train import balance, losses
from tanuki_jax.train.contract import Params
from tanuki_jax.train.optimizer import make_optimizer, make_schedule
from tanuki_jax.train.step import State, TrainStep, make_train_step, make_update


class StageProgram(NamedTuple):
    """A stage's train step; nothing is allocated."""

    train_step: TrainStep  # jitted, the state donated
    optimizer: optax.GradientTransformation
    abstract_state: State  # shapes with shardings
    shardings: State


def make_program(recipe: Recipe, stage: str, steps: int, mesh: jax.sharding.Mesh) -> StageProgram:
    """The program of a stage of so many steps."""
    options, cfg = recipe.stages[stage], config.model_config(recipe, stage)
    kind, optimizer = STAGE_KINDS[options.kind], make_optimizer(options.optimizer)
    abstract, shardings = placement.state_shardings(cfg, optimizer, mesh, options.loss, options.lora)
    train_step = make_train_step(
        losses.make_loss(options.kind, cfg, options.loss, config.stage_sources(options), options.lora.dropout),
        make_update(
            optimizer,
            make_schedule(options.optimizer, steps),
            options.optimizer.clip_norm,
            balance.make_rebalance(cfg, options.loss),
        ),
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        weight_name=kind.weight,
        stochastic=options.lora.rank > 0 and options.lora.dropout > 0,
        state_shardings=shardings,
        compiler_options=parallel.compiler_options(mesh),
    )
    return StageProgram(train_step, optimizer, abstract, shardings)


class UpdateProgram(NamedTuple):
    """The part of a stage's step after its gradients, which comes once however many microbatches there are."""

    update: Callable[[State, Params, jax.Array], tuple[State, dict[str, jax.Array]]]  # jitted
    abstract_state: State
    gradients: Params  # shapes with shardings, float32
    loss: jax.ShapeDtypeStruct


def make_update_program(recipe: Recipe, stage: str, steps: int, mesh: jax.sharding.Mesh) -> UpdateProgram:
    """The update of a stage alone: norm, clipping and the optimizer."""
    options, cfg = recipe.stages[stage], config.model_config(recipe, stage)
    optimizer = make_optimizer(options.optimizer)
    abstract, shardings = placement.state_shardings(cfg, optimizer, mesh, options.loss, options.lora)
    update = make_update(optimizer, make_schedule(options.optimizer, steps), options.optimizer.clip_norm)
    jitted = jax.jit(
        lambda state, grads, loss: update(state, grads, {"loss": loss}),
        donate_argnums=(0, 1),
        out_shardings=(shardings, None),
        compiler_options=parallel.compiler_options(mesh),
    )
    grads = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=s.sharding), abstract.params)
    return UpdateProgram(jitted, abstract, grads, jax.ShapeDtypeStruct((), jnp.float32))
