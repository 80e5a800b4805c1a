"""Rows that a model makes for a recipe: by an endpoint when a source asks for them, or by a stage with the model so far."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax

from tanuki_jax import checkpoint, config, files, multihost
from tanuki_jax.config.derived import made_seeds, making_stage
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import UserError
from tanuki_jax.recipe.workdir import Workdir
from tanuki_jax.train.loop import StageSummary


def make_rows(recipe: Recipe, name: str, workdir: Workdir) -> Path:
    """The file of the rows `name` of `synth`; made first, once, where an endpoint makes them.

    Rows are an artefact: those that are there are never made again; with other settings they are an error.
    """
    rows, stage = workdir.rows_file(name), making_stage(recipe, name)
    if stage and not rows.is_file():
        raise UserError(f"synth.{name} is made by stage {stage}, which is not finished in {workdir.root}; run it first")
    if not stage:
        _make(recipe, name, workdir)
    return rows


def run_making_stage(recipe: Recipe, stage: str, workdir: Workdir) -> dict[str, Any]:
    """Serves the model that the stage starts from, has it make the rows, and returns the stage's part of the summary."""
    from tanuki_jax import serve

    options, began = recipe.stages[stage], time.monotonic()
    parent = workdir.init_checkpoint(options.init_from, recipe.stages)
    assert parent is not None  # config/validate_synth.py
    if jax.process_count() > 1:
        raise UserError(
            f"stage {stage} makes rows with a model on one process, and this run has {jax.process_count()}; run it alone "
            f"(tanuki train --stage={stage}) on one machine with the same workdir, or serve the model and name its endpoint"
        )
    multihost.enter_phase(f"loading {parent}")
    model = serve.load(parent, _tensor(recipe, stage))
    identity = checkpoint.fingerprint(model.params[0])
    generator = recipe.endpoints.get(recipe.synth[options.synth].generator, config.Endpoint())
    settings = serve.Options(slots=generator.concurrency, queue=generator.concurrency, compile_first=False)
    with serve.background(model, settings) as url:
        multihost.enter_phase(f"the rows of stage {stage}")
        _make(recipe, options.synth, workdir, url, identity)
    summary = dataclasses.asdict(StageSummary(seconds=round(time.monotonic() - began, 1)))
    return {**summary, "synth": files.read_json(workdir.synth_dir(options.synth) / "report.json")}


def _tensor(recipe: Recipe, stage: str) -> int:
    """The devices that share the model's weights while it answers: as many as its sizes divide over."""
    cfg = config.model_config(recipe, stage)
    devices = jax.local_device_count() if jax.default_backend() != "cpu" else 1
    sizes = (cfg.n_kv_heads, cfg.d_ff, cfg.vocab_size)
    return max(n for n in range(1, devices + 1) if all(size % n == 0 for size in sizes))


def _make(recipe: Recipe, name: str, workdir: Workdir, generator_url: str = "", generator_id: str = "") -> None:
    """Makes rows, after those that are their seeds."""
    from tanuki_jax.synth.make import make

    synth = recipe.synth[name]
    rows_by_name = {seed: make_rows(recipe, seed, workdir) for seed in made_seeds(synth)}
    scores = workdir.done_file(synth.scores) if synth.scores in recipe.stages else None
    directory, is_made = workdir.synth_dir(name), workdir.rows_file(name).is_file()
    summary = make(
        *(recipe, name, directory),
        sources=rows_by_name,
        generator_url=generator_url,
        generator_id=generator_id,
        scores=scores,
    )
    if not is_made:
        print(summary.text, file=sys.stderr, flush=True)
    summary.check_rows()
