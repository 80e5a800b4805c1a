"""Upcycling a checkpoint of any size: layer by layer, expert by expert, from file to file, with an identity check alongside.

Memory holds two dense layers, one of them being read, a few experts and what is being written.  The result is that of
`upcycle.upcycle`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeAlias, TypedDict, TypeVar

import jax
import numpy as np

from tanuki_jax import checkpoint, config, files, interop, model, upcycle
from tanuki_jax.checkpoint import LazyCheckpoint
from tanuki_jax.data.tokenizer import copy_tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tanuki_jax.progress import Progress, duration
from tanuki_jax.upcycle import packed_bf16
from tanuki_jax.upcycle.convert import Stats
from tanuki_jax.upcycle.identity_check import TOKENS, Arrays, Identity, IdentityCheck

T = TypeVar("T")
Call: TypeAlias = Callable[[], np.ndarray]


def open_dense(path: str, param_dtype: str = "") -> LazyCheckpoint:
    """A dense checkpoint, ours or a Hugging Face directory, to be read a layer at a time.

    Adapters are merged into what they lie on in `param_dtype`, or in the dtype of that.
    """
    if not path or not Path(path).is_dir():
        raise UserError(f"--checkpoint: no such directory: {path}")
    published = interop.is_huggingface(Path(path))
    opened = interop.open_llama(Path(path)) if published else checkpoint.open_lazy(path, param_dtype)
    if opened.cfg.n_experts:
        raise UserError(f"upcycle: {path} is a mixture already; give a dense one")
    return opened


def check_alike(sources: Sequence[LazyCheckpoint]) -> None:
    """An error that names the first difference between several dense checkpoints."""
    first = sources[0]
    for other in sources[1:]:
        for name, stored in first.tree.items():
            if other.tree[name].shape != stored.shape:
                raise UserError(
                    f"upcycle: {name} has shape {list(stored.shape)} in {first.stage_directory} and "
                    f"{list(other.tree[name].shape)} in {other.stage_directory}; experts come from checkpoints of one shape"
                )
        alike = dataclasses.replace(other.cfg, param_dtype=first.cfg.param_dtype)
        checkpoint.check_architecture(str(other.stage_directory), config.to_dict(alike), first.cfg)


class Job(NamedTuple):
    """What to make a mixture from, and how."""

    sources: tuple[LazyCheckpoint, ...]
    cfg: config.ModelConfig
    options: config.Upcycle
    seed: int


def plan(
    checkpoints: Sequence[str], shape: Mapping[str, object], settings: Mapping[str, object], seed: int, dtype: str = ""
) -> Job:
    """Opens the dense checkpoints and checks that the mixture can be made; nothing is read yet.

    shape: keys of upcycle.MOE_KEYS; settings: keys of config.Upcycle; dtype: of the output, by default the checkpoint's.
    """
    sources = tuple(open_dense(path, dtype or "") for path in checkpoints)
    check_alike(sources)
    cfg = upcycle.moe_config(sources[0].cfg, **shape)
    config.check_moe(cfg, "upcycle: ")
    cfg = dataclasses.replace(cfg, param_dtype=dtype or cfg.param_dtype)
    options = config.from_dict(config.Upcycle, {**settings, "experts_from": tuple(checkpoints[1:])})
    upcycle.check(cfg, options)
    return Job(sources, cfg, options, seed)


def run(job: Job, output: Path) -> str:
    """Makes the mixture and returns a table that describes it.  `output` is written whole or not at all."""
    began = time.monotonic()
    with lock.output(output), files.disk_errors(output), files.atomic_path(output) as temporary:
        first = job.sources[0]
        meta: checkpoint.Meta = {
            **first.meta,
            "stage": "upcycle",
            "model": config.to_dict(job.cfg),
            "data_fingerprint": "",
            "upcycle": config.to_dict(job.options) | {"seed": job.seed, "from": str(first.stage_directory)},
            "id": uuid.uuid4().hex,
        }
        identity = write(job, temporary, meta)
        for source in job.sources:
            source.verify()
            if loss := source.merge_loss_message:
                print(f"upcycle: {source.stage_directory}: {loss}; --param_dtype=float32 keeps it", file=sys.stderr)
        copy_tokenizer(first.tokenizer_directory, temporary / "tokenizer")
    seconds = time.monotonic() - began
    size = _bytes(job.cfg)
    return _table(
        job,
        [
            ("output", str(output)),
            ("written", f"{size / 1e9:,.2f} GB in {seconds:,.0f} s, {size / 1e6 / seconds:,.0f} MB/s"),
            (
                "identity",
                f"logits of {TOKENS} random tokens differ by at most {identity.difference:.2e} "
                f"(their deviation is {identity.spread:.2f}): {_kind(job, identity)}",
            ),
        ],
    )


def _kind(job: Job, identity: Identity) -> str:
    """The outcome of the identity check in words."""
    if identity.difference <= 1e-4 * identity.spread:
        return "exact up to the order of sums"
    parts = upcycle.granularity(job.cfg)
    if job.options.strategy == "groups" and job.cfg.top_k % parts == 0 and parts & (parts - 1):
        return f"the dense model's function but for weights of down, which {parts} parts, no power of two, round"
    return "not the dense model's function"


def format_prediction(job: Job, output: Path) -> str:
    """The same table with what `run` would need."""
    needs = predict(job, output)
    return _table(
        job,
        [
            ("output", f"{needs['bytes'] / 1e9:,.2f} GB"),
            ("time", f"about {duration(needs['seconds'])}, at {needs['disk_bytes_per_second'] / 1e6:,.0f} MB/s of the disk"),
            ("memory", f"about {needs['memory'] / 2**30:,.1f} GiB"),
        ],
    )


def _table(job: Job, lines: list[tuple[str, str]]) -> str:
    (before, _), (total, active) = model.count_parameters(job.sources[0].cfg), model.count_parameters(job.cfg)
    cfg, options = job.cfg, job.options
    detail = {"copy": "", "noise": f" of N(0, {options.noise_std:g}^2)", "drop": f" of {options.drop_ratio:g}"}
    detail["groups"] = f" of {upcycle.granularity(cfg)} parts"
    gate = f"normalised gate, lambda {cfg.gate_scale:g}" if cfg.normalized_gate else "plain gate"
    layers = len(config.moe_layers(cfg))
    rows = [
        ("parameters", f"{before:,} -> {total:,} ({active:,} active for a token), {cfg.param_dtype}"),
        ("mixture", f"{cfg.n_experts} experts, top-{cfg.top_k}, {gate}, in {layers} of {cfg.n_layers} layers"),
        ("strategy", f"{options.strategy}{detail[options.strategy]}, from {len(job.sources)} dense checkpoint(s)"),
        ("router", f"{options.router_init}, std {options.router_std:g}"),
        ("seed", str(job.seed)),
    ]
    return "\n".join(f"{name:12s}{text}" for name, text in (*rows, *lines))


def write(job: Job, output: Path, meta: checkpoint.Meta) -> Identity:
    """Writes the mixture to `output` as step 0 of a stage and returns the identity check."""
    key = jax.random.key(job.seed)
    progress = Progress("upcycle", _bytes(job.cfg), "MB", 1e6)
    with (
        contextlib.closing(IdentityCheck(job.sources[0].cfg, job.cfg, key)) as check,
        contextlib.closing(_blocks(job, key, check)) as blocks,
    ):
        checkpoint.save_streaming(output, job.cfg, _show_progress(blocks, progress), meta)
        return check.result()


def _bytes(cfg: config.ModelConfig) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.parameter_shapes(cfg)))


def _show_progress(blocks: Iterator[checkpoint.Block], progress: Progress) -> Iterator[checkpoint.Block]:
    done = 0
    for block in blocks:
        yield block
        done += block[2].nbytes
        progress.show(done)


def _blocks(job: Job, key: jax.Array, check: IdentityCheck) -> Generator[checkpoint.Block]:
    """The whole mixture in blocks, in the order in which a token meets them."""
    sources, cfg, options, _ = job
    moe_layers, dense_layers = config.moe_layers(cfg), upcycle.dense_layers(cfg)
    make_experts = _ExpertMaker(cfg, options, key)
    parts = _dense_parts(sources, cfg)
    embedding = next(parts).shared
    check.begin(embedding["embed/table"])
    yield from _unstacked(embedding)
    del embedding
    for layer in range(cfg.n_layers):
        shared, ffns = next(parts)
        for name, array in shared.items():
            yield f"layers/{name}", (layer,), array
        if layer in moe_layers:
            at = moe_layers.index(layer)
            router = np.asarray(upcycle.router(layer, cfg, options, key, np.dtype(cfg.param_dtype)))
            check.enter(shared, ffns[0], router)
            yield "layers/moe/router", (at,), router
            if cfg.router_bias:
                yield "layers/moe/bias", (at,), np.zeros(cfg.n_experts, np.float32)
            # An expert is made while the one before it is written.
            for number, expert in enumerate(files.prefetch(make_experts.calls(ffns, layer), 1, threads=1)):
                check.expert(number, expert)
                for name in model.FFN_MATRICES:
                    yield f"layers/moe/{name}", (at, number), expert[name]
        else:
            check.enter(shared, ffns[0])
            for name in model.FFN_MATRICES:
                yield f"layers/mlp/{name}", (dense_layers.index(layer),), ffns[0][name]
    output = next(parts).shared
    check.end(output["norm_final"], output["head"])
    yield from _unstacked(output)


def _unstacked(arrays: Arrays) -> Iterator[checkpoint.Block]:
    """The blocks of parameters outside the layers."""
    for name, array in arrays.items():
        yield name, (), array


class _DensePart(NamedTuple, Generic[T]):
    """A part of the dense models: its arrays in the mixture's dtypes, or the calls that read them."""

    shared: dict[str, T]  # what the sources have in common: the mean of theirs
    ffns: list[dict[str, T]]  # of each source; only the mean where the layer stays dense


def _dense_parts(sources: Sequence[LazyCheckpoint], cfg: config.ModelConfig) -> Iterator[_DensePart[np.ndarray]]:
    """Embedding, layers, and the last norm with the head; array by array, a layer is read while the one before is used."""
    reader = _DenseReader(sources, cfg)
    layers = [reader.layer(layer) for layer in range(cfg.n_layers)]
    parts = [reader.outside("embed/table"), *layers, reader.outside("norm_final", "head")]
    count = max(len(jax.tree.leaves(layer)) for layer in layers)
    arrays = files.prefetch(jax.tree.leaves(parts), count, threads=1)
    for part in parts:
        yield jax.tree.map(lambda _: next(arrays), part)


class _DenseReader:
    """Calls that read the dense models; NaN and Inf are errors."""

    def __init__(self, sources: Sequence[LazyCheckpoint], cfg: config.ModelConfig) -> None:
        self._sources, self._cfg, self._moe_layers = sources, cfg, config.moe_layers(cfg)
        names = [name for name, _, _ in model.named_parameters(sources[0].cfg) if name.startswith("layers/")]
        self._shared = [name.removeprefix("layers/") for name in names if not name.startswith("layers/mlp/")]

    def outside(self, *names: str) -> _DensePart[Call]:
        """Parameters outside the layers."""
        shared: dict[str, Call] = {name: functools.partial(self._mean, name) for name in names}
        return _DensePart(shared, [])

    def layer(self, layer: int) -> _DensePart[Call]:
        """One layer."""
        shared: dict[str, Call] = {name: functools.partial(self._mean, f"layers/{name}", layer) for name in self._shared}
        if layer in self._moe_layers:
            reads: list[Callable[..., np.ndarray]] = [functools.partial(self._read, source) for source in self._sources]
        else:
            reads = [self._mean]
        ffns: list[dict[str, Call]] = [
            {name: functools.partial(read, f"layers/mlp/{name}", layer) for name in model.FFN_MATRICES} for read in reads
        ]
        return _DensePart(shared, ffns)

    def _mean(self, name: str, *layer: int) -> np.ndarray:
        arrays = [self._read(source, name, *layer) for source in self._sources]
        return np.asarray(upcycle.mean(*arrays)) if len(arrays) > 1 else arrays[0]

    def _read(self, source: LazyCheckpoint, name: str, *layer: int) -> np.ndarray:
        array = source.tree[name].read(*layer)
        if not _finite(array):
            where = f"{name}, layer {layer[0]}" if layer else name
            raise UserError(f"upcycle: {source.stage_directory} has NaN or Inf in {where}; use an earlier checkpoint")
        return array.astype(model.parameter_dtype(self._cfg, name), copy=False)


class _ExpertMaker:
    """Makes the experts of a layer one by one: `upcycle.expert`, compiled.

    Where normal numbers are drawn for bfloat16, in matrices of even width, they are drawn in pairs (packed_bf16.py).
    """

    def __init__(self, cfg: config.ModelConfig, options: config.Upcycle, key: jax.Array) -> None:
        self._cfg, self._options, self._key = cfg, options, key
        wide = {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None  # XLA's own choice is 256
        self._expert = jax.jit(upcycle.expert, static_argnames=("cfg", "options"), compiler_options=wide)
        even = cfg.d_model % 2 == cfg.d_ff % 2 == 0
        self._packed = even and cfg.param_dtype == "bfloat16" and options.strategy in upcycle.RANDOM_STRATEGIES

    def calls(self, ffns: Sequence[Arrays], layer: int) -> Iterator[Callable[[], Arrays]]:
        """One call per expert of a layer; ffns: the layer's dense FFNs, from which the experts start in turn."""
        inputs = [{name: packed_bf16.pack(w) for name, w in ffn.items()} for ffn in ffns] if self._packed else ffns
        stats = [upcycle.strategy_stats(ffn, self._options) for ffn in ffns]
        for number in range(self._cfg.n_experts):
            source = number % len(ffns)
            yield functools.partial(self._make, inputs[source], stats[source], number, layer)

    def _make(self, ffn: Arrays, stats: Stats, number: int, layer: int) -> Arrays:
        if self._options.strategy == "copy":
            return ffn  # the same object, by which the identity check knows it
        weights = self._expert(ffn, stats, number, layer, self._cfg, self._options, self._key)
        return {name: np.asarray(w).view(self._cfg.param_dtype) for name, w in weights.items()}


def _finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or Inf; for bfloat16 by the bits of the exponent, which NumPy does much faster."""
    flat, count = array.reshape(-1), files.PIECE // array.dtype.itemsize
    pieces = (flat[at : at + count] for at in range(0, flat.size, count))
    if array.dtype.itemsize != 2:
        return all(np.isfinite(piece).all() for piece in pieces)
    return all(((piece.view(np.uint16) & 0x7F80) != 0x7F80).all() for piece in pieces)


# --- prediction -----------------------------------------------------------------------------------------------------


class Needs(TypedDict):
    """What upcycling needs."""

    bytes: float
    seconds: float
    memory: float  # bytes
    disk_bytes_per_second: float


def predict(job: Job, output: Path) -> Needs:
    """What `run` will need, from timing one expert and the disk; nothing is left behind."""
    sources, cfg, options, _ = job
    size = np.dtype(cfg.param_dtype).itemsize
    layers = config.moe_layers(cfg)
    began = time.monotonic()
    weights = {
        name: sources[0].tree[f"layers/mlp/{name}"].read(layers[0]).astype(cfg.param_dtype) for name in model.FFN_MATRICES
    }
    reading = time.monotonic() - began
    experts = _ExpertMaker(cfg, options, jax.random.key(0)).calls([weights], layers[0])
    for call in itertools.islice(experts, 2):  # the first compiles
        began = time.monotonic()
        call()
        making = time.monotonic() - began
    rate = _disk_rate(output.absolute().parent)
    seconds = _bytes(cfg) / rate + len(layers) * (cfg.n_experts * making + len(sources) * reading)
    ffn = sum(array.size for array in weights.values()) * size
    # Two layers' dense FFNs, one in float32 for the identity check, four experts (made, to be written, and two for the check),
    # the head in float32, and the libraries.
    memory = (2 * len(sources) + 4 / size + 4) * ffn + cfg.d_model * cfg.vocab_size * (size + 4) + 1.0 * 2**30
    return {"bytes": float(_bytes(cfg)), "seconds": seconds, "memory": memory, "disk_bytes_per_second": rate}


def _disk_rate(directory: Path) -> float:
    """Bytes per second at which a file of half a GiB is written there."""
    while not directory.is_dir():
        directory = directory.parent
    block = memoryview(b"\1" * (64 << 20))
    scratch = directory / f".{uuid.uuid4().hex}.tmp"
    began = time.monotonic()
    try:
        with files.disk_errors(directory), files.direct_writer(scratch, 8 * len(block)) as append:
            scratch.unlink()  # a kill leaves nothing
            for _ in range(8):
                append(block)
    finally:
        scratch.unlink(missing_ok=True)
    return 8 * len(block) / (time.monotonic() - began)
