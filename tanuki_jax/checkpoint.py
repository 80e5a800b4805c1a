"""Checkpoints: the only file that imports Orbax.

A stage's directory holds `checkpoints/<step>/{params, optimizer, meta}` and `tokenizer/`.  `meta` has the step, the resolved
model and stage, and the fingerprint of the data, so that resume, export and serving need nothing else.  Saves are
asynchronous and atomic (Orbax writes to a temporary name and renames); a checkpoint restores on any mesh.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import errno
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from tanuki_jax import config, files, model, parallel
from tanuki_jax.errors import UserError

ORBAX_THREADS = ("async_save", "save_finalize", "write_metadata_after_commits")
# Keys of a model that do not change its tree of parameters.
COMPUTED = (
    *("dtype", "remat", "unroll", "logits_chunk", "attention", "experts", "capacity_factor"),
    *("rope_theta", "init_std"),
)
CHUNK = 128 << 20  # bytes
AHEAD = 3  # blocks on their way to the disk while the next one is made: the matrices of an expert
EVERY = 1_000_000  # keep all checkpoints: for opening without deleting


class Checkpoints:
    """The checkpoints of one stage."""

    def __init__(self, stage_directory: Path, keep: int = 1) -> None:
        self.directory = Path(stage_directory).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=keep != EVERY,  # who only reads must not disturb a run that is saving
        )
        with disk_errors(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._given_up = False

    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts writing a train state (train/step.py); its arrays are copied before this returns, so it may be donated.

        Errors of the save before come up here or in `close`.
        """
        optimizer = {"opt_state": state.opt_state, "step": state.step, "key": jax.random.key_data(state.key)}
        balance = {"balance": state.balance} if state.balance else {}
        self.save_items(step, {"params": state.params, "optimizer": optimizer, **balance}, meta)

    def save_items(self, step: int, trees: dict[str, Any], meta: dict[str, Any]) -> None:
        """The same for named trees of arrays."""
        items = {name: ocp.args.StandardSave(tree, save_args=_by_layer(tree)) for name, tree in trees.items()}
        with self._saving():
            self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave({"step": step, **meta})))

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, with the shardings of `like` (a tree of ShapeDtypeStructs)."""
        key = jax.eval_shape(jax.random.key_data, like.key)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=like.step.sharding)
        optimizer = {"opt_state": like.opt_state, "step": like.step, "key": key}
        balance = {"balance": like.balance} if like.balance else {}
        saved = self.restore_items(step, {"params": like.params, "optimizer": optimizer, **balance})
        optimizer = saved.pop("optimizer")
        return dataclasses.replace(like, **saved, **optimizer | {"key": jax.random.wrap_key_data(optimizer["key"])})

    def restore_items(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Some of the named trees of a step."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in like}

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def close(self) -> None:
        """Waits for the last save to be durable."""
        if self._given_up:
            return
        with self._saving():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            self._manager.close()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """A save that fails leaves nothing half-written behind, and no thread that still writes."""
        try:
            with disk_errors(self.directory):
                yield
        except BaseException:
            self._given_up = True
            _join_orbax()
            with suppress(Exception):
                self._manager.close()
            for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _join_orbax() -> None:
    """Waits for Orbax's threads."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax") or thread.name in ORBAX_THREADS:
            threading.Thread.join(thread, 30)  # Orbax's own join would raise the error once more


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Parameters from a directory, and what belongs to them."""

    cfg: config.Model
    params: Any
    meta: dict[str, Any]
    stage_directory: Path

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer lies."""
        return self.stage_directory / "tokenizer"


def locate(path: str | Path) -> tuple[Path, int]:
    """Stage directory and step of a `--checkpoint`: a stage's directory (newest step) or one step's."""
    path = Path(path).absolute()
    if path.name.isdigit() and path.parent.name == "checkpoints" and path.is_dir():
        return path.parent.parent, int(path.name)
    steps = [int(p.name) for p in (path / "checkpoints").glob("*") if p.name.isdigit()] if path.is_dir() else []
    if not steps:
        raise UserError(
            f"checkpoint: {path} has no checkpoints/<step>; give a stage's directory, runs/nano/stages/sft for example"
        )
    return path, max(steps)


def load(path: str | Path, mesh: jax.sharding.Mesh | None = None) -> Loaded:
    """Reads a checkpoint's parameters, onto the mesh where one is given."""
    stage_directory, step = locate(path)
    checkpoints = Checkpoints(stage_directory, keep=EVERY)
    try:
        meta = checkpoints.meta(step)
        cfg = config.from_dict(config.Model, meta["model"])
        shapes = model.parameter_shapes(cfg)
        like = sharded_like(shapes, parameter_shardings(cfg, mesh)) if mesh else single_device(shapes)
        params = checkpoints.restore_items(step, {"params": like})["params"]
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(f"checkpoint: {stage_directory} step {step} cannot be read: {str(error).splitlines()[0]}") from error
    finally:
        checkpoints.close()
    return Loaded(cfg, params, meta, stage_directory)


def read_meta(stage_directory: Path, step: int) -> dict[str, Any]:
    """What was saved beside the arrays of one step."""
    checkpoints = Checkpoints(stage_directory, keep=EVERY)
    try:
        return checkpoints.meta(step)
    finally:
        checkpoints.close()


def save_params(stage_directory: Path, params: Any, meta: dict[str, Any]) -> None:
    """Writes parameters alone as step 0 of a stage (an upcycled or imported model) and waits for it."""
    checkpoints = Checkpoints(stage_directory)
    try:
        checkpoints.save_items(0, {"params": params}, meta)
    finally:
        checkpoints.close()


# --- parameters of any size, a layer at a time ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array that lies in a file; `read(i)` reads row i of its first axis (a layer), `read()` all of it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint's parameters by path, "layers/attn/q" say, none of which has been read yet."""

    cfg: config.Model
    tree: dict[str, Stored]
    meta: dict[str, Any]
    stage_directory: Path

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer lies: in a directory of its own, or beside the weights."""
        own = self.stage_directory / "tokenizer"
        return own if own.is_dir() else self.stage_directory


def open_stored(path: str | Path) -> Opened:
    """A checkpoint of ours, to be read a layer at a time."""
    stage_directory, step = locate(path)
    home = stage_directory / "checkpoints" / str(step) / "params"
    try:
        meta = read_meta(stage_directory, step)
        cfg = config.from_dict(config.Model, meta["model"])
        written = files.read_json(home / "_METADATA")
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"checkpoint: {stage_directory} step {step} cannot be read: {str(error).splitlines()[0]}") from error
    driver = "zarr3" if written.get("use_zarr3") else "zarr"

    def opened(name: str) -> Stored:
        plain = {"driver": "file", "path": f"{home}/{name.replace('/', '.')}/"}
        packed = {"driver": "ocdbt", "base": f"file://{home}/", "path": f"{name.replace('/', '.')}/"}
        store = packed if (home / "manifest.ocdbt").is_file() else plain
        try:
            array = tensorstore.open({"driver": driver, "kvstore": store, "fill_missing_data_reads": False}, read=True).result()
        except ValueError as error:
            raise UserError(f"checkpoint: {stage_directory} step {step} has no parameter {name}, or it is damaged") from error

        def read(*row: int) -> np.ndarray:
            try:
                return array[row].read().result() if row else array.read().result()
            except ValueError as error:
                raise UserError(f"checkpoint: {name} in {home} is damaged: {str(error).splitlines()[0]}") from error

        return Stored(tuple(array.shape), array.dtype.name, read)

    return Opened(cfg, {name: opened(name) for name, _, _ in model.named_parameters(cfg)}, meta, stage_directory)


Block = tuple[str, tuple[int, ...], np.ndarray]  # name, leading indices, array


class _Streamed:
    """Stands for an array that comes in blocks; what Orbax asks of a leaf."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, block: tuple[int, ...]) -> None:
        self.name, self.shape, self.dtype, self.block = name, shape, np.dtype(dtype), block
        self.ndim, self.size = len(shape), math.prod(shape)
        self.nbytes = self.size * self.dtype.itemsize


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Opens all arrays, then writes the blocks in the order in which they come; restored as any other array."""

    def __init__(self, count: int, blocks: Iterator[Block]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._count, self._blocks = count, blocks
        self._stores: dict[str, Any] = {}

    def typestr(self) -> str:
        return "jax.Array"

    async def _open_and_write(self, value: _Streamed, tspec: dict[str, Any], ts_context: Any) -> None:
        tspec["metadata"] |= {"chunks": value.block, "compressor": None}  # weights hardly shrink
        self._stores[value.name] = await tensorstore.open(tspec, create=True, open=True, context=ts_context)
        if len(self._stores) == self._count:
            pending: collections.deque[Any] = collections.deque()
            try:
                for name, index, block in self._blocks:
                    pending.append(_write_block(self._stores[name], index, block))
                    if len(pending) > AHEAD:
                        await pending.popleft()
            finally:  # after an error too, else a write would come back after the directory is removed
                await asyncio.gather(*pending)


def _write_block(store: Any, index: tuple[int, ...], block: np.ndarray) -> Any:
    """Begins to write one chunk.  On a local disk an uncompressed one is a file of its bytes, which needs no copy of them."""
    kvstore = store.spec().to_json()["kvstore"]
    if kvstore["driver"] != "file":
        return store[index].write(block)
    path = Path(kvstore["path"]) / ".".join(map(str, (*index, *(0,) * block.ndim)))
    data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
    return asyncio.get_running_loop().run_in_executor(None, path.write_bytes, data)


def save_streamed(stage_directory: Path, cfg: config.Model, blocks: Iterator[Block], meta: dict[str, Any]) -> None:
    """Writes a model's parameters as step 0 of a stage from blocks (name, leading indices, array), none of which is kept.

    Experts come one by one (two leading indices), other layers whole (one), the rest at once (none).
    """
    shapes = {name: (shape, str(np.dtype(leaf.dtype))) for (name, _, shape), leaf in _with_leaves(cfg)}
    leaves = {name: _Streamed(name, shape, dtype, _block(name, shape)) for name, (shape, dtype) in shapes.items()}
    stopped = threading.Event()

    def until_stopped() -> Iterator[Block]:
        for block in blocks:
            if stopped.is_set():
                raise RuntimeError("stopped")
            yield block

    writing = (_Streamed, _StreamHandler(len(leaves), until_stopped()))
    registry = ocp.type_handlers.create_type_handler_registry(writing)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    directory = Path(stage_directory).absolute() / "checkpoints"
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *groups, last = name.split("/")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = leaf
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    handlers = {"params": handler, "meta": ocp.JsonCheckpointHandler()}
    with disk_errors(directory), ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
        items = {"params": ocp.args.PyTreeSave(tree), "meta": ocp.args.JsonSave({**meta, "step": 0})}
        try:
            manager.save(0, args=ocp.args.Composite(**items))
        except BaseException:  # Ctrl-C comes to this thread, while another one goes on writing
            stopped.set()
            _join_orbax()
            raise
        files.sync(directory)


def _with_leaves(cfg: config.Model) -> Iterator[tuple[tuple[str, str, tuple[int, ...]], Any]]:
    yield from zip(model.named_parameters(cfg), jax.tree.leaves(model.parameter_shapes(cfg)), strict=True)


def _leading(name: str, shape: tuple[int, ...]) -> int:
    """How many indices a block has: layer and expert, layer, or none."""
    return 0 if not name.startswith("layers/") else 2 if len(shape) == 4 and "/moe/" in name else 1


def _block(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a block, and of a chunk on disk."""
    leading = _leading(name, shape)
    return (*(1,) * leading, *shape[leading:])


def block_indices(name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Leading indices of all blocks of a parameter, in order."""
    yield from np.ndindex(*shape[: _leading(name, shape)])


def _by_layer(tree: Any) -> Any:
    """Chunks on disk of at most CHUNK bytes; what is stacked is cut between layers, so that one can be read alone."""

    def chunks(path: Any, leaf: Any) -> ocp.SaveArgs:
        stacked = any(getattr(part, "key", None) == "layers" for part in path)
        return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if stacked else ())

    return jax.tree_util.tree_map_with_path(chunks, tree)


# --- where parameters go --------------------------------------------------------------------------------------------


def parameter_shardings(cfg: config.Model, mesh: jax.sharding.Mesh) -> Any:
    """How a model's parameters are split over a mesh."""
    return parallel.tree_shardings(mesh, model.logical_axes(cfg), model.parameter_shapes(cfg))


def sharded_like(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings."""
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)


def single_device(shapes: Any) -> Any:
    """ShapeDtypeStructs on the first device."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)


def check_architecture(where: str, saved: dict[str, Any], cfg: config.Model) -> None:
    """An error that names what differs between a checkpoint's model and the one asked for."""
    wanted = config.to_dict(cfg)
    saved = config.to_dict(config.from_dict(config.Model, saved))  # keys added since have their defaults
    unused = () if cfg.n_experts else config.MIXTURE
    differing = [
        f"{name} {saved[name]} (here {value})"
        for name, value in wanted.items()
        if name not in (*COMPUTED, *unused) and saved[name] != value
    ]
    if differing:
        raise UserError(
            f"checkpoint: {where} is of another architecture: {', '.join(differing)}; use its config or another checkpoint"
        )


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turns the many ways in which a full or closed disk shows itself into one message."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        text = str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or any(
            sign in text for sign in ("No space left", "ENOSPC", "Disk quota", "RESOURCE_EXHAUSTED", "File too large")
        ):
            raise UserError(
                f"checkpoint: the disk of {directory} is full; free some space and run the same command again"
            ) from error
        if isinstance(error, PermissionError) or "Permission denied" in text or "Read-only file system" in text:
            raise UserError(f"checkpoint: {directory} cannot be written to; check its permissions") from error
        raise


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of scalars and other small things: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
