"""A whole recipe: its stages in order, each once; scores after every stage; summary.json and report.html at the end."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tanuki_jax import __version__, config, files, multihost, parallel
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.config.derived import stages_before
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import Preempted, UserError
from tanuki_jax.files import lock
from tanuki_jax.recipe import artifacts, data_card, placement, preflight, source_files
from tanuki_jax.recipe.announce import announce, format_stage_summary
from tanuki_jax.recipe.claim import claim_workdir
from tanuki_jax.recipe.scores import score_stage
from tanuki_jax.recipe.stage import run_stage
from tanuki_jax.recipe.workdir import Workdir
from tanuki_jax.report import trackers
from tanuki_jax.report.data_card import write_data_card
from tanuki_jax.report.html import write_report
from tanuki_jax.train import profile

logger = logging.getLogger(__name__)
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "tokenizers", "numpy")


def run_recipe(recipe: Recipe, workdir: Path, only: str = "", allow_data_change: bool = False) -> dict[str, Any]:
    """Runs the stages that are not finished yet (or the one named) and returns the summary, which it also writes."""
    if only and only not in recipe.stages:
        raise UserError(f"--stage: the recipe has no stage {only!r}; it has {', '.join(recipe.stages)}")
    multihost.initialize()
    with multihost.watch_for_hangs(_report_hang), profile.handle_sigusr1(), contextlib.ExitStack() as locks:
        multihost.enter_phase("the start")
        multihost.on_process_zero(lambda: locks.enter_context(lock.workdir(workdir)), "the lock on the workdir")
        stages = [only] if only else list(recipe.stages)
        _run_stages(recipe, Workdir(workdir), stages, allow_data_change)
        return _summarize(recipe, Workdir(workdir))


def _run_stages(recipe: Recipe, workdir: Workdir, stages: Sequence[str], allow_data_change: bool) -> None:
    multihost.first_then_all(lambda: claim_workdir(recipe, workdir), "the workdir")
    preflight.check(recipe, stages, workdir, versions())
    mesh = parallel.make_mesh(recipe.mesh)
    meshes = {stage: placement.make_mesh(recipe, stage) for stage in stages}
    for stage, stage_mesh in meshes.items():  # what cannot work is said before anything long begins
        if STAGE_KINDS[recipe.stages[stage].kind].trains:
            placement.check_mesh(recipe, stage, stage_mesh)
    if jax.process_index() == 0:
        announce(recipe, mesh, meshes)
    multihost.enter_phase("preparing data")
    if all(workdir.done(stage) for stage in stages):
        return
    waiting = [stage for stage in stages if not workdir.done(stage)]
    multihost.first_then_all(lambda: source_files.check(recipe, waiting), "a look at the data")
    tokenizer = multihost.first_then_all(lambda: artifacts.prepare_tokenizer(recipe, workdir), "the tokenizer")
    multihost.assert_equal_across_processes("fingerprint of the tokenizer", tokenizer.fingerprint)
    with multihost.handle_sigterm(), trackers.open_trackers(recipe, workdir.root) as on_metrics:
        for stage in waiting:
            if multihost.preemption_requested():
                raise Preempted(f"the run was told to stop before stage {stage}")
            for other in sorted(stages_before(recipe, stage)):
                if not workdir.done(other):
                    raise UserError(f"stage {stage} needs stage {other}, which is not finished in {workdir.root}; run it first")
            multihost.enter_phase(f"the data of stage {stage}")
            read = set(config.stage_sources(recipe.stages[stage]))
            prepare = functools.partial(artifacts.prepare_stores, recipe, workdir, tokenizer, read)
            prepared = multihost.first_then_all(prepare, f"preparing the data of stage {stage}")
            multihost.enter_phase(f"the start of stage {stage}")
            entry = run_stage(recipe, stage, workdir, prepared, meshes[stage], allow_data_change, on_metrics)
            multihost.enter_phase(f"the scores of stage {stage}")
            scored = score_stage(recipe, stage, workdir, tokenizer, mesh)
            entry["scores"] = scored.scores
            data = data_card.describe_sources(recipe, prepared)
            result = {"entry": entry, "samples": scored.samples, "questions": scored.questions, "data": data}
            finish = functools.partial(files.write_json, workdir.done_file(stage), result)
            multihost.on_process_zero(finish, f"the end of stage {stage}")
            if jax.process_index() == 0:
                print(format_stage_summary(entry), file=sys.stderr, flush=True)


def _summarize(recipe: Recipe, workdir: Workdir) -> dict[str, Any]:
    """The summary of the stages that are finished; the first process writes it, and the report."""
    results = [workdir.done(stage) for stage in recipe.stages]
    entries = [result["entry"] for result in results if result]
    summary = {"stages": entries, "config": config.to_dict(recipe), "versions": versions()}
    if jax.process_index() == 0:
        files.write_json(workdir.summary_file, summary)
        write_report(recipe, summary, workdir.root)
        write_data_card(recipe, workdir.root)
    return summary


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    return {
        "tanuki_jax": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _report_hang(details: Mapping[str, Any]) -> None:
    """Logs a hang outside stages; hangs inside one go to its events.jsonl."""
    text = ", ".join(f"{name} {value}" for name, value in details.items())
    logger.warning("takes long: %s", text)
