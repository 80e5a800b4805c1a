"""Rows that a model makes for a recipe: by an endpoint when a source asks for them, or by a stage with the model so far."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

from tanuki_jax import checkpoint, files, multihost
from tanuki_jax.config.derived import making_stage
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import UserError
from tanuki_jax.recipe.workdir import Workdir
from tanuki_jax.train.loop import StageSummary


def make_rows(recipe: Recipe, name: str, workdir: Workdir) -> Path:
    """The file of the rows `name` of `synth`; made first, once, where an endpoint makes them.

    Rows are an artefact: those that are there are never made again.
    """
    rows = workdir.rows_file(name)
    if rows.is_file():
        return rows
    stage = making_stage(recipe, name)
    if stage:
        raise UserError(f"synth.{name} is made by stage {stage}, which is not finished in {workdir.root}; run it first")
    _make(recipe, name, workdir)
    return rows


def run_making_stage(recipe: Recipe, stage: str, workdir: Workdir, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Serves the model that the stage starts from, has it make the rows, and returns the stage's part of the summary."""
    options, began = recipe.stages[stage], time.monotonic()
    parent = workdir.init_checkpoint(options.init_from, recipe.stages)
    assert parent is not None  # config/validate_synth.py
    if jax.process_count() > 1:
        raise UserError(
            f"stage {stage} makes rows with a model on one process, and this run has {jax.process_count()}; run it alone "
            f"(tanuki train --stage={stage}) on one machine with the same workdir, or serve the model and name its endpoint"
        )
    if not workdir.rows_file(options.synth).is_file():
        from tanuki_jax import serve

        multihost.enter_phase(f"loading {parent}")
        with serve.background(checkpoint.load(parent, mesh), mesh=mesh, name=options.init_from) as url:
            multihost.enter_phase(f"the rows of stage {stage}")
            _make(recipe, options.synth, workdir, url)
    summary = dataclasses.asdict(StageSummary(seconds=round(time.monotonic() - began, 1)))
    return {**summary, "made": files.read_json(workdir.synth_dir(options.synth) / "summary.json")}


def _make(recipe: Recipe, name: str, workdir: Workdir, generator_url: str = "") -> None:
    from tanuki_jax.synth.make import make

    raise NotImplementedError(make)
