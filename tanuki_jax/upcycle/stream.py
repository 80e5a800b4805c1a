"""Upcycling a checkpoint of any size: layer by layer, expert by expert, from file to file, with a probe running alongside.

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
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tanuki_jax import checkpoint, config, files, interop, model, upcycle
from tanuki_jax.checkpoint import LazyCheckpoint
from tanuki_jax.data.tokenizer import copy_tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tanuki_jax.progress import Progress, duration
from tanuki_jax.upcycle import packed_bf16
from tanuki_jax.upcycle.identity_check import TOKENS, Identity, IdentityCheck

SHARED_PARAMS = ("attn/q", "attn/k", "attn/v", "attn/o", "norm_attn", "norm_mlp")
QK_NORM = ("attn/norm_q", "attn/norm_k")
Arrays = dict[str, np.ndarray]  # by name, of one FFN


def open_dense(path: str, param_dtype: str = "") -> LazyCheckpoint:
    """A dense checkpoint, ours or a Hugging Face directory, to be read a layer at a time.

    Adapters are merged into what they lie on in `param_dtype`, or in the dtype of that.
    """
    if not path or not Path(path).is_dir():
        raise UserError(f"--checkpoint: no such directory: {path}")
    theirs = interop.is_huggingface(Path(path))
    opened = interop.open_llama(Path(path)) if theirs else checkpoint.open_lazy(path, param_dtype)
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
    """What is to be made of what."""

    sources: tuple[LazyCheckpoint, ...]
    cfg: config.ModelConfig
    options: config.Upcycle
    seed: int


def plan(checkpoints: Sequence[str], shape: dict[str, Any], settings: dict[str, Any], seed: int, dtype: str = "") -> Job:
    """Opens the dense checkpoints and checks that the mixture can be made; nothing is read yet.

    shape: keys of upcycle.SHAPE; settings: keys of config.Upcycle; dtype: of the output, by default the checkpoint's.
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
    """Makes the mixture, and returns a table of what came of it.  `output` is there whole or not at all."""
    began = time.monotonic()
    with lock.output(output), files.disk_errors(output), files.atomic_path(output) as temporary:
        meta = {**job.sources[0].meta, "stage": "upcycle", "model": config.to_dict(job.cfg), "data_fingerprint": ""}
        meta["upcycle"] = config.to_dict(job.options) | {"seed": job.seed, "from": str(job.sources[0].stage_directory)}
        meta["id"] = uuid.uuid4().hex
        identity = write(job, temporary, meta)
        for source in job.sources:
            source.verified()
            if source.told_loss:
                print(f"upcycle: {source.stage_directory}: {source.told_loss}; --param_dtype=float32 keeps it", file=sys.stderr)
        copy_tokenizer(job.sources[0].tokenizer_directory, temporary / "tokenizer")
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
    """What the identity check found, in words."""
    if identity.difference <= 1e-4 * identity.spread:
        return "exact up to the order of sums"
    parts = upcycle.granularity(job.cfg)
    if job.options.strategy == "groups" and job.cfg.top_k % parts == 0 and parts & (parts - 1):
        return f"the dense model's function but for weights of down, which {parts} parts, no power of two, round"
    return "not the dense model's function"


def format_prediction(job: Job, output: Path) -> str:
    """The same table with what `run` would need."""
    found = predict(job, output)
    return _table(
        job,
        [
            ("output", f"{found['bytes'] / 1e9:,.2f} GB"),
            ("time", f"about {duration(found['seconds'])}, at {found['disk_bytes_per_second'] / 1e6:,.0f} MB/s of the disk"),
            ("memory", f"about {found['memory'] / 2**30:,.1f} GiB"),
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


def write(job: Job, output: Path, meta: dict[str, Any]) -> Identity:
    """Writes the mixture to `output` as step 0 of a stage and returns the identity check."""
    key = jax.random.key(job.seed)
    progress = Progress("upcycle", _bytes(job.cfg), "MB", 1e6)
    with (
        contextlib.closing(IdentityCheck(job.sources[0].cfg, job.cfg, key)) as probe,
        contextlib.closing(_blocks(*job[:3], key, probe)) as blocks,
    ):
        checkpoint.save_streaming(output, job.cfg, _shown(blocks, progress), meta)
        return probe.result()


def _bytes(cfg: config.ModelConfig) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.parameter_shapes(cfg)))


def _shown(blocks: Iterator[checkpoint.Block], progress: Progress) -> Iterator[checkpoint.Block]:
    done = 0
    for block in blocks:
        yield block
        done += block[2].nbytes
        progress.show(done)


def _blocks(
    sources: Sequence[LazyCheckpoint], cfg: config.ModelConfig, options: config.Upcycle, key: jax.Array, probe: IdentityCheck
) -> Generator[checkpoint.Block]:
    """All of the mixture in blocks, in the order in which a token meets them."""
    dtype = np.dtype(cfg.param_dtype)

    def read(source: LazyCheckpoint, name: str, *layer: int) -> np.ndarray:
        array = source.tree[name].read(*layer)
        if not _finite(array):
            where = f"{name}, layer {layer[0]}" if layer else name
            raise UserError(f"upcycle: {source.stage_directory} has NaN or Inf in {where}; use an earlier checkpoint")
        return array.astype(model.parameter_dtype(cfg, name), copy=False)

    def shared(name: str, *layer: int) -> np.ndarray:
        """What all have in common: the only source's, or the mean."""
        arrays = [read(source, name, *layer) for source in sources]
        return np.asarray(upcycle.mean(*arrays)) if len(arrays) > 1 else arrays[0]

    def reads() -> Iterator[Callable[[], np.ndarray]]:
        """All that is read, in the order in which it is taken below."""
        yield functools.partial(shared, "embed/table")
        for layer in range(cfg.n_layers):
            yield from (functools.partial(shared, f"layers/{name}", layer) for name in beside)
            names = [f"layers/mlp/{name}" for name in upcycle.FFN]
            if layer in mixtures:
                yield from (functools.partial(read, source, name, layer) for source in sources for name in names)
            else:
                yield from (functools.partial(shared, name, layer) for name in names)
        yield from (functools.partial(shared, name) for name in ("norm_final", "head"))

    experts = _maker(cfg, options, key)
    mixtures, dense = config.moe_layers(cfg), upcycle.dense_layers(cfg)
    beside = SHARED_PARAMS + QK_NORM * cfg.qk_norm
    arrays = files.prefetch(reads(), len(beside) + 3 * len(sources), threads=1)
    table = next(arrays)
    probe.begin(table)
    yield "embed/table", (), table
    del table
    for layer in range(cfg.n_layers):
        rest = {name: next(arrays) for name in beside}
        ffns = [{name: next(arrays) for name in upcycle.FFN} for _ in (sources if layer in mixtures else sources[:1])]
        for name, array in rest.items():
            yield f"layers/{name}", (layer,), array
        if layer in mixtures:
            at = mixtures.index(layer)
            router = np.asarray(upcycle.router(layer, cfg, options, key, dtype))
            probe.enter(rest, ffns[0], router)
            yield "layers/moe/router", (at,), router
            if cfg.router_bias:
                yield "layers/moe/bias", (at,), np.zeros(cfg.n_experts, np.float32)

            for number, made in enumerate(
                files.prefetch(experts(ffns, layer), 1, threads=1)
            ):  # while the one before is written
                probe.expert(number, made)
                for name in upcycle.FFN:
                    yield f"layers/moe/{name}", (at, number), made[name]
        else:
            probe.enter(rest, ffns[0])
            for name in upcycle.FFN:
                yield f"layers/mlp/{name}", (dense.index(layer),), ffns[0][name]
    norm, head = next(arrays), next(arrays)
    probe.end(norm, head)
    yield "norm_final", (), norm
    yield "head", (), head


def _maker(cfg: config.ModelConfig, options: config.Upcycle, key: jax.Array) -> Callable[..., Iterator[Callable[[], Arrays]]]:
    """A function of a layer's dense FFNs and its number, whose results make its experts one by one: `upcycle.expert`, compiled.

    Where normal numbers are drawn for bfloat16, in matrices of even width, it takes them in pairs.
    """
    wide = {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None  # XLA's own choice is 256
    expert = jax.jit(upcycle.expert, static_argnames=("cfg", "options"), compiler_options=wide)
    even = cfg.d_model % 2 == cfg.d_ff % 2 == 0
    paired = even and cfg.param_dtype == "bfloat16" and options.strategy in upcycle.RANDOM_STRATEGIES

    def make(ffn: Arrays, taken: Arrays, known: Any, number: int, layer: int) -> Arrays:
        if options.strategy == "copy":
            return ffn
        made = expert(taken, known, number, layer, cfg, options, key)
        return {name: np.asarray(w).view(cfg.param_dtype) for name, w in made.items()}

    def experts(ffns: Sequence[Arrays], layer: int) -> Iterator[Callable[[], Arrays]]:
        taken = [{name: packed_bf16.pack(w) if paired else w for name, w in ffn.items()} for ffn in ffns]
        sources = list(zip(ffns, taken, (upcycle.strategy_stats(ffn, options) for ffn in ffns), strict=True))
        for number in range(cfg.n_experts):
            yield functools.partial(make, *sources[number % len(sources)], number, layer)

    return experts


def _finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or Inf; of bfloat16 the exponent's bits are looked at, which NumPy does much faster."""
    flat, count = array.reshape(-1), files.PIECE // array.dtype.itemsize
    pieces = (flat[at : at + count] for at in range(0, flat.size, count))
    if array.dtype.itemsize != 2:
        return all(np.isfinite(piece).all() for piece in pieces)
    return all(((piece.view(np.uint16) & 0x7F80) != 0x7F80).all() for piece in pieces)


# --- before it is done ----------------------------------------------------------------------------------------------


def predict(job: Job, output: Path) -> dict[str, float]:
    """Bytes, seconds and peak memory that `run` will need, from timing one expert and the disk; nothing is left behind."""
    sources, cfg, options, _ = job
    size = np.dtype(cfg.param_dtype).itemsize
    layers = config.moe_layers(cfg)
    began = time.monotonic()
    weights = {name: sources[0].tree[f"layers/mlp/{name}"].read(layers[0]).astype(cfg.param_dtype) for name in upcycle.FFN}
    reading = time.monotonic() - began
    experts = _maker(cfg, options, jax.random.key(0))([weights], layers[0])
    for call in itertools.islice(experts, 2):  # the first compiles
        began = time.monotonic()
        call()
        making = time.monotonic() - began
    rate = _disk_rate(output.absolute().parent)
    seconds = _bytes(cfg) / rate + len(layers) * (cfg.n_experts * making + len(sources) * reading)
    ffn = sum(array.size for array in weights.values()) * size
    # Two layers' dense FFNs, one in float32 for the probe, four experts (made, to be written, and two for the probe), the head
    # in float32, and the libraries.
    memory = (2 * len(sources) + 4 / size + 4) * ffn + cfg.d_model * cfg.vocab_size * (size + 4) + 1.0 * 2**30
    return {"bytes": float(_bytes(cfg)), "seconds": seconds, "memory": memory, "disk_bytes_per_second": rate}


def _disk_rate(directory: Path) -> float:
    """Bytes a second that a file of half a GiB takes there."""
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
