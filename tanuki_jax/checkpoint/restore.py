"""Parameters of a finished stage, or of one step, whole and onto a mesh; adapters with the base that they lie on."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from tanuki_jax import config, files, model, multihost, parallel
from tanuki_jax.checkpoint import checksums
from tanuki_jax.config.init_from import locate
from tanuki_jax.errors import UserError

REMOVED, POLL = 2.0, 0.1  # seconds that a step, which lacks a file, may be on its way out; and between two looks
# Keys of a model that do not change its tree of parameters.
TREELESS_KEYS = ("capacity_factor", "rope_theta", "init_std", "param_dtype")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Parameters from a directory, and what belongs to them."""

    cfg: config.ModelConfig
    params: Any
    meta: dict[str, Any]
    stage_directory: Path

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer lies."""
        return self.stage_directory / "tokenizer"


def load(path: str | Path, mesh: jax.sharding.Mesh | None = None, param_dtype: str = "") -> Loaded:
    """Reads a checkpoint's parameters, onto the mesh where one is given; adapters come merged into what they lie on.

    They have the dtype in which they were saved, or `param_dtype`.  Where rounding swallows part of the adapters, that is said.
    """
    stage_directory, step = locate(path)
    meta = read_meta(stage_directory, step)
    if "adapter" in meta:
        found = load_adapters(path, mesh)
        cfg = dataclasses.replace(found.cfg, param_dtype=param_dtype or found.cfg.param_dtype)
        base = load(found.base, mesh, cfg.param_dtype)
        everything = {**base.params, **found.params, **found.scales}
        shardings = (parameter_shardings(cfg, mesh), replicated(mesh)) if mesh else None
        params, losses = jax.jit(model.lora.merge_and_loss, out_shardings=shardings)(everything)
        if (told := model.lora.describe_merge_loss(multihost.to_host(losses), cfg.param_dtype)) and jax.process_index() == 0:
            print(f"{path}: {told}; model.param_dtype='float32' keeps it, and so does restore='adapter'", file=sys.stderr)
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


def _restore(stage_directory: Path, step: int, shapes: Any, shardings: Any) -> Any:
    """The item `params` of a step."""
    from tanuki_jax.checkpoint.manager import KEEP_ALL, Checkpoints

    check_sums(stage_directory, step, "params")
    checkpoints = Checkpoints(stage_directory, keep=KEEP_ALL)
    try:
        like = sharded_like(shapes, shardings) if shardings else single_device(shapes)
        return checkpoints.restore_items(step, {"params": like})["params"]
    except (ValueError, KeyError, FileNotFoundError) as error:
        check_there(stage_directory / "checkpoints" / str(step))
        raise UserError(f"checkpoint: {stage_directory} step {step} cannot be read: {str(error).splitlines()[0]}") from error
    finally:
        checkpoints.close()


def check_sums(stage_directory: Path, step: int, item: str, right: Collection[str] = ()) -> None:
    """An error where the files of an item of a step are not those that were written; to be called by all processes.

    right: files that need no look, by their paths in the step.
    """
    home = Path(stage_directory) / "checkpoints" / str(step)
    wrong = checksums.find_corruption(home, *multihost.process_slice(), item=item, right=right) or (
        "" if home.is_dir() else "it is missing"
    )
    if wrong := multihost.first_error(wrong, "check sums"):
        _is_damaged(home, wrong)


def check_there(home: Path) -> None:
    """An error where the directory of a step, which was there, is gone: a run that goes on keeps only its newest ones."""
    until = time.monotonic() + REMOVED
    while home.is_dir() and any(int(p.name) > int(home.name) for p in home.parent.iterdir() if p.name.isdigit()):
        if time.monotonic() > until:
            return
        time.sleep(POLL)
    if not home.is_dir():
        raise UserError(
            f"checkpoint: {home} was removed while it was read, as a run that goes on removes its older steps; "
            "give the command again for the newest one, or keep more (stages.NAME.keep_latest, keep_every)"
        )


def _is_damaged(home: Path, wrong: str) -> None:
    if "missing" in wrong:
        check_there(home)
    others = sorted((int(p.name) for p in home.parent.iterdir() if p.name.isdigit() and p != home), reverse=True)
    fix = f"use {home.parent / str(others[0])}" if others else "bring back another copy"
    raise UserError(f"checkpoint: {home} is damaged, {wrong}; {fix}")


def read_meta(stage_directory: Path, step: int) -> dict[str, Any]:
    """What was saved beside the arrays of one step."""
    home = Path(stage_directory) / "checkpoints" / str(step)
    if wrong := checksums.find_corruption(home, item="meta"):
        _is_damaged(home, wrong)
    try:
        meta: dict[str, Any] = files.read_json(home / "meta" / "metadata")  # a manager of Orbax takes ten times as long
        config.read_model(meta)
    except KeyError as error:
        raise UserError(f"checkpoint: {stage_directory} step {step} cannot be read: {error} is missing in its meta") from error
    except (ValueError, TypeError, OSError, UserError) as error:
        check_there(home)
        raise UserError(f"checkpoint: {stage_directory} step {step} cannot be read: {str(error).splitlines()[0]}") from error
    return meta


def lineage(meta: dict[str, Any]) -> dict[str, Any]:
    """The stages of the recipe that a checkpoint's weights went through: its own and those it descends from, in order."""
    stages = meta.get("recipe", {}).get("stages", {})
    name, found = meta.get("stage"), []
    while name in stages and name not in found:
        found.append(name)
        name = stages[name]["init_from"]
    return {name: stages[name] for name in reversed(found)} if found else stages


def max_seq_len(meta: dict[str, Any]) -> int:
    """The longest row that a model was trained on, here or before, or that its publisher names; 2048 where it is not known."""
    lengths = [stage["seq_len"] for stage in lineage(meta).values() if stage["kind"] != "upcycle"]
    return max([*lengths, meta.get("longest") or 0]) or 2048


def inherited_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """What the meta of a checkpoint hands to that of whatever is made from it: what its publisher says, and its longest row."""
    return {"longest": max_seq_len(meta)} | {name: meta[name] for name in ("huggingface", "published") if name in meta}


def save_params(stage_directory: Path, params: Any, meta: dict[str, Any]) -> None:
    """Writes parameters alone as step 0 of a stage (an upcycled or imported model) and waits for it."""
    from tanuki_jax.checkpoint.manager import Checkpoints

    checkpoints = Checkpoints(stage_directory)
    try:
        checkpoints.save_items(0, {"params": params}, meta)
    finally:
        checkpoints.close()


# --- adapters -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters from a directory, and the checkpoint that they lie on."""

    cfg: config.ModelConfig
    ranks: dict[str, int]
    params: Any  # {"lora": ...}
    scales: Any  # {"lora_scale": ...}
    base: Path  # one step of a stage
    meta: dict[str, Any]


def adapters_meta(stage_directory: Path, base: Path, ranks: dict[str, int], scales: dict[str, list[float]]) -> dict[str, Any]:
    """What the meta of a checkpoint of adapters says of them.

    Args:
      base: stage directory (its newest step) or step; within one workdir it is named relative to the adapters'.
      scales: of each adapter, for each layer.
    """
    home, step = locate(base)
    path = home / "checkpoints" / str(step)
    near = home.parent == files.absolute(stage_directory).parent
    named = os.path.relpath(path, files.absolute(stage_directory)) if near else str(path)
    return {"base": named, "base_fingerprint": files.fingerprint(read_meta(home, step)), "ranks": ranks, "scales": scales}


def without_adapter(meta: dict[str, Any]) -> dict[str, Any]:
    """What is true of the whole model: that it came of adapters no longer shows."""
    return {name: value for name, value in meta.items() if name != "adapter"}


def base_of(stage_directory: Path, meta: dict[str, Any]) -> Path:
    """The checkpoint on which the adapters of a stage lie; an error where it is gone, or another one is there."""
    told = meta["adapter"]
    path = Path(os.path.normpath(stage_directory / told["base"]))
    if not path.is_dir():
        raise UserError(f"checkpoint: {stage_directory} holds adapters of {path}, which is not there; bring it back")
    home, step = locate(path)
    if files.fingerprint(read_meta(home, step)) != told["base_fingerprint"]:
        raise UserError(
            f"checkpoint: {stage_directory} holds adapters of {path}, but another model has taken its place since; "
            "bring back the one that they were trained on"
        )
    return path


def load_adapters(path: str | Path, mesh: jax.sharding.Mesh | None = None) -> Adapters:
    """The adapters of a checkpoint alone, float32, onto the mesh where one is given."""
    stage_directory, step = locate(path)
    meta = read_meta(stage_directory, step)
    if "adapter" not in meta:
        raise UserError(f"checkpoint: {path} holds a whole model, and no adapters")
    cfg, told = config.read_model(meta), meta["adapter"]
    shapes = model.lora.adapter_shapes(cfg, told["ranks"])
    axes, _ = model.lora.adapter_axes(cfg, told["ranks"])
    params = _restore(stage_directory, step, shapes, parallel.tree_shardings(mesh, axes, shapes) if mesh else None)
    return Adapters(cfg, told["ranks"], params, model.lora.scale_tree(told["scales"]), base_of(stage_directory, meta), meta)


# --- where parameters go --------------------------------------------------------------------------------------------


def parameter_shardings(cfg: config.ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """How a model's parameters are split over a mesh."""
    return parallel.tree_shardings(mesh, model.logical_axes(cfg), model.parameter_shapes(cfg))


def sharded_like(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings."""
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)


def single_device(shapes: Any) -> Any:
    """ShapeDtypeStructs on the first device."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)


def check_architecture(where: str, saved: dict[str, Any], cfg: config.ModelConfig) -> None:
    """An error that names what differs between a checkpoint's model and the one asked for."""
    wanted = config.to_dict(cfg)
    saved = config.to_dict(config.read_model({"model": saved}))  # keys added since have their defaults
    unused = () if cfg.n_experts else config.MOE_KEYS
    differing = [
        f"{name} {saved[name]} (here {value})"
        for name, value in wanted.items()
        if name not in (*TREELESS_KEYS, *unused) and saved[name] != value
    ]
    if differing:
        raise UserError(
            f"checkpoint: {where} is of another architecture: {', '.join(differing)}; use its config or another checkpoint"
        )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of scalars and other small things: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
