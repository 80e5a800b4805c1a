"""One stage of a recipe: its rows, its loss, what it starts from, and its run."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tanuki_jax import checkpoint, config, files, model, parallel, placement, upcycle
from tanuki_jax.config import Recipe
from tanuki_jax.data import loader, packing
from tanuki_jax.errors import UserError
from tanuki_jax.inputs import Inputs
from tanuki_jax.progress import Progress
from tanuki_jax.stage_data import stage_data
from tanuki_jax.train import loop, losses
from tanuki_jax.train.optimizer import learning_rate, make_optimizer
from tanuki_jax.train.step import State, init_state, make_train_step, make_update
from tanuki_jax.validation import make_validation


def directory(workdir: Path, name: str) -> Path:
    """Where a stage lives."""
    return workdir / "stages" / name


def named_key(seed: int, *names: str) -> jax.Array:
    """The random key of a named purpose."""
    key = jax.random.key(seed)
    for name in names:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key


# --- what a stage starts from ---------------------------------------------------------------------------------------


def parent_directory(recipe: Recipe, name: str, workdir: Path) -> Path | None:
    """Where the stage's starting checkpoint lies; None for random weights."""
    parent = recipe.stages[name].init_from
    if not parent:
        return None
    return directory(workdir, parent) if parent in recipe.stages else Path(parent)


def _starting_params(recipe: Recipe, name: str, workdir: Path, mesh: jax.sharding.Mesh) -> Any:
    """Parameters of the parent, or random ones, on the mesh."""
    cfg = config.model_of(recipe, name)
    parent = parent_directory(recipe, name, workdir)
    if parent is None:
        initialize = jax.jit(model.init, static_argnums=0, out_shardings=checkpoint.parameter_shardings(cfg, mesh))
        return initialize(cfg, named_key(recipe.seed, name, "init"))
    loaded = checkpoint.load(parent, mesh)
    checkpoint.check_architecture(str(parent), loaded.meta["model"], cfg)
    return loaded.params


def program(recipe: Recipe, name: str, steps: int, mesh: jax.sharding.Mesh) -> tuple[Any, State, State]:
    """What a stage runs: the jitted train step, and the shapes and shardings of its state; nothing is allocated."""
    this, cfg = recipe.stages[name], config.model_of(recipe, name)
    optimizer = make_optimizer(this.optimizer)
    abstract, shardings = placement.state_shardings(cfg, optimizer, mesh)
    train_step = make_train_step(
        losses.make_loss(this.kind, cfg, this.loss),
        optimizer,
        learning_rate(this.optimizer, steps),
        this.optimizer.clip_norm,
        this.microbatches,
        shardings,
        parallel.compiler_options(mesh),
    )
    return train_step, abstract, shardings


def update(recipe: Recipe, name: str, mesh: jax.sharding.Mesh) -> tuple[Any, State, tuple[Any, Any]]:
    """The part of a stage's step after its gradients, jitted, and the shapes of the state and of (gradients, loss)."""
    this, cfg = recipe.stages[name], config.model_of(recipe, name)
    optimizer = make_optimizer(this.optimizer)
    abstract, shardings = placement.state_shardings(cfg, optimizer, mesh)
    part = make_update(optimizer, learning_rate(this.optimizer, 1000), this.optimizer.clip_norm)
    jitted = jax.jit(
        lambda state, grads, loss: part(state, grads, {"loss": loss}),
        donate_argnums=(0, 1),
        out_shardings=(shardings, None),
        compiler_options=parallel.compiler_options(mesh),
    )
    grads = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float32, sharding=s.sharding), abstract.params)
    return jitted, abstract, (grads, jax.ShapeDtypeStruct((), np.float32))


# --- running --------------------------------------------------------------------------------------------------------


def run(
    recipe: Recipe, name: str, workdir: Path, inputs: Inputs, mesh: jax.sharding.Mesh, allow_data_change: bool = False
) -> dict[str, Any]:
    """Runs or resumes a stage and returns its part of the summary."""
    this, home = recipe.stages[name], directory(workdir, name)
    parallel.once(lambda: files.copy_directory(inputs.tokenizer.directory, home / "tokenizer"))
    if this.kind == "upcycle":
        return _upcycle(recipe, name, workdir, mesh)
    cfg = config.model_of(recipe, name)
    placement.check_mesh(recipe, name, mesh)
    reference = _reference(recipe, name, workdir, inputs, mesh) if this.kind == "dpo" else None
    data = parallel.once(lambda: stage_data(recipe, name, inputs, workdir / "data", reference))
    train_step, abstract, shardings = program(recipe, name, data.steps, mesh)
    optimizer = make_optimizer(this.optimizer)
    meta = {
        "stage": name,
        "model": config.to_dict(cfg),
        "recipe": config.to_dict(recipe),
        "data_fingerprint": data.fingerprint,
    }
    job = loop.Job(
        name=name,
        directory=home,
        steps=data.steps,
        tokens_per_step=this.seq_len * this.batch_size,
        flops_per_token=model.flops_per_token(cfg, this.seq_len),
        save_every=this.save_every,
        log_every=this.log_every,
        keep=this.keep,
        tensorboard=recipe.tensorboard,
        meta=meta,
        counters=data.counters,
        validate_every=recipe.validation.every if data.held_out else 0,
    )
    rows = this.batch_size // this.microbatches
    validate = make_validation(cfg, data.held_out, inputs.tokenizer, mesh, rows) if data.held_out else None

    def fresh_state() -> State:
        params = _starting_params(recipe, name, workdir, mesh)
        key = named_key(recipe.seed, name, "train")
        make = jax.jit(lambda p: init_state(p, optimizer, key), out_shardings=shardings)
        state = make(params)
        if this.carry == "all":
            state = _carried(state, parent_directory(recipe, name, workdir), abstract)
        return state

    def check_meta(saved: dict[str, Any]) -> None:
        checkpoint.check_architecture(str(home), saved["model"], cfg)
        if saved["data_fingerprint"] != data.fingerprint and not allow_data_change:
            raise UserError(
                f"stage {name}: its data is not what the checkpoint in {home} was trained on (fingerprint {data.fingerprint}, "
                f"then {saved['data_fingerprint']}); restore the files, start in another --workdir, or pass --allow_data_change"
            )

    with jax.set_mesh(mesh):
        loop.run(
            job,
            abstract,
            fresh_state,
            train_step,
            lambda first: loader.batches(data.rows, mesh, this.batch_size, first, data.steps),
            check_meta,
            validate,
        )
    return {"name": name, "kind": this.kind, **loop.summary(job)}


def _carried(state: State, parent: Path | None, abstract: State) -> State:
    """The state with Adam's moments of the parent stage; steps count from 0 again."""
    if parent is None:
        raise UserError("config: carry='all' needs a stage or checkpoint in init_from")
    checkpoints = checkpoint.Checkpoints(parent, keep=checkpoint.EVERY)
    try:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"checkpoint: {parent} has no checkpoint to carry the optimizer state from")
        return State(state.step, state.params, checkpoints.restore(step, abstract).opt_state, state.key)
    except ValueError as error:
        raise UserError(f"checkpoint: {parent} has no optimizer state of this model; set carry='params'") from error
    finally:
        checkpoints.close()


def _upcycle(recipe: Recipe, name: str, workdir: Path, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Converts the parent's parameters, sharded, and writes them as step 0 of this stage."""
    this, home = recipe.stages[name], directory(workdir, name)
    parent = parent_directory(recipe, name, workdir)
    assert parent is not None
    cfg = config.model_of(recipe, name)
    loaded = checkpoint.load(parent, mesh)
    mixture = upcycle.mixture_of(loaded.cfg, cfg.n_experts, cfg.top_k, cfg.normalized_gate)
    checkpoint.check_architecture(str(parent), config.to_dict(mixture), cfg)
    with jax.set_mesh(mesh):
        convert = jax.jit(
            lambda p, k: upcycle.upcycle(p, cfg, this.upcycle, k),
            out_shardings=checkpoint.parameter_shardings(cfg, mesh),
        )
        params = convert(loaded.params, named_key(recipe.seed, name, "upcycle"))
    meta = {"stage": name, "model": config.to_dict(cfg), "recipe": config.to_dict(recipe), "data_fingerprint": ""}
    checkpoint.save_params(home, params, meta)
    return {
        "name": name,
        "kind": "upcycle",
        "steps": 0,
        "tokens": 0,
        "seconds": 0.0,
        "tokens_per_second": None,
        "final_loss": None,
    }


def _reference(recipe: Recipe, name: str, workdir: Path, inputs: Inputs, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Log-probabilities [pairs, 2] of every pair under the model that the stage starts from, computed once and cached."""
    this, cfg = recipe.stages[name], config.model_of(recipe, name)
    data = parallel.once(lambda: stage_data(recipe, name, inputs, workdir / "data"))
    parent = parent_directory(recipe, name, workdir)
    assert parent is not None
    home, step = checkpoint.locate(parent)
    path = workdir / "data" / f"reference-{files.fingerprint(data.fingerprint, checkpoint.read_meta(home, step))}.npy"
    if not path.is_file():
        params = _starting_params(recipe, name, workdir, mesh)
        with jax.set_mesh(mesh):
            logprobs = np.concatenate([_source_logprobs(cfg, params, rows, this.batch_size, mesh) for rows in data.sources])
        parallel.once(lambda: _save_array(path, logprobs))
    return np.load(path)


def _source_logprobs(
    cfg: config.Model, params: Any, rows: packing.PackedPairs, batch_size: int, mesh: jax.sharding.Mesh
) -> np.ndarray:
    """Log-probabilities [pairs, 2] of one source; the rows are walked in order, the last batch filled up with repetitions."""
    compute = jax.jit(lambda p, batch: losses.pair_logprobs(cfg, p, batch)[0])
    result = np.zeros((len(rows.ref_logprobs), 2), np.float32)
    progress = Progress("reference log-probabilities", len(rows), "rows", quiet=jax.process_index() != 0)
    for start in range(0, len(rows), batch_size):
        chosen = [min(r, len(rows) - 1) for r in range(start, start + batch_size)]
        batch = loader.stack([rows[r] for r in chosen])
        logprobs = parallel.to_host(compute(params, loader.on_devices(batch, mesh, batch_size)))
        for r, values in zip(chosen, logprobs, strict=True):
            pairs = rows.pairs(r)
            result[pairs] = values[: len(pairs)]
        progress.show(min(start + batch_size, len(rows)))
    return result


def _save_array(path: Path, array: np.ndarray) -> bool:
    with files.atomic_path(path) as temporary, temporary.open("wb") as f:
        np.save(f, array)
    return True
