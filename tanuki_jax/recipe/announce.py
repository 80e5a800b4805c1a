"""What a run says on stderr: its config and parameters as it begins, a line for each finished stage."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import jax

from tanuki_jax import config
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.config.schema import Recipe
from tanuki_jax.recipe import placement


def announce(recipe: Recipe, mesh: jax.sharding.Mesh, meshes: Mapping[str, jax.sharding.Mesh]) -> None:
    """The resolved config, what is unusual about the stages, and the parameter tables.

    meshes: of each stage that will run.
    """
    lines = ["config, where it differs from the defaults (all of it is in recipe.json):"]
    lines += [f"  {line}" for line in config.non_default(recipe)]
    lines.append(f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh {_format_mesh(mesh)}")
    for stage, stage_mesh in meshes.items():
        if stage_mesh != mesh:
            lines.append(f"stage {stage}: mesh {_format_mesh(stage_mesh)}, for it has {recipe.stages[stage].batch_size} rows")
    lines += [line for stage in meshes for line in _remarks(recipe, stage)]
    for moe in sorted({config.is_moe(recipe, stage) for stage in meshes}):
        stage = next(n for n in meshes if config.is_moe(recipe, n) == moe)
        lines.append(f"parameters, {'mixture' if moe else 'dense'}:")
        lines.append(placement.describe_parameters(config.model_config(recipe, stage), mesh))
    print("\n".join(lines), file=sys.stderr, flush=True)


def _remarks(recipe: Recipe, stage: str) -> list[str]:
    """What a reader of the config might not expect of a stage."""
    options, lines = recipe.stages[stage], []
    if options.lora.rank:
        lines.append(f"stage {stage}: {placement.describe_adapters(config.model_config(recipe, stage), options.lora)}")
    if STAGE_KINDS[options.kind].makes_rows and jax.process_count() > 1:
        lines.append(f"stage {stage}: runs on one process alone (tanuki train --stage={stage}); this run will end there")
    steps = config.stage_steps(options)
    message = config.unreached_schedule(options.optimizer, steps) if steps else ""
    return [*lines, f"stage {stage}: {message}"] if message else lines


def _format_mesh(mesh: jax.sharding.Mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def format_stage_summary(entry: Mapping[str, Any]) -> str:
    """A finished stage in one line."""
    scores, rates = entry["scores"], entry.get("learning_rate_range")
    parts = [f"stage {entry['name']} done: {entry['steps']} steps, {entry['tokens']:,} tokens"]
    if entry["final_loss"] is not None:
        parts.append(f"loss of the last step {entry['final_loss']:.3f}")
    if scores:
        parts.append(f"exact answers {scores['exact_match']:.1%} of {scores['prompts']} held-out prompts")
    if rates:
        lowest, steepest, suggested = (f"{rates[name]:g}" for name in ("lowest_at", "steepest_at", "suggested"))
        parts.append(f"learning rate: lowest loss at {lowest}, steepest fall at {steepest}, try {suggested}")
    for key in ("pair_accuracy", "reward_accuracy"):
        if key in scores:
            parts.append(f"{key.replace('_', ' ')} {scores[key]:.1%}")
    return ", ".join(parts)
