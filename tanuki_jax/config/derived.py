"""What follows from a recipe: the model of a stage, its steps, its sources."""

from __future__ import annotations

import dataclasses
import graphlib
from collections.abc import Iterable, Iterator
from typing import Any

from tanuki_jax.config.kinds import STAGE_KINDS
from tanuki_jax.config.schema import Model, ModelConfig, Recipe, Stage
from tanuki_jax.config.synthesis import SYNTH_PREFIX, Synth
from tanuki_jax.errors import UserError


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


def settings(group: Any) -> dict[str, Any]:
    """The keys of a group that decide about data or weights: those that may not differ when a run goes on."""
    return {f.name: getattr(group, f.name) for f in dataclasses.fields(group) if not f.metadata["resumable"]}


# --- rows that models make --------------------------------------------------------------------------------------------


def made_seeds(synth: Synth) -> list[str]:
    """The names in `synth` of the rows that are seeds of others."""
    return [files.removeprefix(SYNTH_PREFIX) for files in synth.seeds.values() if files.startswith(SYNTH_PREFIX)]


def making_order(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """Names in `synth` and those of their seeds, each after its seeds; a UserError where rows would be their own seeds."""
    graph: dict[str, list[str]] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        if name not in graph:
            graph[name] = made_seeds(recipe.synth[name])
            waiting += graph[name]
    try:
        return list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise UserError(
            f"config: synth.{circle}: {error.args[1][0]} would be made from itself; name other rows as seeds"
        ) from None


def made_sources(recipe: Recipe, stage: str) -> Iterator[str]:
    """The names in `synth` of the rows that a stage reads or makes, and of those that their making reads."""
    options = recipe.stages[stage]
    files = [recipe.data[source].files for source in stage_sources(options) if source in recipe.data]
    waiting = [name.removeprefix(SYNTH_PREFIX) for name in files if name.startswith(SYNTH_PREFIX)]
    waiting += [options.synth] if STAGE_KINDS[options.kind].makes_rows else []
    done: set[str] = set()
    while waiting:
        name = waiting.pop(0)
        if name not in done and name in recipe.synth:
            done.add(name)
            yield name
            waiting += made_seeds(recipe.synth[name])


def making_stage(recipe: Recipe, name: str) -> str:
    """The stage that makes the rows `name` of `synth`; empty where an endpoint does."""
    makers = (stage for stage, o in recipe.stages.items() if STAGE_KINDS[o.kind].makes_rows and o.synth == name)
    return next(makers, "")


def needs_stage(recipe: Recipe, name: str) -> bool:
    """Whether the rows `name` of `synth` are made by the model of a stage, and not by one behind an address."""
    generator = recipe.synth[name].generator
    return not (generator in recipe.endpoints and recipe.endpoints[generator].base_url)


def waits_for_stage(recipe: Recipe, files: str) -> bool:
    """Whether the files of a source are rows that the model of a stage makes."""
    return files.startswith(SYNTH_PREFIX) and needs_stage(recipe, files.removeprefix(SYNTH_PREFIX))


def stages_before(recipe: Recipe, stage: str) -> set[str]:
    """The stages that must be finished before one begins: those whose parameters, rows or scores it takes."""
    options = recipe.stages[stage]
    names = {options.init_from, *options.upcycle.experts_from}
    for name in made_sources(recipe, stage):
        names |= {making_stage(recipe, name) if name != options.synth else "", recipe.synth[name].scores}
    return names & set(recipe.stages)
