"""One stage of a recipe: its rows, its loss, what it starts from, and its run."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import checkpoint, config, files, model, multihost, parallel, upcycle
from tanuki_jax.config.schema import Recipe
from tanuki_jax.data import loader, packing
from tanuki_jax.data.tokenizer import copy_tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.progress import Progress
from tanuki_jax.recipe import placement
from tanuki_jax.recipe.artifacts import Artifacts
from tanuki_jax.recipe.dataset import StageDataset, make_dataset, sources_of
from tanuki_jax.recipe.initial_state import (
    adapter_scales,
    base_checkpoint,
    derive_key,
    frozen_params,
    inherited_meta,
    init_checkpoint,
    parent_moments,
    stage_dir,
    trained_params,
)
from tanuki_jax.recipe.validation import make_validation
from tanuki_jax.report.trackers import MetricsCallback
from tanuki_jax.train import balance, loop, losses, lr_range
from tanuki_jax.train.loop import run_loop
from tanuki_jax.train.metrics import read_metrics
from tanuki_jax.train.optimizer import make_optimizer, make_schedule
from tanuki_jax.train.step import State, init_state, make_train_step, make_update


def program(recipe: Recipe, name: str, steps: int, mesh: jax.sharding.Mesh) -> tuple[Any, State, State]:
    """What a stage runs: the jitted train step, and the shapes and shardings of its state; nothing is allocated."""
    this, cfg = recipe.stages[name], config.model_config(recipe, name)
    optimizer = make_optimizer(this.optimizer)
    abstract, shardings = placement.state_shardings(cfg, optimizer, mesh, this.loss, this.lora)
    train_step = make_train_step(
        losses.make_loss(this.kind, cfg, this.loss, sources_of(this), this.lora.dropout),
        optimizer,
        make_schedule(this.optimizer, steps),
        this.optimizer.clip_norm,
        this.gradient_accumulation_steps,
        shardings,
        balance.make_rebalance(cfg, this.loss),
        parallel.compiler_options(mesh),
        draws=this.lora.rank > 0 and this.lora.dropout > 0,
    )
    return train_step, abstract, shardings


def update(recipe: Recipe, name: str, mesh: jax.sharding.Mesh) -> tuple[Any, State, tuple[Any, Any]]:
    """The part of a stage's step after its gradients, jitted, and the shapes of the state and of (gradients, loss)."""
    this, cfg = recipe.stages[name], config.model_config(recipe, name)
    optimizer = make_optimizer(this.optimizer)
    abstract, shardings = placement.state_shardings(cfg, optimizer, mesh, this.loss, this.lora)
    part = make_update(optimizer, make_schedule(this.optimizer, 1000), this.optimizer.clip_norm)
    jitted = jax.jit(
        lambda state, grads, loss: part(state, grads, {"loss": loss}),
        donate_argnums=(0, 1),
        out_shardings=(shardings, None),
        compiler_options=parallel.compiler_options(mesh),
    )
    grads = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float32, sharding=s.sharding), abstract.params)
    return jitted, abstract, (grads, jax.ShapeDtypeStruct((), np.float32))


# --- running --------------------------------------------------------------------------------------------------------


def run_stage(
    recipe: Recipe,
    name: str,
    workdir: Path,
    inputs: Artifacts,
    mesh: jax.sharding.Mesh,
    allow_data_change: bool = False,
    tell: MetricsCallback = lambda stage, row: None,
) -> dict[str, Any]:
    """Runs or resumes a stage and returns its part of the summary; `tell` hears every row of its metrics."""
    this, home = recipe.stages[name], stage_dir(workdir, name)
    multihost.first_then_all(lambda: copy_tokenizer(inputs.tokenizer.directory, home / "tokenizer"), "the tokenizer")
    if this.kind == "upcycle":
        return _upcycle(recipe, name, workdir, mesh)
    cfg = config.model_config(recipe, name)
    placement.check_mesh(recipe, name, mesh)
    frozen = frozen_params(recipe, name, workdir, mesh)
    data = multihost.first_then_all(lambda: make_dataset(recipe, name, inputs, workdir / "data"), f"the data of stage {name}")
    if this.kind == "dpo":
        data = data.with_reference(_reference(recipe, name, workdir, data, mesh, frozen))
    multihost.assert_equal_across_processes(f"fingerprint of the data of stage {name}", data.fingerprint)
    if this.epochs and jax.process_index() == 0 and (told := config.unreached_schedule(this.optimizer, data.steps)):
        print(f"stage {name}: {told}", file=sys.stderr, flush=True)
    train_step, abstract, shardings = program(recipe, name, data.steps, mesh)
    optimizer = make_optimizer(this.optimizer)
    meta: checkpoint.Meta = {
        **inherited_meta(recipe, name, workdir),
        "stage": name,
        "model": config.to_dict(cfg),
        "recipe": config.to_dict(recipe),
        "data_fingerprint": data.fingerprint,
        "mesh": dict(mesh.shape),
    }
    if frozen:
        base, scales = base_checkpoint(recipe, name, workdir), adapter_scales(recipe, name, workdir)
        meta["adapter"] = checkpoint.adapters_meta(home, base, model.lora.ranks(cfg, this.lora), scales)
    job = loop.Job(
        name=name,
        directory=home,
        options=this,
        steps=data.steps,
        tokens_per_step=this.seq_len * this.batch_size,
        flops_per_token=model.flops_per_token(cfg, this.seq_len, frozen=bool(frozen)),
        meta=meta,
        tensorboard=recipe.tensorboard,
        counters=data.counters,
        observe=functools.partial(tell, name),
        changes=tuple(start // (this.seq_len * this.batch_size) for start in this.phase_start_tokens[1:]),
    )
    rows, probes = this.batch_size // this.gradient_accumulation_steps, []
    if data.held_out:
        probes.append((recipe.validation.every_steps, make_validation(cfg, data.held_out, inputs.tokenizer, mesh, rows)))
    if cfg.n_experts and not frozen:
        probes.append((this.log_every, jax.jit(model.expert_diagnostics, out_shardings=checkpoint.replicated(mesh))))

    def fresh_state() -> State:
        params, key = trained_params(recipe, name, workdir, mesh), derive_key(recipe.seed, name, "train")
        make = jax.jit(
            lambda p: init_state(p, optimizer, key, balance.init_balance(cfg, this.loss)),
            out_shardings=dataclasses.replace(shardings, frozen={}),
        )
        state = dataclasses.replace(make(params), frozen=frozen)
        if this.restore == "all":
            moments = parent_moments(init_checkpoint(recipe, name, workdir), abstract)
            state = dataclasses.replace(state, opt_state=moments)
        return state

    def check_meta(saved: checkpoint.Meta) -> None:
        checkpoint.check_architecture(str(home), saved["model"], cfg)
        _check_capacity(name, cfg, saved, meta)
        if saved["data_fingerprint"] != data.fingerprint and not allow_data_change:
            raise UserError(
                f"stage {name}: its data is not what the checkpoint in {home} was trained on (fingerprint {data.fingerprint}, "
                f"then {saved['data_fingerprint']}); restore the files, start in another --workdir, or pass --allow_data_change"
            )

    with jax.set_mesh(mesh):
        run_loop(
            job,
            dataclasses.replace(abstract, frozen=frozen),
            fresh_state,
            train_step,
            lambda first, number: loader.batches(data.rows, mesh, this.batch_size, first, data.steps, number),
            check_meta,
            probes,
        )
    entry = {"name": name, "kind": this.kind, **loop.summarize(job)}
    if this.optimizer.schedule == "lr_range_test":
        entry["learning_rate_range"] = lr_range.suggest(read_metrics(home))
    return entry


def _check_capacity(name: str, cfg: config.ModelConfig, saved: checkpoint.Meta, now: checkpoint.Meta) -> None:
    """With a capacity, an error where the tokens among which experts share their room are others than before.

    They are those of one microbatch on one device.
    """
    if not (cfg.n_experts and cfg.capacity_factor):
        return

    def parts(meta: checkpoint.Meta) -> dict[str, int]:
        axes = {f"mesh.{axis}": size for axis, size in meta.get("mesh", {}).items() if axis != "tensor"}
        return {
            f"stages.{name}.gradient_accumulation_steps": meta["recipe"]["stages"][name]["gradient_accumulation_steps"],
            **axes,
        }

    before, here = parts(saved), parts(now)
    differing = [f"{key} was {before[key]}, is {here.get(key, 1)}" for key in before if before[key] != here.get(key, 1)]
    if differing:
        raise UserError(
            f"stage {name}: {'; '.join(differing)}. With model.capacity_factor {cfg.capacity_factor:g} experts have room for a "
            "share of the tokens of one microbatch on one device, so this would change which are dropped; go on with those of "
            "before, or begin anew in another --workdir"
        )


def _upcycle(recipe: Recipe, name: str, workdir: Path, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Converts the parent's parameters, sharded, and writes them as step 0 of this stage."""
    this, home = recipe.stages[name], stage_dir(workdir, name)
    parent = init_checkpoint(recipe, name, workdir)
    assert parent is not None
    cfg = config.model_config(recipe, name)
    began = time.monotonic()
    more = [stage_dir(workdir, n) if n in recipe.stages else Path(n) for n in this.upcycle.experts_from]
    loaded = []
    for path in (parent, *more):
        multihost.enter_phase(f"loading {path}")
        one = checkpoint.load(path, mesh, cfg.param_dtype)
        mixture = upcycle.moe_config(one.cfg, **{key: getattr(cfg, key) for key in upcycle.MOE_KEYS})
        checkpoint.check_architecture(str(path), config.to_dict(mixture), cfg)
        _check_finite(str(path), one.params)
        loaded.append(one.params)
    multihost.enter_phase(f"upcycling in stage {name}")
    with jax.set_mesh(mesh):
        convert = jax.jit(
            lambda trees, k: upcycle.upcycle(trees[0], cfg, this.upcycle, k, trees[1:]),
            out_shardings=checkpoint.parameter_shardings(cfg, mesh),
        )
        params = convert(loaded, derive_key(recipe.seed, name, "upcycle"))
        state = _upcycled_state(recipe, name, parent, params, mesh) if this.restore == "all" else None
    meta: checkpoint.Meta = {
        "stage": name,
        "model": config.to_dict(cfg),
        "recipe": config.to_dict(recipe),
        "data_fingerprint": "",
    }
    meta |= inherited_meta(recipe, name, workdir)
    if state:
        checkpoints = checkpoint.Checkpoints(home)
        checkpoints.save(0, state, meta)
        checkpoints.close()
    else:
        checkpoint.save_params(home, params, meta)
    return {
        "name": name,
        "kind": "upcycle",
        "steps": 0,
        "tokens": 0,
        "seconds": round(time.monotonic() - began, 1),
        "tokens_per_second": None,
        "goodput": None,
        "seconds_by_phase": {},
        "final_loss": None,
    }


def _upcycled_state(recipe: Recipe, name: str, parent: Path, params: Any, mesh: jax.sharding.Mesh) -> State:
    """The mixture's state with the moments that survive of the parent's."""
    optimizer = make_optimizer(recipe.stages[name].optimizer)
    dense = dataclasses.replace(config.model_config(recipe, name), n_experts=0)
    abstract, _ = placement.state_shardings(dense, optimizer, mesh)
    _, shardings = placement.state_shardings(config.model_config(recipe, name), optimizer, mesh)
    make = jax.jit(
        lambda p, old: upcycle.carry_moments(optimizer.init(p), old, config.model_config(recipe, name)),
        out_shardings=shardings.opt_state,
    )
    return State(jnp.int32(0), params, make(params, parent_moments(parent, abstract)), jax.random.key(0))


def _check_finite(where: str, params: Any) -> None:
    """An error that names the first parameter with a NaN or an infinity."""
    finite = jax.jit(lambda tree: jax.tree.map(lambda w: jnp.isfinite(w).all(), tree))(params)
    for path, good in jax.tree_util.tree_flatten_with_path(jax.device_get(finite))[0]:
        if not good:
            named = "/".join(str(part.key) for part in path)
            raise UserError(f"upcycle: {where} has NaN or Inf in {named}; use an earlier checkpoint")


def _reference(
    recipe: Recipe, name: str, workdir: Path, data: StageDataset, mesh: jax.sharding.Mesh, frozen: Any
) -> np.ndarray:
    """Log-probabilities [pairs, 2] of every pair under the model that the stage starts from, computed once and cached."""
    this, cfg = recipe.stages[name], config.model_config(recipe, name)
    parent = init_checkpoint(recipe, name, workdir)
    assert parent is not None
    home, step = checkpoint.locate(parent)
    path = workdir / "data" / f"reference-{files.fingerprint(data.fingerprint, checkpoint.read_meta(home, step))}.npy"
    if not _is_reference(path, sum(len(rows.ref_logprobs) for rows in data.sources)):
        params = {**frozen, **trained_params(recipe, name, workdir, mesh)}
        with jax.set_mesh(mesh):
            logprobs = np.concatenate([_source_logprobs(cfg, params, rows, this.batch_size, mesh) for rows in data.sources])
        multihost.first_then_all(lambda: _save_array(path, logprobs), "reference log-probabilities")
    return np.load(path)


def _is_reference(path: Path, pairs: int) -> bool:
    """Whether there is a whole file with the log-probabilities of that many pairs; says so where it is a damaged one."""
    if not path.is_file():
        return False
    try:
        if np.load(path, mmap_mode="r").shape == (pairs, 2):
            return True
    except (ValueError, EOFError, OSError):
        pass
    print(f"{path} is damaged or of other pairs; reference log-probabilities are computed anew", file=sys.stderr)
    return False


def _source_logprobs(
    cfg: config.ModelConfig, params: Any, rows: packing.PackedPairs, batch_size: int, mesh: jax.sharding.Mesh
) -> np.ndarray:
    """Log-probabilities [pairs, 2] of one source; the rows are walked in order, the last batch filled up with repetitions."""
    compute = jax.jit(lambda p, batch: losses.pair_scores(model.dropless(cfg), p, batch)[0].logprobs)
    result = np.zeros((len(rows.ref_logprobs), 2), np.float32)
    progress = Progress("reference log-probabilities", len(rows), "rows", quiet=jax.process_index() != 0)
    for start in range(0, len(rows), batch_size):
        multihost.enter_phase(f"reference log-probabilities, row {start}")
        chosen = [min(r, len(rows) - 1) for r in range(start, start + batch_size)]
        batch = loader.stack([rows[r] for r in chosen])
        logprobs = multihost.to_host(compute(params, loader.on_devices(batch, mesh, batch_size)))
        for r, values in zip(chosen, logprobs, strict=True):
            pairs = rows.pairs(r)
            result[pairs] = values[: len(pairs)]
        progress.show(min(start + batch_size, len(rows)))
    return result


def _save_array(path: Path, array: np.ndarray) -> bool:
    with files.atomic_path(path) as temporary, temporary.open("wb") as f:
        np.save(f, array)
    return True
