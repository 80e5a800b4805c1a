"""Parameters of a finished stage, or of one step, whole and onto a mesh; adapters with the base that they lie on."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NoReturn

import jax

from tanuki_jax import config, files, model, multihost, parallel
from tanuki_jax.checkpoint import checksums
from tanuki_jax.checkpoint.meta import AdapterMeta, Meta, without_adapter
from tanuki_jax.checkpoint.sharding import Tree, parameter_shardings, replicated, sharded_like, single_device
from tanuki_jax.config.checkpoint_paths import locate, meta_file, step_directory
from tanuki_jax.errors import UserError

REMOVAL_SECONDS = 2.0  # that retention may take to remove a step of which files are missing
POLL = 0.1  # seconds
# Keys of a model that do not change its tree of parameters.
TREELESS_KEYS = ("capacity_factor", "rope_theta", "init_std", "param_dtype")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Parameters from a directory, and what belongs to them."""

    cfg: config.ModelConfig
    params: Tree
    meta: Meta
    stage_directory: Path

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer lies."""
        return self.stage_directory / "tokenizer"


def load(path: str | Path, mesh: jax.sharding.Mesh | None = None, param_dtype: str = "") -> Loaded:
    """Reads a checkpoint's parameters, onto the mesh if there is one; adapters come merged into what they lie on.

    They have the dtype in which they were saved, or `param_dtype`.  A note on stderr says where rounding swallows part of the
    adapters.
    """
    stage_directory, step = locate(path)
    meta = read_meta(stage_directory, step)
    if "adapter" in meta:
        adapters = load_adapters(path, mesh)
        cfg = dataclasses.replace(adapters.cfg, param_dtype=param_dtype or adapters.cfg.param_dtype)
        base = load(adapters.base, mesh, cfg.param_dtype)
        branches = {**base.params, **adapters.params, **adapters.scales}
        shardings = (parameter_shardings(cfg, mesh), replicated(mesh)) if mesh else None
        params, losses = jax.jit(model.lora.merge_and_loss, out_shardings=shardings)(branches)
        message = model.lora.describe_merge_loss(multihost.to_host(losses), cfg.param_dtype)
        if message and jax.process_index() == 0:
            print(f"{path}: {message}; model.param_dtype='float32' keeps it, and so does restore='adapter'", file=sys.stderr)
        return Loaded(cfg, params, without_adapter(meta), stage_directory)
    cfg = config.read_model(meta)
    shapes = model.parameter_shapes(cfg)
    shardings = parameter_shardings(cfg, mesh) if mesh else None
    return _cast(Loaded(cfg, _restore(stage_directory, step, shapes, shardings), meta, stage_directory), param_dtype, mesh)


def _cast(loaded: Loaded, param_dtype: str, mesh: jax.sharding.Mesh | None) -> Loaded:
    """With its parameters in another dtype."""
    if param_dtype in ("", loaded.cfg.param_dtype):
        return loaded
    cfg = dataclasses.replace(loaded.cfg, param_dtype=param_dtype)
    shapes, shardings = model.parameter_shapes(cfg), parameter_shardings(cfg, mesh) if mesh else None
    convert = jax.jit(
        lambda params: jax.tree.map(lambda p, s: p.astype(s.dtype), params, shapes), out_shardings=shardings, donate_argnums=0
    )
    return dataclasses.replace(loaded, cfg=cfg, params=convert(loaded.params))


def load_for(path: str | Path, cfg: config.ModelConfig, mesh: jax.sharding.Mesh) -> Loaded:
    """A checkpoint for the model `cfg`, in its dtype; an error where it is of another architecture."""
    loaded = load(path, mesh, cfg.param_dtype)
    check_architecture(str(path), loaded.meta["model"], cfg)
    return loaded


def _restore(stage_directory: Path, step: int, shapes: Tree, shardings: Tree | None) -> Tree:
    """The item `params` of a step."""
    from tanuki_jax.checkpoint.manager import KEEP_ALL, Checkpoints

    check_sums(stage_directory, step, "params")
    checkpoints = Checkpoints(stage_directory, keep=KEEP_ALL)
    try:
        like = sharded_like(shapes, shardings) if shardings else single_device(shapes)
        return checkpoints.restore_items(step, {"params": like})["params"]
    except (ValueError, KeyError, FileNotFoundError) as error:
        check_not_removed(step_directory(stage_directory, step))
        raise _unreadable(stage_directory, step, str(error).splitlines()[0]) from error
    finally:
        checkpoints.close()


def check_sums(stage_directory: Path, step: int, item: str, verified: Collection[str] = ()) -> None:
    """An error where the files of an item of a step are not those that were written; to be called by all processes.

    verified: files that were compared already, by their paths in the step.
    """
    step_dir = step_directory(stage_directory, step)
    damage = checksums.find_corruption(step_dir, *multihost.process_slice(), item=item, verified=verified)
    if not damage and not step_dir.is_dir():
        damage = "it is missing"
    damage = multihost.first_error(damage, "check sums")
    if damage:
        _raise_damaged(step_dir, damage)


def check_not_removed(step_dir: Path) -> None:
    """An error where the directory of a step, which was there, is gone: a running stage keeps only its newest ones."""
    deadline = time.monotonic() + REMOVAL_SECONDS
    while step_dir.is_dir() and any(int(p.name) > int(step_dir.name) for p in step_dir.parent.iterdir() if p.name.isdigit()):
        if time.monotonic() > deadline:
            return
        time.sleep(POLL)
    if not step_dir.is_dir():
        raise UserError(
            f"checkpoint: {step_dir} was removed while it was read, as a run that goes on removes its older steps; "
            "give the command again for the newest one, or keep more (stages.NAME.keep_latest, keep_every)"
        )


def _raise_damaged(step_dir: Path, damage: str) -> NoReturn:
    """Says what is wrong with a step, and names another one."""
    if "missing" in damage:
        check_not_removed(step_dir)
    others = sorted((int(p.name) for p in step_dir.parent.iterdir() if p.name.isdigit() and p != step_dir), reverse=True)
    fix = f"use {step_dir.parent / str(others[0])}" if others else "bring back another copy"
    raise UserError(f"checkpoint: {step_dir} is damaged, {damage}; {fix}")


def _unreadable(stage_directory: Path, step: int, reason: str) -> UserError:
    return UserError(f"checkpoint: {stage_directory} step {step} cannot be read: {reason}")


def read_meta(stage_directory: Path, step: int) -> Meta:
    """What was saved beside the arrays of one step."""
    step_dir = step_directory(stage_directory, step)
    if damage := checksums.find_corruption(step_dir, item="meta"):
        _raise_damaged(step_dir, damage)
    try:
        meta: Meta = files.read_json(meta_file(stage_directory, step))  # through Orbax's manager it takes ten times as long
        config.read_model(meta)
    except KeyError as error:
        raise _unreadable(stage_directory, step, f"{error} is missing in its meta") from error
    except (ValueError, TypeError, OSError, UserError) as error:
        check_not_removed(step_dir)
        raise _unreadable(stage_directory, step, str(error).splitlines()[0]) from error
    return meta


def save_params(stage_directory: Path, params: Tree, meta: Meta) -> None:
    """Writes parameters alone as step 0 of a stage (an upcycled or imported model) and waits for it."""
    from tanuki_jax.checkpoint.manager import Checkpoints

    checkpoints = Checkpoints(stage_directory)
    try:
        checkpoints.save_items(0, {"params": params}, meta)
    finally:
        checkpoints.close()


def check_architecture(where: str, saved: Mapping[str, object], cfg: config.ModelConfig) -> None:
    """An error that names what differs between a checkpoint's model and the one asked for."""
    saved = config.to_dict(config.read_model({"model": saved}))  # keys added since have their defaults
    unused = () if cfg.n_experts else config.MOE_KEYS
    differing = [
        f"{name} {saved[name]} (here {value})"
        for name, value in config.to_dict(cfg).items()
        if name not in (*TREELESS_KEYS, *unused) and saved[name] != value
    ]
    if differing:
        raise UserError(
            f"checkpoint: {where} is of another architecture: {', '.join(differing)}; use its config or another checkpoint"
        )


# --- adapters -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters from a directory, and the checkpoint that they lie on."""

    cfg: config.ModelConfig
    ranks: dict[str, int]
    params: Tree  # {"lora": ...}
    scales: Tree  # {"lora_scale": ...}
    base: Path  # one step of a stage
    meta: Meta


def adapters_meta(stage_directory: Path, base: Path, ranks: dict[str, int], scales: dict[str, list[float]]) -> AdapterMeta:
    """What the meta of a checkpoint of adapters says of them.

    Args:
      base: stage directory (its newest step) or step; within one workdir it is named relative to the adapters'.
      scales: of each adapter, for each layer.
    """
    base_stage, step = locate(base)
    path = step_directory(base_stage, step)
    same_workdir = base_stage.parent == files.absolute(stage_directory).parent
    return {
        "base": os.path.relpath(path, files.absolute(stage_directory)) if same_workdir else str(path),
        "base_fingerprint": files.fingerprint(read_meta(base_stage, step)),
        "ranks": ranks,
        "scales": scales,
    }


def base_of(stage_directory: Path, meta: Meta) -> Path:
    """The checkpoint on which the adapters of a stage lie; an error where it is gone, or another one is there."""
    adapter = meta["adapter"]
    path = Path(os.path.normpath(stage_directory / adapter["base"]))
    if not path.is_dir():
        raise UserError(f"checkpoint: {stage_directory} holds adapters of {path}, which is not there; bring it back")
    if files.fingerprint(read_meta(*locate(path))) != adapter["base_fingerprint"]:
        raise UserError(
            f"checkpoint: {stage_directory} holds adapters of {path}, but another model has taken its place since; "
            "bring back the one that they were trained on"
        )
    return path


def load_adapters(path: str | Path, mesh: jax.sharding.Mesh | None = None) -> Adapters:
    """The adapters of a checkpoint alone, float32, onto the mesh if there is one."""
    stage_directory, step = locate(path)
    meta = read_meta(stage_directory, step)
    if "adapter" not in meta:
        raise UserError(f"checkpoint: {path} holds a whole model, and no adapters")
    cfg, ranks, scales = config.read_model(meta), meta["adapter"]["ranks"], meta["adapter"]["scales"]
    shapes = model.lora.adapter_shapes(cfg, ranks)
    axes, _ = model.lora.adapter_axes(cfg, ranks)
    params = _restore(stage_directory, step, shapes, parallel.tree_shardings(mesh, axes, shapes) if mesh else None)
    return Adapters(cfg, ranks, params, model.lora.scale_tree(scales), base_of(stage_directory, meta), meta)
