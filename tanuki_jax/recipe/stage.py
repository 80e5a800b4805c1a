"""One stage of a recipe: what it starts from, its dataset and its program, handed to the training loop."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import jax

from tanuki_jax import checkpoint, config, model, multihost
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.config.schema import Recipe
from tanuki_jax.data import loader
from tanuki_jax.data.tokenizer import copy_tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import placement
from tanuki_jax.recipe.artifacts import Artifacts
from tanuki_jax.recipe.dataset import StageDataset, make_dataset
from tanuki_jax.recipe.initial_state import InitialState, load_moments, resolve_initial_state
from tanuki_jax.recipe.make_rows import run_making_stage
from tanuki_jax.recipe.program import StageProgram, make_program
from tanuki_jax.recipe.reference import add_reference
from tanuki_jax.recipe.upcycle_stage import run_upcycle
from tanuki_jax.recipe.validation import make_validation
from tanuki_jax.recipe.workdir import Workdir
from tanuki_jax.report.trackers import MetricsCallback
from tanuki_jax.train import balance, loop, lr_range
from tanuki_jax.train.contract import Params
from tanuki_jax.train.loop import Job, StageSummary, run_loop
from tanuki_jax.train.metrics import read_metrics
from tanuki_jax.train.step import State, init_state


def run_stage(
    recipe: Recipe,
    stage: str,
    workdir: Workdir,
    artifacts: Artifacts,
    mesh: jax.sharding.Mesh,
    allow_data_change: bool = False,
    on_metrics: MetricsCallback = lambda stage, row: None,
) -> dict[str, Any]:  # Seven arguments: what a run has, what it is told, and who listens.
    """Runs or resumes a stage and returns its part of the summary; on_metrics: sees every row of its metrics."""
    options, stage_dir = recipe.stages[stage], workdir.stage_dir(stage)
    multihost.first_then_all(lambda: copy_tokenizer(artifacts.tokenizer.directory, stage_dir / "tokenizer"), "the tokenizer")
    if STAGE_KINDS[options.kind].makes_rows:
        return {"name": stage, "kind": options.kind, **run_making_stage(recipe, stage, workdir)}
    if STAGE_KINDS[options.kind].makes_moe:
        summary = run_upcycle(recipe, stage, workdir, mesh)
        return {"name": stage, "kind": options.kind, **dataclasses.asdict(summary)}
    summary = _train(recipe, stage, workdir, artifacts, mesh, allow_data_change, on_metrics)
    entry = {"name": stage, "kind": options.kind, **dataclasses.asdict(summary)}
    if options.optimizer.schedule == "lr_range_test":
        entry["learning_rate_range"] = lr_range.suggest(read_metrics(stage_dir))
    return entry


def _train(
    recipe: Recipe,
    stage: str,
    workdir: Workdir,
    artifacts: Artifacts,
    mesh: jax.sharding.Mesh,
    allow_data_change: bool,
    on_metrics: MetricsCallback,
) -> StageSummary:  # Seven arguments: those of run_stage.
    options, cfg = recipe.stages[stage], config.model_config(recipe, stage)
    placement.check_mesh(recipe, stage, mesh)
    start = resolve_initial_state(recipe, stage, workdir, mesh)
    frozen = start.load_frozen()
    data = multihost.first_then_all(lambda: make_dataset(recipe, stage, artifacts, workdir.data), f"the data of stage {stage}")
    if STAGE_KINDS[options.kind].needs_reference:
        data = add_reference(data, start, frozen, workdir)
    multihost.assert_equal_across_processes(f"fingerprint of the data of stage {stage}", data.fingerprint)
    message = config.unreached_schedule(options.optimizer, data.steps) if options.epochs else ""
    if message and jax.process_index() == 0:
        print(f"stage {stage}: {message}", file=sys.stderr, flush=True)
    program = make_program(recipe, stage, data.steps, mesh)
    job = _make_job(start, data, workdir, on_metrics)
    with jax.set_mesh(mesh):
        run_loop(
            job,
            dataclasses.replace(program.abstract_state, frozen=frozen),
            functools.partial(_fresh_state, start, program, frozen),
            program.train_step,
            lambda first, number: loader.batches(data.rows, mesh, options.batch_size, first, data.steps, number),
            functools.partial(_check_meta, job, cfg, allow_data_change),
            _eval_hooks(start, data, artifacts),
        )
    return loop.summarize(job)


def _make_job(start: InitialState, data: StageDataset, workdir: Workdir, on_metrics: MetricsCallback) -> Job:
    """The stage as the loop sees it, with the meta of its checkpoints."""
    recipe, stage, cfg, stage_dir = start.recipe, start.stage, start.cfg, workdir.stage_dir(start.stage)
    options = recipe.stages[stage]
    meta: checkpoint.Meta = {
        **start.inherited_meta,
        "stage": stage,
        "model": config.to_dict(cfg),
        "recipe": config.to_dict(recipe),
        "data_fingerprint": data.fingerprint,
        "mesh": dict(start.mesh.shape),
    }
    if start.base_checkpoint:
        meta["adapter"] = start.adapter_meta(stage_dir)
    tokens_per_step = config.tokens_per_step(options)
    return Job(
        name=stage,
        directory=stage_dir,
        options=options,
        steps=data.steps,
        tokens_per_step=tokens_per_step,
        flops_per_token=model.flops_per_token(cfg, options.seq_len, frozen=start.base_checkpoint is not None),
        meta=meta,
        tensorboard=recipe.tensorboard,
        counters=data.counters,
        on_metrics=functools.partial(on_metrics, stage),
        data_change_steps=tuple(tokens // tokens_per_step for tokens in options.phase_start_tokens[1:]),
    )


def _eval_hooks(start: InitialState, data: StageDataset, artifacts: Artifacts) -> list[loop.EvalHook]:
    """What is looked at as the stage goes on: held-out text, and whether experts differ."""
    recipe, cfg, mesh, options = start.recipe, start.cfg, start.mesh, start.recipe.stages[start.stage]
    hooks: list[loop.EvalHook] = []
    if data.held_out:
        rows = options.batch_size // options.gradient_accumulation_steps
        validate = make_validation(cfg, data.held_out, artifacts.tokenizer, mesh, rows)
        hooks.append(loop.EvalHook(recipe.validation.every_steps, validate))
    if cfg.n_experts and start.base_checkpoint is None:
        diagnose = jax.jit(model.expert_diagnostics, out_shardings=checkpoint.replicated(mesh))
        hooks.append(loop.EvalHook(options.log_every, diagnose))
    return hooks


def _fresh_state(start: InitialState, program: StageProgram, frozen: Params) -> State:
    """The state before the first step."""
    options, key = start.recipe.stages[start.stage], start.key("train")
    make = jax.jit(
        lambda p: init_state(p, program.optimizer, key, balance.init_balance(start.cfg, options.loss)),
        out_shardings=dataclasses.replace(program.shardings, frozen={}),
    )
    state: State = dataclasses.replace(make(start.load_params()), frozen=frozen)
    if options.restore == "all":
        assert start.init_checkpoint is not None  # config/validate.py
        state = dataclasses.replace(state, opt_state=load_moments(start.init_checkpoint, program.abstract_state))
    return state


# --- what a checkpoint must agree with to be resumed ----------------------------------------------------------------


def _check_meta(job: Job, cfg: config.ModelConfig, allow_data_change: bool, saved: checkpoint.Meta) -> None:
    """An error where the checkpoint that is resumed is of another architecture, other data or other groups of experts."""
    checkpoint.check_architecture(str(job.directory), saved["model"], cfg)
    _check_capacity(job.name, cfg, saved, job.meta)
    fingerprint = job.meta["data_fingerprint"]
    if saved["data_fingerprint"] != fingerprint and not allow_data_change:
        raise UserError(
            f"stage {job.name}: its data is not what the checkpoint in {job.directory} was trained on (fingerprint "
            f"{fingerprint}, then {saved['data_fingerprint']}); restore the files, start in another --workdir, or pass "
            "--allow_data_change"
        )


def _check_capacity(stage: str, cfg: config.ModelConfig, saved: checkpoint.Meta, current: checkpoint.Meta) -> None:
    """With a capacity, an error where the tokens that compete for an expert's capacity are grouped otherwise than before.

    They are those of one microbatch on one device.
    """
    if not (cfg.n_experts and cfg.capacity_factor):
        return

    def groups(meta: checkpoint.Meta) -> dict[str, int]:
        steps = meta["recipe"]["stages"][stage]["gradient_accumulation_steps"]
        axes = {f"mesh.{axis}": size for axis, size in meta.get("mesh", {}).items() if axis != "tensor"}
        return {f"stages.{stage}.gradient_accumulation_steps": steps, **axes}

    before, here = groups(saved), groups(current)
    differing = [f"{key} was {before[key]}, is {here.get(key, 1)}" for key in before if before[key] != here.get(key, 1)]
    if differing:
        raise UserError(
            f"stage {stage}: {'; '.join(differing)}. With model.capacity_factor {cfg.capacity_factor:g} experts have room "
            "for a share of the tokens of one microbatch on one device, so this would change which are dropped; go on "
            "with those of before, or begin anew in another --workdir"
        )
