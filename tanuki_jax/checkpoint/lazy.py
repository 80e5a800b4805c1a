"""Checkpoints of any size, read a layer at a time, and the blocks that they are written in that way."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from tanuki_jax import config, files, model
from tanuki_jax.checkpoint import checksums
from tanuki_jax.checkpoint.restore import base_of, check_sums, read_meta, without_adapter
from tanuki_jax.config.init_from import locate
from tanuki_jax.errors import UserError

Block = tuple[str, tuple[int, ...], np.ndarray]  # name, leading indices, array


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that lies in a file; `read(i)` reads row i of its first axis (a layer), `read()` all of it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class LazyCheckpoint:
    """A checkpoint's parameters by path, "layers/attn/q" say, none of which has been read yet.

    What is read is compared with its check sum where it is a whole file.  `verified()` compares all other files, once, and is
    an error where they differ: to be asked before anyone sees what was made of the checkpoint.
    """

    cfg: config.ModelConfig
    tree: dict[str, LazyArray]
    meta: dict[str, Any]
    stage_directory: Path
    verified: Callable[[], None] = lambda: None
    losses: list[np.ndarray] = dataclasses.field(default_factory=list)  # of adapters, each time that a matrix was merged

    @property
    def told_loss(self) -> str:
        """What rounding has lost of adapters, by all that was read; empty where there is nothing to tell."""
        return model.lora.describe_merge_loss(sum(self.losses), self.cfg.param_dtype) if self.losses else ""

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer lies: in a directory of its own, or beside the weights."""
        own = self.stage_directory / "tokenizer"
        return own if own.is_dir() else self.stage_directory


def open_lazy(path: str | Path, param_dtype: str = "") -> LazyCheckpoint:
    """A checkpoint of ours, to be read a layer at a time; adapters come merged into what they lie on.

    Matrices have the dtype in which they were saved, or `param_dtype`, and norms are float32.
    """
    stage_directory, step = locate(path)
    reading = checksums.ChecksumVerifier(stage_directory / "checkpoints" / str(step))
    verified = functools.cache(lambda: check_sums(stage_directory, step, "params", reading.right))
    meta = read_meta(stage_directory, step)
    cfg = config.read_model(meta)
    cfg = dataclasses.replace(cfg, param_dtype=param_dtype or cfg.param_dtype)
    if "adapter" in meta:
        base, losses = open_lazy(base_of(stage_directory, meta), cfg.param_dtype), list[np.ndarray]()
        scales, ranks = meta["adapter"]["scales"], meta["adapter"]["ranks"]
        sides = _open(stage_directory, step, [f"lora/{name}/{side}" for name in ranks for side in "ab"], reading, verified)
        tree = dict(base.tree)
        for name in ranks:
            a, b = sides[f"lora/{name}/a"], sides[f"lora/{name}/b"]
            tree[name] = _merge(name, tree[name], a, b, np.array(scales[name]), losses)

        def both() -> None:
            verified()
            base.verified()

        return LazyCheckpoint(cfg, tree, without_adapter(meta), stage_directory, both, losses)
    names = [name for name, _, _ in model.named_parameters(cfg)]
    found = _open(stage_directory, step, names, reading, verified)
    tree = {name: _cast(stored, model.parameter_dtype(cfg, name)) for name, stored in found.items()}
    return LazyCheckpoint(cfg, tree, meta, stage_directory, verified)


def _cast(stored: LazyArray, dtype: str) -> LazyArray:
    """The array in another dtype: a cast that was asked for, or norms of before they were always float32."""
    if stored.dtype == dtype:
        return stored
    return LazyArray(stored.shape, dtype, lambda *row: stored.read(*row).astype(dtype))


def _merge(name: str, base: LazyArray, a: LazyArray, b: LazyArray, scale_L: np.ndarray, losses: list[np.ndarray]) -> LazyArray:
    def read(*row: int) -> np.ndarray:
        scale, w = np.float32(scale_L[row[0]] if row else scale_L), base.read(*row)
        exact, change = model.lora.delta(name, w, a.read(*row), b.read(*row), scale)
        merged = exact.astype(w.dtype)
        if w.dtype != np.float32:
            losses.append(np.asarray(model.lora.merge_loss(w, change, exact, merged)))
        return np.asarray(merged)

    return LazyArray(base.shape, base.dtype, read)


def _open(
    stage_directory: Path, step: int, names: list[str], reading: checksums.ChecksumVerifier, verified: Callable[[], None]
) -> dict[str, LazyArray]:
    """Arrays of the item `params` of a step, by path.  Where one cannot be read, check sums say best why."""
    home = stage_directory / "checkpoints" / str(step) / "params"
    try:
        written = files.read_json(home / "_METADATA")
    except (OSError, UserError) as error:
        verified()
        raise UserError(f"checkpoint: {stage_directory} step {step} cannot be read: {str(error).splitlines()[0]}") from error
    driver = "zarr3" if written.get("use_zarr3") else "zarr"

    def opened(name: str) -> LazyArray:
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
                    if reading.differs(in_step(path), block):
                        verified()
                    return block
                return array[row].read().result() if row else array.read().result()
            except (ValueError, OSError) as error:
                verified()
                raise UserError(f"checkpoint: {name} in {home} is damaged: {str(error).splitlines()[0]}") from error

        return LazyArray(tuple(array.shape), array.dtype.name, read)

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
        return directory / file_of(row, len(shape), how.get("dimension_separator", "."))

    return path


def file_of(row: tuple[int, ...], axes: int, separator: str = ".") -> str:
    """What zarr calls the chunk that begins at these leading indices and holds all of the other axes."""
    return separator.join(map(str, [*row, *(0,) * (axes - len(row))]))


def in_step(block: Path) -> str:
    """The path of a block's file in the directory of its step."""
    return f"params/{block.parent.name}/{block.name}"


def _leading(name: str, shape: tuple[int, ...]) -> int:
    """How many indices a block has: layer and expert, layer, or none."""
    return 0 if not name.startswith("layers/") else 2 if len(shape) == 4 and "/moe/" in name else 1


def block_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a block, and of a chunk on disk."""
    leading = _leading(name, shape)
    return (*(1,) * leading, *shape[leading:])


def block_indices(name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Leading indices of all blocks of a parameter, in order."""
    yield from np.ndindex(*shape[: _leading(name, shape)])
