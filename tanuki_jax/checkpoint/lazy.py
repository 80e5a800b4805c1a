"""Checkpoints of any size, read a layer at a time; and the blocks in which such checkpoints are written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorstore

from tanuki_jax import config, files, model
from tanuki_jax.checkpoint import checksums
from tanuki_jax.checkpoint.meta import Meta, without_adapter
from tanuki_jax.checkpoint.restore import base_of, check_sums, read_meta
from tanuki_jax.config.checkpoint_paths import locate, step_directory
from tanuki_jax.errors import UserError

Block = tuple[str, tuple[int, ...], np.ndarray]  # name, leading indices, array


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that lies in files; `read(i)` reads row i of its first axis (a layer), `read()` all of it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class LazyCheckpoint:
    """A checkpoint's parameters by path, "layers/attn/q" for example, none of which has been read yet.

    Files that are read as a whole are compared with their check sums then.  `verify()` compares all others, once, and raises
    where they differ: to be called before anything that was made of the checkpoint is published.
    """

    cfg: config.ModelConfig
    tree: dict[str, LazyArray]
    meta: Meta
    stage_directory: Path
    verify: Callable[[], None] = lambda: None
    losses: list[np.ndarray] = dataclasses.field(default_factory=list)  # of adapters, one per matrix that was merged

    @property
    def merge_loss_message(self) -> str:
        """What rounding has lost of adapters, in all that was read so far; empty where it is nothing to speak of."""
        return model.lora.describe_merge_loss(sum(self.losses), self.cfg.param_dtype) if self.losses else ""

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer lies: in a directory of its own, or beside the weights."""
        subdirectory = self.stage_directory / "tokenizer"
        return subdirectory if subdirectory.is_dir() else self.stage_directory


def open_lazy(path: str | Path, param_dtype: str = "") -> LazyCheckpoint:
    """A checkpoint of ours, to be read a layer at a time; adapters come merged into what they lie on.

    Matrices have the dtype in which they were saved, or `param_dtype`, and norms are float32.
    """
    stage_directory, step = locate(path)
    meta = read_meta(stage_directory, step)
    cfg = config.read_model(meta)
    cfg = dataclasses.replace(cfg, param_dtype=param_dtype or cfg.param_dtype)
    if "adapter" in meta:
        base, losses = open_lazy(base_of(stage_directory, meta), cfg.param_dtype), list[np.ndarray]()
        arrays = _StepArrays(stage_directory, step)
        scales, ranks = meta["adapter"]["scales"], meta["adapter"]["ranks"]
        merged = {}
        for name in ranks:
            a, b = arrays.open(f"lora/{name}/a"), arrays.open(f"lora/{name}/b")
            merged[name] = _merge(name, base.tree[name], a, b, np.array(scales[name]), losses)

        def verify_both() -> None:
            arrays.verify()
            base.verify()

        return LazyCheckpoint(cfg, base.tree | merged, without_adapter(meta), stage_directory, verify_both, losses)
    arrays = _StepArrays(stage_directory, step)
    tree = {name: _cast(arrays.open(name), model.parameter_dtype(cfg, name)) for name, _, _ in model.named_parameters(cfg)}
    return LazyCheckpoint(cfg, tree, meta, stage_directory, arrays.verify)


def _cast(stored: LazyArray, dtype: str) -> LazyArray:
    """The array in another dtype: a cast that was asked for, or norms from before they were always float32."""
    if stored.dtype == dtype:
        return stored
    return LazyArray(stored.shape, dtype, lambda *row: stored.read(*row).astype(dtype))


def _merge(name: str, base: LazyArray, a: LazyArray, b: LazyArray, scale_L: np.ndarray, losses: list[np.ndarray]) -> LazyArray:
    """The array with its adapter added; what rounding loses of it is appended to `losses`."""

    def read(*row: int) -> np.ndarray:
        scale, w = np.float32(scale_L[row[0]] if row else scale_L), base.read(*row)
        exact, change = model.lora.delta(name, w, a.read(*row), b.read(*row), scale)
        merged = exact.astype(w.dtype)
        if w.dtype != np.float32:
            losses.append(np.asarray(model.lora.merge_loss(w, change, exact, merged)))
        return np.asarray(merged)

    return LazyArray(base.shape, base.dtype, read)


class _StepArrays:
    """The arrays of the item `params` of a step.  Where one cannot be read, the check sums give the best explanation."""

    def __init__(self, stage_directory: Path, step: int) -> None:
        self._step = f"{stage_directory} step {step}"
        self._directory = step_directory(stage_directory, step) / "params"
        self._checksums = checksums.ChecksumVerifier(self._directory.parent)
        self.verify = functools.cache(lambda: check_sums(stage_directory, step, "params", self._checksums.verified))
        try:
            metadata = files.read_json(self._directory / "_METADATA")
        except (OSError, UserError) as error:
            self.verify()
            raise UserError(f"checkpoint: {self._step} cannot be read: {str(error).splitlines()[0]}") from error
        self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        self._is_ocdbt = (self._directory / "manifest.ocdbt").is_file()

    def open(self, name: str) -> LazyArray:
        """The array of a parameter; an error where there is none."""
        try:
            array = tensorstore.open(self._spec(name), read=True).result()
        except ValueError as error:
            self.verify()
            raise UserError(f"checkpoint: {self._step} has no parameter {name}, or it is damaged") from error
        blocks = None if self._is_ocdbt else _BlockFiles.of(self._directory / name.replace("/", "."))

        def read(*row: int) -> np.ndarray:
            path = blocks.path(row) if blocks else None
            try:
                if path:
                    return self._read_file(path, array.dtype.numpy_dtype, array.shape[len(row) :])
                return array[row].read().result() if row else array.read().result()
            except (ValueError, OSError) as error:
                self.verify()
                raise UserError(f"checkpoint: {name} in {self._directory} is damaged: {str(error).splitlines()[0]}") from error

        return LazyArray(tuple(array.shape), array.dtype.name, read)

    def _spec(self, name: str) -> dict[str, object]:
        """What TensorStore opens."""
        mapped = {"driver": "file", "file_io_mode": {"mode": "memmap"}}  # takes half the time of reading
        inside, path = f"{name.replace('/', '.')}/", f"{self._directory}/"
        store = (
            {"driver": "ocdbt", "base": {**mapped, "path": path}, "path": inside}
            if self._is_ocdbt
            else {**mapped, "path": path + inside}
        )
        return {"driver": self._driver, "kvstore": store, "fill_missing_data_reads": False}

    def _read_file(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """A block that is a file of plain numbers."""
        block = np.asarray(np.memmap(path, dtype, "r", shape=shape))
        if self._checksums.differs(in_step(path), block):
            self.verify()
        return block


@dataclasses.dataclass(frozen=True)
class _BlockFiles:
    """An array whose blocks are files of plain numbers, as `save_streaming` writes them."""

    directory: Path
    shape: list[int]
    chunk: list[int]
    separator: str

    @classmethod
    def of(cls, directory: Path) -> _BlockFiles | None:
        """Those of a directory; None where its files are compressed or in another order."""
        try:
            zarray = files.read_json(directory / ".zarray")
        except OSError:
            return None
        if zarray.get("compressor") or zarray.get("filters") or zarray.get("order") != "C":
            return None
        return cls(directory, zarray["shape"], zarray["chunks"], zarray.get("dimension_separator", "."))

    def path(self, row: tuple[int, ...]) -> Path | None:
        """The file that holds just what is read at these leading indices; None where there is none."""
        if self.chunk != [*(1,) * len(row), *self.shape[len(row) :]] or not all(self.shape):
            return None
        return self.directory / file_of(row, len(self.shape), self.separator)


def file_of(row: tuple[int, ...], axes: int, separator: str = ".") -> str:
    """The name zarr gives to the chunk at these leading indices that spans all other axes."""
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
