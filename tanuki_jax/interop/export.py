"""Our checkpoints as Hugging Face directories: Llama, Mixtral, or Tanuki's own class; streamed, exact, whole or not at all.

A dense model is a Llama and a mixture with the plain gate a Mixtral, with which transformers and vLLM compute what we do.  The
normalised gate cannot be folded into Mixtral's weights (its mean can, its deviation for each token cannot), so such a model is
written with the small modelling file beside it, to be loaded with `trust_remote_code=True`.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tanuki_jax import checkpoint, config, files, model
from tanuki_jax.checkpoint import LazyCheckpoint
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tanuki_jax.interop.huggingface import (
    DOWN,
    DTYPES,
    EXPERT,
    GATE_UP,
    INDEX,
    LAYER,
    OUTER,
    ROUTER,
    ROUTER_FUSED,
    Name,
    published_shape,
    sizes_of,
    transpose,
)
from tanuki_jax.interop.settings import ARCHITECTURES, export_tokenizer, kind_published, settings_of
from tanuki_jax.interop.vocabulary import resize
from tanuki_jax.progress import Progress

AHEAD, THREADS = 10, 2  # pieces that are made while one is written, the tiny ones of norms among them
PIECE = 4 << 20  # bytes of one, at most: transposed in memory that the last one left in the cache, twice as fast as the whole
SHARD = 4_000_000_000  # bytes of a file, at most, unless one tensor is larger


Read = Callable[[], np.ndarray]
Part = list[Read]  # an array of ours in the pieces in which it is written; the first is empty, and reads it for the others


class Tensor(NamedTuple):
    """A published tensor, and how its contents are read: part by part."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: list[Part]


def export_huggingface(path: Path, output: Path, vocab_size: int = 0, param_dtype: str = "") -> str:
    """Writes the checkpoint at `path` as a Hugging Face directory, in its dtype or in `param_dtype`, and says what it is."""
    saved = config.read_model(checkpoint.read_meta(*checkpoint.locate(path))).param_dtype
    opened, exact = resize(checkpoint.open_lazy(path, param_dtype=param_dtype), vocab_size, "export")
    kind = kind_published(opened, kind_of(opened.cfg))
    tensors = list(_tensors(opened, kind))
    with lock.output(output), files.disk_errors(output), files.atomic_path(output) as temporary:
        export_tokenizer(opened.tokenizer_directory, temporary)
        temporary.mkdir(exist_ok=True)
        size = _write(temporary, tensors)
        settings, generation = settings_of(opened, kind)
        files.write_json(temporary / "config.json", settings)
        files.write_json(temporary / "generation_config.json", generation)
        if kind == "tanuki":
            shutil.copy(Path(__file__).with_name("modeling_tanuki.py"), temporary)
        (temporary / "README.md").write_text(_card(opened, kind), encoding="utf-8")
        opened.verified()
    total, active = model.count_parameters(opened.cfg)
    how = ", load with trust_remote_code=True (the normalised gate is no Mixtral)" if kind == "tanuki" else ""
    counts = f"{total:,} parameters" + (f", {active:,} active" if active != total else "")
    if opened.cfg.param_dtype != saved:
        counts += f", cast from {saved} to {opened.cfg.param_dtype}"
    if opened.losses or opened.cfg.param_dtype != saved != "bfloat16":
        exact = exact.replace("exact", "rounded", 1)
    if len({tensor.dtype for tensor in tensors}) > 1:
        counts += ", norms in float32, for bfloat16 would round them"
    if opened.told_loss:
        print(f"export: {opened.told_loss}; --param_dtype=float32 or --format=peft keeps it", file=sys.stderr)
    return f"{output}: {ARCHITECTURES[kind]}{how}; {counts}, {len(tensors)} tensors, {size / 1e9:,.2f} GB, {exact}"


def _norm_dtype(opened: LazyCheckpoint) -> str:
    """The dtype of the model where it holds the scales of all norms as they are, as it does those that were imported in it."""
    dtype = opened.cfg.param_dtype
    if dtype == "float32":
        return dtype
    norms = (opened.tree[path].read() for path in opened.tree if model.is_vector(path))
    return dtype if all((array == array.astype(dtype)).all() for array in norms) else "float32"


def kind_of(cfg: config.ModelConfig) -> str:
    """llama, mixtral or tanuki; an error where no such class computes what the model does."""
    if cfg.qk_norm:
        raise UserError("export: model.qk_norm norms queries and keys; neither Llama, Mixtral nor Tanuki's class does")
    if not cfg.n_experts:
        if cfg.d_model % cfg.n_heads:
            raise UserError(
                f"export: transformers has no Llama whose width {cfg.d_model} is not a multiple of its {cfg.n_heads} heads"
            )
        return "llama"
    if len(config.moe_layers(cfg)) != cfg.n_layers:
        raise UserError("export: some layers of this mixture are dense; neither Mixtral nor Tanuki's class holds that")
    if cfg.router_bias:
        raise UserError("export: model.router_bias chooses experts by a bias; neither Mixtral nor Tanuki's class has one")
    return "tanuki" if cfg.normalized_gate else "mixtral"


def _tensors(opened: LazyCheckpoint, kind: str) -> Iterator[Tensor]:
    """All tensors in the order in which a token meets them."""
    cfg, tree = opened.cfg, opened.tree
    sizes = sizes_of(cfg) | {"F": cfg.expert_d_ff or cfg.d_ff if cfg.n_experts else cfg.d_ff}
    dtypes = {False: cfg.param_dtype, True: _norm_dtype(opened)}

    def one(path: str, name: Name, theirs: str, *at: int) -> Tensor:
        return Tensor(theirs, published_shape(name, sizes), dtypes[model.is_vector(path)], [part(path, name, *at)])

    def part(path: str, name: Name, *at: int) -> Part:
        rows, *rest = published_shape(name, sizes)
        count = math.ceil(rows * math.prod(rest) * np.dtype(tree[path].dtype).itemsize / PIECE)
        dtype = dtypes[model.is_vector(path)]
        whole = _shared(lambda: tree[path].read(*at).astype(dtype, copy=False), count + 1)
        pieces = [slice(0), *(slice(rows * i // count, rows * (i + 1) // count) for i in range(count))]
        return [functools.partial(_rows, name, whole, piece) for piece in pieces]

    def fused(layer: int) -> Iterator[Tensor]:
        E, F, D = cfg.n_experts, sizes["F"], cfg.d_model

        def of_all(*names: str) -> list[Part]:
            return [part(f"layers/{name}", EXPERT[name], layer, number) for number in range(E) for name in names]

        yield Tensor(f"model.layers.{layer}.{GATE_UP}", (E, 2 * F, D), dtypes[False], of_all("moe/gate", "moe/up"))
        yield Tensor(f"model.layers.{layer}.{DOWN}", (E, D, F), dtypes[False], of_all("moe/down"))

    yield one("embed/table", OUTER["embed/table"], OUTER["embed/table"].theirs)
    for layer in range(cfg.n_layers):
        for path, name in LAYER.items():
            if not (cfg.n_experts and path.startswith("mlp/")):
                yield one(f"layers/{path}", name, f"model.layers.{layer}.{name.theirs}", layer)
        if cfg.n_experts:
            router = ROUTER if kind == "mixtral" else ROUTER_FUSED
            yield one("layers/moe/router", router, f"model.layers.{layer}.{router.theirs}", layer)
        if kind == "mixtral":
            for number in range(cfg.n_experts):
                for path, name in EXPERT.items():
                    theirs = f"model.layers.{layer}.{name.theirs.format(number)}"
                    yield one(f"layers/{path}", name, theirs, layer, number)
        elif kind == "tanuki":
            yield from fused(layer)
    for path in ("norm_final", "head"):
        yield one(path, OUTER[path], OUTER[path].theirs)


def _shared(read: Read, count: int) -> Read:
    """What is read once for `count` calls, from any thread, and let go with the last of them."""
    lock, left = threading.Lock(), count
    held: list[np.ndarray] = []

    def call() -> np.ndarray:
        nonlocal left
        with lock:
            if not held:
                held.append(read())
            left -= 1
            return held[0] if left else held.pop()

    return call


def _in_order(parts: Iterable[Part]) -> Iterator[Read]:
    """All pieces in order, but that every part is read while the one before it is written."""
    rest: list[Read] = []
    for first, *pieces in parts:
        yield first
        yield from rest
        rest = pieces
    yield from rest


def _rows(name: Name, read: Read, rows: slice) -> np.ndarray:
    """Rows of an array of ours in the published layout."""
    array = read()
    if not name.transposed:
        return np.ascontiguousarray(array[rows])
    inward = array.shape[:1] if name.axes[0] == "D" else array.shape[:-1]
    return transpose(array.reshape(math.prod(inward), -1)[:, rows])


def _write(directory: Path, tensors: list[Tensor]) -> int:
    """Safetensors files of SHARD bytes and their index; returns the bytes of all tensors.

    The format (a JSON header with the offset of every tensor, then the bytes) is written here, since the library holds a whole
    file in memory.
    """
    letters = {ours: theirs for theirs, ours in DTYPES.items()}
    sizes = {t.name: int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize for t in tensors}
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(sizes[t.name] for t in shards[-1]) + sizes[tensor.name] > SHARD:
            shards.append([])
        shards[-1].append(tensor)
    total, done = sum(sizes.values()), 0
    progress, index = Progress("export", total, "MB", 1e6), {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in shard:
            offsets = [at, at + sizes[tensor.name]]
            header[tensor.name] = {"dtype": letters[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            at, index[tensor.name] = offsets[1], file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with files.direct_writer(directory / file, 8 + len(text) + at, depth=8) as append:
            append(memoryview(struct.pack("<Q", len(text)) + text))
            for piece in files.prefetch(_in_order(part for tensor in shard for part in tensor.parts), AHEAD, THREADS):
                append(piece.reshape(-1).view(np.uint8).data)
                done += piece.nbytes
                progress.show(done)
    if len(shards) > 1:
        files.write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    return total


def _card(opened: LazyCheckpoint, kind: str) -> str:
    """The model card: shape, stages, data, and the scores beside the checkpoint."""
    cfg, recipe = opened.cfg, opened.meta.get("recipe", {})
    total, active = model.count_parameters(cfg)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {recipe.get('name') or opened.stage_directory.name}",
        "",
        f"{ARCHITECTURES[kind]}, {total:,} parameters" + (f", {active:,} active for a token." if cfg.n_experts else "."),
        f"{cfg.n_layers} layers, width {cfg.d_model}, vocabulary {cfg.vocab_size:,}, {cfg.param_dtype}.",
        "Trained with tanuki_jax.",
    ]
    if kind == "tanuki":
        lines += ["", "Load with `trust_remote_code=True`: the gate is normalised over the experts, which Mixtral's is not."]
    if recipe:
        lines += ["", "## Training", "", "| stage | kind | budget | data |", "|---|---|---|---|"]
        for name, stage in checkpoint.lineage(opened.meta).items():
            budget = next((f"{stage[key]:,} {key}" for key in ("tokens", "steps", "epochs") if stage[key]), "")
            data = ", ".join(f"{source} {'/'.join(f'{w:g}' for w in weights)}" for source, weights in stage["mixture"].items())
            lines.append(f"| {name} | {stage['kind']} | {budget} | {data} |")
    done = opened.stage_directory / "done.json"
    if done.is_file() and (scores := files.read_json(done)["entry"].get("scores")):
        shown = {key: value for key, value in scores.items() if isinstance(value, int | float) and key != "seconds"}
        lines += ["", "## Scores", "", "| score | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in shown.items())]
    return "\n".join(lines) + "\n"
