"""The real train step of a stage, compiled for a slice that need not be here, and what the compiler says of it."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from tanuki_jax import config, parallel
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.config.schema import Recipe
from tanuki_jax.recipe.program import make_program, make_update_program

STEPS = 1000  # of the schedule, whose length changes only constants
PAIRS = 4  # pairs of a packed row; what a real store has depends on its lengths and hardly matters here
COSTS = ("flops", "bytes", "seconds")


@dataclass(frozen=True)
class Compiled:
    """What the TPU compiler says of one program, on one device; bytes, FLOPs, seconds."""

    cost: dict[str, float]  # flops, bytes accessed, and seconds by its own model; a loop's body counts once
    arguments: int
    temporaries: int
    text: str  # the compiled module
    seconds: float  # spent in the compiler
    needed: int = 0  # where it did not fit: bytes it would have used, and no costs


def batch_shapes(recipe: Recipe, name: str, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a stage: shapes, and shardings as the loader makes them."""
    options = recipe.stages[name]
    B, S = options.batch_size, options.seq_len
    dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), "int32") | {"loss_weights": "float32"}
    shapes: dict[str, tuple[tuple[int, ...], str]] = {n: ((B, S), dtype) for n, dtype in dtypes.items()}
    for array_name, array in STAGE_KINDS[options.kind].batch.items():
        shapes[array_name] = (B, *(PAIRS if axis == "P" else int(axis) for axis in array.axes)), array.dtype
    if len(config.stage_sources(options)) > 1:
        shapes["sources"] = (B,), "int32"
    rows = parallel.sharding(mesh, "B")
    return {n: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for n, (shape, dtype) in shapes.items()}


# Collectives in simpler code: half the time in the compiler, and the same costs and memory, which are known before it.
QUICK = {"xla_tpu_enable_asymmetric_max_colors": False, "xla_jf_use_multi_colors_in_all_reduce_if_supported": False}


def compile_step(recipe: Recipe, name: str, mesh: jax.sharding.Mesh) -> Compiled:
    """Compiles the train step that `run_stage` would run."""
    program = make_program(recipe, name, STEPS, mesh)
    return _compile(program.train_step, mesh, program.abstract_state, batch_shapes(recipe, name, mesh))


def compile_update(recipe: Recipe, name: str, mesh: jax.sharding.Mesh) -> Compiled:
    """Compiles what a step does once, however many microbatches it has: norm, clipping and the optimizer."""
    program = make_update_program(recipe, name, STEPS, mesh)
    return _compile(program.update, mesh, program.abstract_state, program.gradients, program.loss)


def _compile(function: Any, mesh: jax.sharding.Mesh, *arguments: Any) -> Compiled:
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = function.lower(*arguments)
        try:
            program = lowered.compile(QUICK)
        except jax.errors.JaxRuntimeError as error:
            match = re.search(r"Used ([.\d]+)([GM]) of|HLO temporaries \(([.\d]+)([GM])\)", str(error))
            if not match:
                raise
            size, unit = match[1] or match[3], match[2] or match[4]
            needed = int(float(size) * 2 ** (30 if unit == "G" else 20))
            return Compiled({}, 0, 0, "", time.perf_counter() - began, needed)
    seconds = time.perf_counter() - began
    raw, memory = program.cost_analysis(), program.memory_analysis()
    cost = {"flops": raw["flops"], "bytes": raw["bytes accessed"], "seconds": raw["optimal_seconds"]}
    temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(cost, memory.argument_size_in_bytes, temporaries, program.as_text(), seconds)


def with_layers(recipe: Recipe, name: str, layers: int, rows: int) -> Recipe:
    """The recipe with so few layers, unrolled, one microbatch of `rows`, and logits in one piece: no loop is left in it."""
    options = recipe.stages[name]
    short = dataclasses.replace(recipe.model, n_layers=layers)
    compute = dataclasses.replace(recipe.compute, scan_unroll=layers, logits_chunk=options.seq_len)
    stages = recipe.stages | {name: dataclasses.replace(options, batch_size=rows, gradient_accumulation_steps=1)}
    return dataclasses.replace(recipe, model=short, compute=compute, stages=stages)


# --- reading a compiled module --------------------------------------------------------------------------------------

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def sizes(shape: str) -> Iterator[int]:
    """Bytes of each array in an HLO shape, "(bf16[8,128]{1,0}, f32[])" say."""
    for dtype, dimensions in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape):
        count = 1
        for n in filter(None, dimensions.split(",")):
            count *= int(n)
        yield count * BYTES.get(dtype, 4)


def collectives(text: str) -> dict[str, int]:
    """Bytes that one chip receives or adds up, by kind of collective: the results of each (for reduce-scatter, its input).

    The compiler may write a reduce-scatter as a computation named all-reduce-scatter, and, on 3-dimensional tori, an all-gather
    as an all-reduce of arrays that are zero but for one slice.
    """
    total: dict[str, int] = {}
    sources: dict[str, str] = {}  # instruction -> the one whose result it passes on
    scatter = False
    for line in text.splitlines():
        if not line.startswith(" "):
            scatter = line.startswith(("%all-reduce-scatter", "all-reduce-scatter"))
        moved = re.match(r"\s+(?:ROOT )?(%\S+) = .*? (?:copy-start|copy-done|copy|get-tuple-element|bitcast)\((%[^,)]+)", line)
        if moved:
            sources[moved[1]] = moved[2]
            continue
        match = re.search(rf" = (\S+|\(.*?\)) ({'|'.join(COLLECTIVES)})(?:-start)?\(([^)]*)\)", line)
        if not match:
            continue
        shape, kind, operands = match.groups()
        arrays = list(sizes(operands if kind == "reduce-scatter" and "[" in operands else shape))
        if kind == "all-gather":  # an asynchronous one has its operands in its shape, too
            arrays = [max(arrays, default=0)]
        kinds = ["reduce-scatter" if scatter else kind] * len(arrays)
        if kind == "all-reduce" and not scatter:
            origins = [_origin(name, sources) for name in re.findall(r"%[\w.-]+", operands)]
            kinds = ["all-gather" if "dynamic-update-slice" in name else kind for name in origins]
        for name, size in zip(kinds, arrays, strict=False):
            total[name] = total.get(name, 0) + size
    return total


def _origin(name: str, sources: dict[str, str]) -> str:
    while name in sources:
        name = sources[name]
    return name


def kernels(text: str) -> dict[str, int]:
    """Pallas kernels in a module, and how often each is called."""
    counts: dict[str, int] = {}
    for name in re.findall(r'%(\S+) = .*custom_call_target="tpu_custom_call"', text):
        label = re.sub(r"\.\d+.*$", "", name)  # expert_outer.4, expert_product.3.references_2_
        counts[label] = counts.get(label, 0) + 1
    return counts


def largest(text: str, count: int = 6) -> list[dict[str, Any]]:
    """The largest arrays that instructions outside fusions make: where they come from, shape, bytes."""
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.-]+)", text))
    sizes_by_name: dict[tuple[str, str], int] = {}
    inside = False
    for line in text.splitlines():
        if not line.startswith(" "):
            inside = bool(line) and line.split(" ")[0].lstrip("%") in fused
        match = re.match(r"\s+(?:ROOT )?%?\S+ = ([a-z]+\d*\[[\d,]*\])\S* ([\w-]+)\(", line)
        if not match or inside or match[2] in ("bitcast", "get-tuple-element", "parameter", "constant"):
            continue
        where = re.search(r'op_name="([^"]*)"', line)
        name = where[1].removeprefix("jit(train_step)/") if where else match[2]
        sizes_by_name[(name, match[1])] = next(sizes(match[1]))
    ordered = sorted(sizes_by_name.items(), key=lambda item: -item[1])[:count]
    return [{"name": name, "shape": shape, "bytes": size} for (name, shape), size in ordered]
