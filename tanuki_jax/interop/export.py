"""Our checkpoints as Hugging Face directories: Llama, Mixtral, or Tanuki's own class; streamed, exact, whole or not at all.

A dense model is a Llama and a mixture with the plain gate a Mixtral, with which transformers and vLLM compute what we do.  The
normalised gate cannot be folded into Mixtral's weights (its mean can, its deviation per token cannot), so such a model is
written with the small modelling file beside it, to be loaded with `trust_remote_code=True`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tanuki_jax import checkpoint, config, files, model
from tanuki_jax.checkpoint import LazyCheckpoint
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tanuki_jax.interop import layout
from tanuki_jax.interop.layout import EXPERT, FUSED, LAYER, OUTER, ROUTER, ROUTER_FUSED, Name
from tanuki_jax.interop.settings import ARCHITECTURES, export_tokenizer, kind_published, settings_of
from tanuki_jax.interop.vocabulary import resize
from tanuki_jax.interop.weights import DTYPES, INDEX
from tanuki_jax.progress import Progress

AHEAD, THREADS = 10, 2  # pieces that are made while one is written, the tiny ones of norms among them
PIECE = 4 << 20  # bytes of one, at most: what is transposed within the cache takes half the time
SHARD = 4_000_000_000  # bytes of a file, at most, unless one tensor is larger


@dataclasses.dataclass(frozen=True)
class Part:
    """An array of ours (of one layer, of one expert) that a published tensor, or part of one, is made of."""

    name: Name
    shape: tuple[int, ...]  # as published
    dtype: str
    read: Callable[[], np.ndarray]

    def pieces(self) -> list[slice]:
        """The published rows in pieces of at most PIECE bytes."""
        rows = self.shape[0]
        count = math.ceil(math.prod(self.shape) * np.dtype(self.dtype).itemsize / PIECE)
        return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A published tensor, and the arrays whose contents it holds one behind the other."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: Sequence[Part]

    @property
    def nbytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


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
        opened.verify()
    total, active = model.count_parameters(opened.cfg)
    loading = ", load with trust_remote_code=True (the normalised gate is no Mixtral)" if kind == "tanuki" else ""
    counts = f"{total:,} parameters" + (f", {active:,} active" if active != total else "")
    if opened.cfg.param_dtype != saved:
        counts += f", cast from {saved} to {opened.cfg.param_dtype}"
    if opened.losses or opened.cfg.param_dtype != saved != "bfloat16":
        exact = exact.replace("exact", "rounded", 1)
    if len({tensor.dtype for tensor in tensors}) > 1:
        counts += ", norms in float32, for bfloat16 would round them"
    if opened.merge_loss_message:
        print(f"export: {opened.merge_loss_message}; --param_dtype=float32 or --format=peft keeps it", file=sys.stderr)
    return f"{output}: {ARCHITECTURES[kind]}{loading}; {counts}, {len(tensors)} tensors, {size / 1e9:,.2f} GB, {exact}"


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
    cfg, tree, sizes = opened.cfg, opened.tree, layout.axis_sizes(opened.cfg)
    dtypes = {False: cfg.param_dtype, True: _norm_dtype(opened)}

    def part(path: str, name: Name, *at: int) -> Part:
        dtype = dtypes[model.is_vector(path)]
        read = lambda: tree[path].read(*at).astype(dtype, copy=False)  # noqa: E731
        return Part(name, layout.published_shape(name, sizes), dtype, read)

    def single(path: str, name: Name, theirs: str, *at: int) -> Tensor:
        only = part(path, name, *at)
        return Tensor(theirs, only.shape, only.dtype, [only])

    yield single("embed/table", OUTER["embed/table"], OUTER["embed/table"].theirs)
    for layer in range(cfg.n_layers):
        prefix = f"model.layers.{layer}"
        for path, name in LAYER.items():
            if not (cfg.n_experts and path.startswith("mlp/")):
                yield single(f"layers/{path}", name, f"{prefix}.{name.theirs}", layer)
        if cfg.n_experts:
            router = ROUTER if kind == "mixtral" else ROUTER_FUSED
            yield single("layers/moe/router", router, f"{prefix}.{router.theirs}", layer)
        if kind == "mixtral":
            for number in range(cfg.n_experts):
                for path, name in EXPERT.items():
                    yield single(f"layers/{path}", name, f"{prefix}.{name.theirs.format(number)}", layer, number)
        elif kind == "tanuki":
            for fused in FUSED:
                parts = [part(f"layers/{p}", EXPERT[p], layer, number) for number in range(cfg.n_experts) for p in fused.parts]
                yield Tensor(f"{prefix}.{fused.theirs}", layout.fused_shape(fused, sizes), dtypes[False], parts)
    for path in ("norm_final", "head"):
        yield single(path, OUTER[path], OUTER[path].theirs)


def _pieces(parts: Sequence[Part]) -> Iterator[Callable[[], np.ndarray]]:
    """What makes the contents of all parts, piece by piece; a part is read while the one before it is written."""
    arrays = files.prefetch((part.read for part in parts), 1, threads=1)
    for part in parts:
        array = next(arrays)
        for rows in part.pieces():
            yield functools.partial(layout.to_published, part.name, array, rows)


def _write(directory: Path, tensors: list[Tensor]) -> int:
    """Safetensors files of SHARD bytes and their index; returns the bytes of all tensors.

    The format (a JSON header with the offset of every tensor, then the bytes) is written here, since the library holds a whole
    file in memory.
    """
    shards = _shards(tensors)
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    progress = Progress("export", total, "MB", 1e6)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        header = _header(shard)
        size = len(header) + sum(tensor.nbytes for tensor in shard)
        with files.direct_writer(directory / file, size, depth=8) as append:
            append(memoryview(header))
            parts = [part for tensor in shard for part in tensor.parts]
            for piece in files.prefetch(_pieces(parts), AHEAD, THREADS):
                append(piece.reshape(-1).view(np.uint8).data)
                done += piece.nbytes
                progress.show(done)
        index |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        files.write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    return total


def _shards(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors of every file, in order."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _header(tensors: Iterable[Tensor]) -> bytes:
    """The beginning of a safetensors file: the length of the JSON, then the JSON, padded to a multiple of 8."""
    letters = {ours: theirs for theirs, ours in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.nbytes]
        header[tensor.name] = {"dtype": letters[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


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
    scores = files.read_json(done)["entry"].get("scores") if done.is_file() else None
    if scores:
        shown = {key: value for key, value in scores.items() if isinstance(value, int | float) and key != "seconds"}
        lines += ["", "## Scores", "", "| score | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in shown.items())]
    return "\n".join(lines) + "\n"
