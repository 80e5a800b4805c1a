"""Checkpoints of any size, read and written a layer at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from tanuki_jax import config, files, model
from tanuki_jax.checkpoint import sums
from tanuki_jax.checkpoint.loading import base_of, check_sums, locate, read_meta, without_adapter
from tanuki_jax.checkpoint.stages import disk_errors, join_orbax
from tanuki_jax.errors import UserError

AHEAD = 3  # blocks on their way to the disk while the next one is made: the matrices of an expert


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array that lies in a file; `read(i)` reads row i of its first axis (a layer), `read()` all of it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint's parameters by path, "layers/attn/q" say, none of which has been read yet.

    What is read is compared with its check sum where it is a whole file.  `verified()` compares all other files, once, and is
    an error where they differ: to be asked before anyone sees what was made of the checkpoint.
    """

    cfg: config.Model
    tree: dict[str, Stored]
    meta: dict[str, Any]
    stage_directory: Path
    verified: Callable[[], None] = lambda: None

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer lies: in a directory of its own, or beside the weights."""
        own = self.stage_directory / "tokenizer"
        return own if own.is_dir() else self.stage_directory


def open_stored(path: str | Path) -> Opened:
    """A checkpoint of ours, to be read a layer at a time; adapters come merged into what they lie on."""
    stage_directory, step = locate(path)
    reading = sums.Reading(stage_directory / "checkpoints" / str(step))
    verified = functools.cache(lambda: check_sums(stage_directory, step, "params", reading.right))
    meta = read_meta(stage_directory, step)
    cfg = config.from_dict(config.Model, meta["model"])
    if "adapter" in meta:
        base = open_stored(base_of(stage_directory, meta))
        scales, ranks = meta["adapter"]["scales"], meta["adapter"]["ranks"]
        sides = _opened(stage_directory, step, [f"lora/{name}/{side}" for name in ranks for side in "ab"], reading, verified)
        tree = dict(base.tree)
        for name in ranks:
            a, b = sides[f"lora/{name}/a"], sides[f"lora/{name}/b"]
            tree[name] = _merged(name, tree[name], a, b, np.array(scales[name]))

        def both() -> None:
            verified()
            base.verified()

        return Opened(cfg, tree, without_adapter(meta), stage_directory, both)
    names = [name for name, _, _ in model.named_parameters(cfg)]
    return Opened(cfg, _opened(stage_directory, step, names, reading, verified), meta, stage_directory, verified)


def _merged(name: str, base: Stored, a: Stored, b: Stored, scale_L: np.ndarray) -> Stored:
    def read(*row: int) -> np.ndarray:
        scale = np.float32(scale_L[row[0]] if row else scale_L)
        return np.asarray(model.lora.merged(name, base.read(*row), a.read(*row), b.read(*row), scale))

    return Stored(base.shape, base.dtype, read)


def _opened(
    stage_directory: Path, step: int, names: list[str], reading: sums.Reading, verified: Callable[[], None]
) -> dict[str, Stored]:
    """Arrays of the item `params` of a step, by path.  Where one cannot be read, check sums say best why."""
    home = stage_directory / "checkpoints" / str(step) / "params"
    try:
        written = files.read_json(home / "_METADATA")
    except (OSError, UserError) as error:
        verified()
        raise UserError(f"checkpoint: {stage_directory} step {step} cannot be read: {str(error).splitlines()[0]}") from error
    driver = "zarr3" if written.get("use_zarr3") else "zarr"

    def opened(name: str) -> Stored:
        mapped = {"driver": "file", "file_io_mode": {"mode": "memmap"}}  # half the time of reading
        plain = {**mapped, "path": f"{home}/{name.replace('/', '.')}/"}
        packed = {"driver": "ocdbt", "base": {**mapped, "path": f"{home}/"}, "path": f"{name.replace('/', '.')}/"}
        store = packed if (home / "manifest.ocdbt").is_file() else plain
        try:
            array = tensorstore.open({"driver": driver, "kvstore": store, "fill_missing_data_reads": False}, read=True).result()
        except ValueError as error:
            verified()
            raise UserError(f"checkpoint: {stage_directory} step {step} has no parameter {name}, or it is damaged") from error

        blocks = None if store is packed else _block_file(home / name.replace("/", "."))

        def read(*row: int) -> np.ndarray:
            try:
                if blocks and (path := blocks(row)):
                    block = np.asarray(np.memmap(path, array.dtype.numpy_dtype, "r", shape=array.shape[len(row) :]))
                    if reading.differs(_in_step(path), block):
                        verified()
                    return block
                return array[row].read().result() if row else array.read().result()
            except (ValueError, OSError) as error:
                verified()
                raise UserError(f"checkpoint: {name} in {home} is damaged: {str(error).splitlines()[0]}") from error

        return Stored(tuple(array.shape), array.dtype.name, read)

    return {name: opened(name) for name in names}


def _block_file(directory: Path) -> Callable[[tuple[int, ...]], Path | None] | None:
    """Where a block lies by its leading indices, if it is a file of plain numbers, as `save_streamed` writes them."""
    try:
        how = files.read_json(directory / ".zarray")
    except OSError:
        return None
    if how.get("compressor") or how.get("filters") or how.get("order") != "C":
        return None
    shape, chunk = how["shape"], how["chunks"]

    def path(row: tuple[int, ...]) -> Path | None:
        if chunk != [*(1,) * len(row), *shape[len(row) :]] or not all(shape):
            return None
        return directory / _file_of(row, len(shape), how.get("dimension_separator", "."))

    return path


def _file_of(row: tuple[int, ...], axes: int, separator: str = ".") -> str:
    """What zarr calls the chunk that begins at these leading indices and holds all of the other axes."""
    return separator.join(map(str, [*row, *(0,) * (axes - len(row))]))


def _in_step(block: Path) -> str:
    """The path of a block's file in the directory of its step."""
    return f"params/{block.parent.name}/{block.name}"


Block = tuple[str, tuple[int, ...], np.ndarray]  # name, leading indices, array


class _Streamed:
    """Stands for an array that comes in blocks; what Orbax asks of a leaf."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, block: tuple[int, ...]) -> None:
        self.name, self.shape, self.dtype, self.block = name, shape, np.dtype(dtype), block
        self.ndim, self.size = len(shape), math.prod(shape)
        self.nbytes = self.size * self.dtype.itemsize


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Opens all arrays, then writes the blocks in the order in which they come; restored as any other array.

    Orbax and TensorStore write what describes the arrays.  The blocks, which are files of plain numbers, are written here: a
    copy less of every byte, and its check sum by the way.
    """

    def __init__(self, count: int, blocks: Iterator[Block]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._count, self._blocks = count, blocks
        self._directories: dict[str, Path] = {}
        self.sums: dict[str, list[int]] = {}  # of the files, by their paths in the directory of a step

    def typestr(self) -> str:
        return "jax.Array"

    async def _open_and_write(self, value: _Streamed, tspec: dict[str, Any], ts_context: Any) -> None:
        tspec["metadata"] |= {"chunks": value.block, "compressor": None}  # weights hardly shrink
        store: Any = await tensorstore.open(tspec, create=True, open=True, context=ts_context)
        self._directories[value.name] = Path(store.kvstore.path)
        if len(self._directories) == self._count:
            self._write()

    def _write(self) -> None:
        def written(path: Path, block: np.ndarray) -> tuple[str, list[int]]:
            return _in_step(path), sums.write(path, block)

        paths = ((self._directories[name] / _file_of(at, len(at) + block.ndim), block) for name, at, block in self._blocks)
        # After an error, too, nothing is left that would still write.
        self.sums = dict(files.ahead((functools.partial(written, *one) for one in paths), AHEAD, AHEAD))


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

    writing = _StreamHandler(len(leaves), until_stopped())
    registry = ocp.type_handlers.create_type_handler_registry((_Streamed, writing))
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
            join_orbax()
            raise
        sums.seal(directory / "0", 0, 1, writing.sums)
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
