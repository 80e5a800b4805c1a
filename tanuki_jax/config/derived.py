"""What follows from a recipe: the model of a stage, its steps, its sources."""

from __future__ import annotations

import dataclasses

from tanuki_jax.config.kinds import STAGE_KINDS
from tanuki_jax.config.schema import Model, ModelConfig, Recipe, Stage


def is_moe(recipe: Recipe, name: str) -> bool:
    """Whether stage `name` ends as a mixture of experts."""
    stage = recipe.stages[name]
    if STAGE_KINDS[stage.kind].makes_moe or stage.moe:
        return True
    return stage.init_from in recipe.stages and is_moe(recipe, stage.init_from)


def rope_theta(recipe: Recipe, name: str) -> float:
    """RoPE base of a stage: its own, else that of the stage that it starts from, else the model's."""
    stage = recipe.stages[name]
    if stage.rope_theta:
        return stage.rope_theta
    return rope_theta(recipe, stage.init_from) if stage.init_from in recipe.stages else recipe.model.rope_theta


def model_config(recipe: Recipe, name: str) -> ModelConfig:
    """The model that stage `name` ends with: dense or mixture, with the stage's RoPE base."""
    architecture = {f.name: getattr(recipe.model, f.name) for f in dataclasses.fields(Model)}
    architecture["n_experts"] = recipe.model.n_experts if is_moe(recipe, name) else 0
    architecture["rope_theta"] = rope_theta(recipe, name)
    return ModelConfig(**architecture, compute=recipe.compute)


def moe_layers(model: Model) -> tuple[int, ...]:
    """The layers whose FFN is a mixture, in order; none of a dense model."""
    first = model.first_dense + model.moe_every - 1
    return tuple(range(first, model.n_layers, model.moe_every)) if model.n_experts else ()


def stage_steps(stage: Stage) -> int:
    """Steps of a stage whose budget is in steps or tokens; 0 where epochs leave it open."""
    return stage.steps or stage.tokens // tokens_per_step(stage)


def tokens_per_step(stage: Stage) -> int:
    """B*S."""
    return stage.seq_len * stage.batch_size


def stage_sources(stage: Stage) -> tuple[str, ...]:
    """The names of the sources that a stage reads, in the order of their numbers."""
    return tuple(name for name, weights in stage.mixture.items() if any(weights))
