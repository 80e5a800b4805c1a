"""A whole recipe: its stages in order, each once; scores after every stage; summary.json and report.html at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import platform
import sys
import time
import typing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tanuki_jax import __version__, checkpoint, config, files, multihost, parallel
from tanuki_jax.config.schema import Recipe
from tanuki_jax.data import chat
from tanuki_jax.errors import Preempted, UserError
from tanuki_jax.evaluate import score
from tanuki_jax.evaluate.suggested import suggested_questions
from tanuki_jax.files import lock
from tanuki_jax.model import Sampling
from tanuki_jax.recipe import artifacts, initial_state, placement, preflight
from tanuki_jax.recipe.stage import run_stage
from tanuki_jax.report import trackers
from tanuki_jax.report.html import write_report
from tanuki_jax.synth import rules
from tanuki_jax.train import profile

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "tokenizers", "numpy")


def run_recipe(recipe: Recipe, workdir: Path, only: str = "", allow_data_change: bool = False) -> dict[str, Any]:
    """Runs the stages that are not finished yet (or the one named) and returns the summary, which it also writes."""
    if only and only not in recipe.stages:
        raise UserError(f"--stage: the recipe has no stage {only!r}; it has {', '.join(recipe.stages)}")
    multihost.initialize()
    with multihost.watch_for_hangs(_report_hang), profile.handle_sigusr1(), contextlib.ExitStack() as held:
        multihost.enter_phase("the start")
        multihost.on_process_zero(lambda: held.enter_context(lock.workdir(workdir)), "the lock on the workdir")
        return _run(recipe, workdir, only, allow_data_change)


def _report_hang(found: dict[str, Any]) -> None:
    """Between stages, whose own events have a file."""
    print("takes long: " + ", ".join(f"{name} {value}" for name, value in found.items()), file=sys.stderr, flush=True)


def _run(recipe: Recipe, workdir: Path, only: str, allow_data_change: bool) -> dict[str, Any]:
    first = jax.process_index() == 0
    multihost.first_then_all(lambda: _claim(recipe, workdir), "the workdir")
    wanted = [only] if only else list(recipe.stages)
    preflight.check(recipe, wanted, workdir, versions())
    mesh = parallel.make_mesh(recipe.mesh)
    meshes = {name: placement.make_mesh(recipe, name) for name in wanted}
    for name, own in meshes.items():  # what cannot work is said before anything long begins
        if recipe.stages[name].kind != "upcycle":
            placement.check_mesh(recipe, name, own)
    if first:
        _announce(recipe, mesh, meshes)
    sources = {source for name in wanted for source, weights in recipe.stages[name].mixture.items() if any(weights)}
    needed = any(not _done(workdir, name) for name in wanted)
    multihost.enter_phase("preparing data")
    ready = multihost.first_then_all(lambda: artifacts.prepare(recipe, workdir, sources), "preparing data") if needed else None
    if ready:
        multihost.assert_equal_across_processes("fingerprint of the tokenizer", ready.tokenizer.fingerprint)
    with multihost.handle_sigterm(), trackers.open_trackers(recipe, workdir) as tell:
        for name in wanted:
            if _done(workdir, name):
                continue
            if multihost.preemption_requested():
                raise Preempted(f"the run was told to stop before stage {name}")
            parent = recipe.stages[name].init_from
            if parent in recipe.stages and not _done(workdir, parent):
                raise UserError(f"stage {name} starts from {parent}, which is not finished in {workdir}; run it first")
            assert ready is not None
            multihost.enter_phase(f"the start of stage {name}")
            entry = run_stage(recipe, name, workdir, ready, meshes[name], allow_data_change, tell)
            multihost.enter_phase(f"the scores of stage {name}")
            entry["scores"], shown = _scores(recipe, name, workdir, ready, mesh)
            result = {"entry": entry, **shown}
            finish = functools.partial(files.write_json, initial_state.stage_dir(workdir, name) / "done.json", result)
            multihost.on_process_zero(finish, f"the end of stage {name}")
            if first:
                print(format_stage_summary(entry), file=sys.stderr, flush=True)
    entries = [done["entry"] for name in recipe.stages if (done := _done(workdir, name))]
    summary = {"stages": entries, "config": config.to_dict(recipe), "versions": versions()}
    if first:
        files.write_json(workdir / "summary.json", summary)
        write_report(recipe, summary, workdir)
    return summary


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "tanuki_jax": __version__,
        "python": platform.python_version(),
        **found,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _done(workdir: Path, name: str) -> dict[str, Any] | None:
    path = initial_state.stage_dir(workdir, name) / "done.json"
    return files.read_json(path) if path.is_file() else None


def _claim(recipe: Recipe, workdir: Path) -> bool:
    """Makes the workdir this recipe's, or refuses one that is another's."""
    path, mine = workdir / "recipe.json", config.to_dict(recipe)
    if path.is_file():
        stored = files.read_json(path)
        try:
            theirs = config.from_dict(Recipe, stored)  # keys added since have their defaults
        except UserError as error:
            raise UserError(f"workdir: {path} is no recipe of this version ({error}); use another --workdir") from error
        differing = _differences(config.to_dict(theirs), mine)
        if differing:
            named = "; ".join(differing[:4]) + (" ..." if len(differing) > 4 else "")
            raise UserError(
                f"workdir: {workdir} belongs to another recipe; {named}. "
                "Use another --workdir, or the settings it was started with"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(path, mine)
    except OSError as error:
        raise UserError(f"--workdir: cannot write to {workdir}: {error.strerror}") from error
    return True


def _differences(old: Any, new: Any, kind: Any = Recipe, path: str = "") -> list[str]:
    """What differs between two recipes, as nested dicts, but for the keys that the schema calls resumable."""
    if dataclasses.is_dataclass(kind):
        named = [(f.name, config.key_types(kind)[f.name]) for f in dataclasses.fields(kind) if not f.metadata["resumable"]]
    elif typing.get_origin(kind) is dict:
        named = [(name, typing.get_args(kind)[1]) for name in {**old, **new}]
    else:
        return [] if old == new else [f"{path} was {old}, is {new}"]
    lines = []
    for name, inner in named:
        below = f"{path}.{name}".lstrip(".")
        if (name in old) != (name in new):
            lines.append(f"{below} is {'new' if name in new else 'gone'}")
        elif name in old:
            lines += _differences(old[name], new[name], inner, below)
    return lines


def _announce(recipe: Recipe, mesh: jax.sharding.Mesh, meshes: dict[str, jax.sharding.Mesh]) -> None:
    """The resolved config and the parameter tables, on stderr."""
    print("config, where it differs from the defaults (all of it is in recipe.json):", file=sys.stderr)
    print("\n".join(f"  {line}" for line in config.non_default(recipe)), file=sys.stderr)
    print(f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh {_shape(mesh)}", file=sys.stderr)
    for name, own in meshes.items():
        if own != mesh:
            print(f"stage {name}: mesh {_shape(own)}, for it has {recipe.stages[name].batch_size} rows", file=sys.stderr)
    for name in (n for n in meshes if _changes_rope_theta(recipe, n)):
        parent = recipe.stages[name].init_from
        bases = [config.model_config(recipe, n).rope_theta for n in (parent, name)]
        print(
            f"stage {name}: rope_theta is {bases[1]:g}, and {bases[0]:g} in stage {parent} that it starts from; "
            f"stages.{name}.rope_theta={bases[0]:g} goes on with that",
            file=sys.stderr,
        )
    for name in (n for n in meshes if recipe.stages[n].lora.rank):
        told = placement.describe_adapters(config.model_config(recipe, name), recipe.stages[name].lora)
        print(f"stage {name}: {told}", file=sys.stderr)
    for name in meshes:
        if (steps := config.stage_steps(recipe.stages[name])) and (
            told := config.unreached_schedule(recipe.stages[name].optimizer, steps)
        ):
            print(f"stage {name}: {told}", file=sys.stderr)
    for mixture in sorted({config.is_moe(recipe, name) for name in meshes}):
        name = next(n for n in meshes if config.is_moe(recipe, n) == mixture)
        print(
            f"parameters, {'mixture' if mixture else 'dense'}:\n{placement.describe(config.model_config(recipe, name), mesh)}",
            file=sys.stderr,
            flush=True,
        )


def _changes_rope_theta(recipe: Recipe, name: str) -> bool:
    """Whether a stage leaves the rotary base of the stage before it without saying so."""
    this, parent = recipe.stages[name], recipe.stages[name].init_from
    if this.kind == "upcycle" or this.rope_theta or parent not in recipe.stages:
        return False
    return config.model_config(recipe, parent).rope_theta != config.model_config(recipe, name).rope_theta


def _shape(mesh: jax.sharding.Mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def _scores(
    recipe: Recipe, name: str, workdir: Path, ready: artifacts.Artifacts, mesh: jax.sharding.Mesh
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Exact answers to held-out prompts, and preferences between held-out pairs, of the stage's last checkpoint.

    Besides, `samples` of the answers, and the `questions` that a conversation may begin with.
    """
    if not recipe.scoring.prompts:
        return {}, {"samples": [], "questions": []}
    began, home, options = time.monotonic(), initial_state.stage_dir(workdir, name), recipe.scoring
    loaded = checkpoint.load(home, mesh)
    prompts = rules.held_out_prompts(options.prompts, recipe.seed)
    sampling = Sampling(max_new_tokens=options.max_new_tokens, stop=chat.stop_ids(ready.tokenizer))
    with jax.set_mesh(mesh):
        multihost.enter_phase(f"the answers of stage {name}")

        def answers(conversations: list[Any]) -> list[str]:
            return score.answers(loaded.cfg, loaded.params, ready.tokenizer, conversations, sampling, options.batch_size)

        given = answers([row["messages"] for row in prompts])
        scores = score.exact_answers(prompts, given, rules.correct)
        samples = [{**row, "given": answer} for row, answer in zip(prompts, given, strict=True)][: 2 * len(rules.FAMILIES)]
        questions = suggested_questions(samples, scores["families"], rules.correct, answers, options.batch_size)
        if options.pairs:
            multihost.enter_phase(f"the preferences of stage {name}")
            margins = score.pair_margins(
                loaded.cfg, loaded.params, ready.tokenizer, rules.held_out_pairs(options.pairs, recipe.seed)
            )
            scores["pair_accuracy"] = round(float((margins > 0).mean()), 4)
            if jax.process_index() == 0:
                files.write_json(home / "pair_margins.json", [round(float(m), 4) for m in margins])
            before = initial_state.stage_dir(workdir, recipe.stages[name].init_from) / "pair_margins.json"
            if recipe.stages[name].kind == "dpo" and before.is_file():
                # TRL's rewards/accuracies: has the stage moved the pair apart in the right direction?
                reference = np.array(json.loads(before.read_text(encoding="utf-8")))
                scores["reward_accuracy"] = round(float((margins > reference).mean()), 4)
    scores["seconds"] = round(time.monotonic() - began, 1)
    return scores, {"samples": samples, "questions": questions}


def format_stage_summary(entry: dict[str, Any]) -> str:
    """A finished stage in one line."""
    scores = entry["scores"]
    parts = [f"stage {entry['name']} done: {entry['steps']} steps, {entry['tokens']:,} tokens"]
    if entry["final_loss"] is not None:
        parts.append(f"loss of the last step {entry['final_loss']:.3f}")
    if scores:
        parts.append(f"exact answers {scores['exact_match']:.1%} of {scores['prompts']} held-out prompts")
    if found := entry.get("learning_rate_range"):
        lowest, steepest, suggested = (f"{found[name]:g}" for name in ("lowest_at", "steepest_at", "suggested"))
        parts.append(f"learning rate: lowest loss at {lowest}, steepest fall at {steepest}, try {suggested}")
    for key in ("pair_accuracy", "reward_accuracy"):
        if key in scores:
            parts.append(f"{key.replace('_', ' ')} {scores[key]:.1%}")
    return ", ".join(parts)
