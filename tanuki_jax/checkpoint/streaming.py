"""Checkpoints of any size, written in blocks as they come: what describes them by Orbax, the blocks by us, which is faster."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from tanuki_jax import config, files, model
from tanuki_jax.checkpoint import checksums
from tanuki_jax.checkpoint.checksums import Checksum
from tanuki_jax.checkpoint.lazy import Block, block_shape, file_of, in_step
from tanuki_jax.checkpoint.manager import join_orbax
from tanuki_jax.checkpoint.meta import Meta
from tanuki_jax.checkpoint.sharding import Tree
from tanuki_jax.config.checkpoint_paths import checkpoints_directory, step_directory

PREFETCH = 3  # blocks that are written while the next one is made: the matrices of an expert


class _Stream:
    """An array that comes in blocks, with the attributes that Orbax expects of a leaf."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, block: tuple[int, ...]) -> None:
        self.name, self.shape, self.dtype, self.block = name, shape, np.dtype(dtype), block
        self.ndim, self.size = len(shape), math.prod(shape)
        self.nbytes = self.size * self.dtype.itemsize


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Opens all arrays, then writes the blocks in the order in which they come; they restore like any other array.

    Orbax and TensorStore write what describes the arrays.  The blocks, which are files of plain numbers, are written here:
    that saves a copy of every byte, and computes its check sum on the way.
    """

    def __init__(self, count: int, blocks: Iterator[Block]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._count, self._blocks = count, blocks
        self._directories: dict[str, Path] = {}
        self.sums: dict[str, Checksum] = {}  # of the files, by their paths in the directory of a step

    def typestr(self) -> str:
        return "jax.Array"

    async def _open_and_write(self, value: _Stream, tspec: Tree, ts_context: tensorstore.Context) -> None:
        tspec["metadata"] |= {"chunks": value.block, "compressor": None}  # weights hardly shrink
        store = await tensorstore.open(tspec, create=True, open=True, context=ts_context)
        assert store.kvstore is not None  # it was just made
        self._directories[value.name] = Path(store.kvstore.path)
        if len(self._directories) == self._count:
            self._write()

    def _write(self) -> None:
        def write(path: Path, block: np.ndarray) -> tuple[str, Checksum]:
            return in_step(path), checksums.write(path, block)

        calls = (
            functools.partial(write, self._directories[name] / file_of(at, len(at) + block.ndim), block)
            for name, at, block in self._blocks
        )
        # Even after an error, no thread is left that would still write.
        self.sums = dict(files.prefetch(calls, PREFETCH, PREFETCH))


def save_streaming(stage_directory: Path, cfg: config.ModelConfig, blocks: Iterator[Block], meta: Meta) -> None:
    """Writes a model's parameters as step 0 of a stage from blocks (name, leading indices, array), none of which is kept.

    Experts come one by one (two leading indices), other parameters of layers one layer at a time (one), all others whole
    (none).
    """
    stopped = threading.Event()

    def until_stopped() -> Iterator[Block]:
        for block in blocks:
            if stopped.is_set():
                raise RuntimeError("stopped")
            yield block

    streams = _streams(cfg)
    stream_handler = _StreamHandler(len(streams), until_stopped())
    registry = ocp.type_handlers.create_type_handler_registry((_Stream, stream_handler))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    stage_directory = files.absolute(stage_directory)
    directory = checkpoints_directory(stage_directory)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    handlers = {"params": handler, "meta": ocp.JsonCheckpointHandler()}
    with files.disk_errors(directory), ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
        params = model.lora.to_tree({stream.name: stream for stream in streams})
        items = {"params": ocp.args.PyTreeSave(params), "meta": ocp.args.JsonSave({**meta, "step": 0})}
        try:
            manager.save(0, args=ocp.args.Composite(**items))
        except BaseException:  # Ctrl-C comes to this thread, while another one goes on writing
            stopped.set()
            join_orbax()
            raise
        checksums.write_checksums(step_directory(stage_directory, 0), 0, 1, stream_handler.sums)
        files.sync(directory)


def _streams(cfg: config.ModelConfig) -> list[_Stream]:
    """One stream per parameter of a model."""
    return [
        _Stream(name, shape, model.parameter_dtype(cfg, name), block_shape(name, shape))
        for name, _, shape in model.named_parameters(cfg)
    ]
