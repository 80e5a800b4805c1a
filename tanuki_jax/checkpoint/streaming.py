"""Checkpoints of any size, written in blocks as they come; by Orbax, and what it takes longer for by us."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from tanuki_jax import config, files, model
from tanuki_jax.checkpoint import checksums
from tanuki_jax.checkpoint.lazy import Block, block_shape, file_of, in_step
from tanuki_jax.checkpoint.manager import join_orbax

PREFETCH = 3  # blocks on their way to the disk while the next one is made: the matrices of an expert


class _Stream:
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

    async def _open_and_write(self, value: _Stream, tspec: dict[str, Any], ts_context: Any) -> None:
        tspec["metadata"] |= {"chunks": value.block, "compressor": None}  # weights hardly shrink
        store: Any = await tensorstore.open(tspec, create=True, open=True, context=ts_context)
        self._directories[value.name] = Path(store.kvstore.path)
        if len(self._directories) == self._count:
            self._write()

    def _write(self) -> None:
        def written(path: Path, block: np.ndarray) -> tuple[str, list[int]]:
            return in_step(path), checksums.write(path, block)

        paths = ((self._directories[name] / file_of(at, len(at) + block.ndim), block) for name, at, block in self._blocks)
        # After an error, too, nothing is left that would still write.
        self.sums = dict(files.prefetch((functools.partial(written, *one) for one in paths), PREFETCH, PREFETCH))


def save_streaming(stage_directory: Path, cfg: config.ModelConfig, blocks: Iterator[Block], meta: dict[str, Any]) -> None:
    """Writes a model's parameters as step 0 of a stage from blocks (name, leading indices, array), none of which is kept.

    Experts come one by one (two leading indices), other layers whole (one), the rest at once (none).
    """
    shapes = {name: (shape, str(np.dtype(leaf.dtype))) for (name, _, shape), leaf in _with_leaves(cfg)}
    leaves = {name: _Stream(name, shape, dtype, block_shape(name, shape)) for name, (shape, dtype) in shapes.items()}
    stopped = threading.Event()

    def until_stopped() -> Iterator[Block]:
        for block in blocks:
            if stopped.is_set():
                raise RuntimeError("stopped")
            yield block

    writing = _StreamHandler(len(leaves), until_stopped())
    registry = ocp.type_handlers.create_type_handler_registry((_Stream, writing))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    directory = files.absolute(stage_directory) / "checkpoints"
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *groups, last = name.split("/")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = leaf
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    handlers = {"params": handler, "meta": ocp.JsonCheckpointHandler()}
    with files.disk_errors(directory), ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
        items = {"params": ocp.args.PyTreeSave(tree), "meta": ocp.args.JsonSave({**meta, "step": 0})}
        try:
            manager.save(0, args=ocp.args.Composite(**items))
        except BaseException:  # Ctrl-C comes to this thread, while another one goes on writing
            stopped.set()
            join_orbax()
            raise
        checksums.write_checksums(directory / "0", 0, 1, writing.sums)
        files.sync(directory)


def _with_leaves(cfg: config.ModelConfig) -> Iterator[tuple[tuple[str, str, tuple[int, ...]], Any]]:
    yield from zip(model.named_parameters(cfg), jax.tree.leaves(model.parameter_shapes(cfg)), strict=True)
