"""From compiled programs to a plan: what fits, how long a step takes, how many days a stage does.

The compiler's cost model prices arithmetic and memory traffic.  It counts the body of a loop once, so a layer's cost is half
the difference between unrolled models of four layers and two, and a step is the two-layer model plus the other layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from tanuki_jax import config, model
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import UserError
from tanuki_jax.plan import program
from tanuki_jax.plan.topology import devices
from tanuki_jax.recipe import placement
from tanuki_jax.slices import GIB, Topology
from tanuki_jax.train.metrics import PEAK_FLOPS

SHORT, LONG = 2, 4  # layers of the unrolled models
NOTE = (
    "An estimate by the TPU compiler's cost model, not a measurement: base + L x layer from unrolled 2- and 4-layer models. "
    "It prices arithmetic and memory traffic, neither exposed communication nor the attention kernel, which declares no cost."
)


def plan_stage(recipe: Recipe, name: str, topology: Topology, costs: bool = True) -> dict[str, Any]:
    """Compiles a stage's train step for the slice; see docs/scaling.md for the meaning of every key.

    costs: without it only memory is looked at, by one compilation instead of three.
    """
    options, cfg = recipe.stages[name], config.model_config(recipe, name)
    mesh = lay_out(recipe, name, topology)
    recipe = dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, slices=topology.slices))
    total, active = model.count_parameters(cfg)
    try:
        whole = program.compile_step(recipe, name, mesh)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:  # what no check has foreseen
        raise _cannot(f"stage {name} cannot be compiled for {topology.name}, mesh {dict(mesh.shape)}", error) from error
    tokens = options.batch_size * options.seq_len
    each = topology.generation.devices_per_chip  # the compiler speaks of devices
    limit = each * topology.generation.hbm_limit
    needed = each * (whole.needed or whole.arguments + whole.temporaries)
    plan: dict[str, Any] = {
        "stage": name,
        "kind": options.kind,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "remat": cfg.compute.remat,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "params_total": total,
        "params_active": active,
        "tokens_per_step": tokens,
        "hbm_bytes_per_chip": {"arguments": each * whole.arguments, "temporaries": each * whole.temporaries, "total": needed},
        "hbm_limit": limit,
        "fits": not whole.needed and needed <= limit,
        "largest_buffers": program.largest(whole.text),
        "kernels": program.kernels(whole.text),
        "compile_seconds": round(whole.seconds, 1),
        "note": NOTE,
    }
    if plan["fits"] and costs:
        plan |= _costs(recipe, name, topology, mesh)
        plan["compile_seconds"] = round(plan["compile_seconds"] + plan.pop("_seconds"), 1)
    return plan


def lay_out(recipe: Recipe, name: str, topology: Topology) -> jax.sharding.Mesh:
    """The stage's mesh on the slice; an error that names what to set where it cannot be."""
    if not STAGE_KINDS[recipe.stages[name].kind].trains:
        raise UserError(f"plan: stage {name} converts parameters and trains nothing; plan another stage")
    recipe = dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, slices=topology.slices))
    slice_devices = devices(topology)
    try:
        mesh = placement.make_mesh(recipe, name, slice_devices)
    except (ValueError, NotImplementedError, AssertionError) as error:  # of JAX, on shapes that have no place on a torus
        sizes = {axis: size for axis, size in config.to_dict(recipe.mesh).items() if size != 1}
        raise _cannot(f"mesh {sizes} cannot be laid out on {topology.name}", error) from error
    placement.check_mesh(recipe, name, mesh)
    return mesh


def _cannot(subject: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"plan: {subject}: {reason}; set other sizes in --config.mesh, or take another slice")


def _costs(recipe: Recipe, name: str, topology: Topology, mesh: Any) -> dict[str, Any]:
    options, cfg = recipe.stages[name], config.model_config(recipe, name)
    microbatches = options.gradient_accumulation_steps
    rows = options.batch_size // microbatches
    if cfg.n_experts and (cfg.first_dense or cfg.moe_every > SHORT):
        raise UserError(
            "plan: costs are estimated from models of 2 and 4 layers, so layers must be alike or alternate; plan with "
            "--config.model.first_dense=0 and --config.model.moe_every=1 or 2"
        )
    short, long = (
        program.compile_step(program.with_layers(recipe, name, layers, rows), name, mesh) for layers in (SHORT, LONG)
    )
    if short.needed or long.needed:
        raise UserError(
            "plan: the unrolled models of 2 and 4 layers do not fit, so there is no estimate of the costs; use more "
            "gradient_accumulation_steps"
        )
    seconds = short.seconds + long.seconds
    peak = PEAK_FLOPS[topology.generation.device_kind]
    layer, outside = split_layers(with_cost(short.cost, peak), with_cost(long.cost, peak))
    step = {key: outside[key] + cfg.n_layers * layer[key] for key in layer}
    if microbatches > 1:  # the optimizer's part comes once
        update = program.compile_update(recipe, name, mesh)
        seconds += update.seconds
        once = with_cost(update.cost, peak)
        step = {key: microbatches * step[key] - (microbatches - 1) * once[key] for key in step}
    moved_short, moved_long = (program.collectives(c.text) for c in (short, long))
    kinds = sorted({*moved_short, *moved_long})
    per_layer = {k: (moved_long.get(k, 0) - moved_short.get(k, 0)) / (LONG - SHORT) for k in kinds}
    moved = {k: round(microbatches * (moved_short.get(k, 0) + (cfg.n_layers - SHORT) * per_layer[k])) for k in kinds}
    tokens = options.batch_size * options.seq_len
    model_flops = model.flops_per_token(cfg, options.seq_len, frozen=options.lora.rank > 0) * tokens
    attention = 6 * cfg.n_layers * cfg.n_heads * cfg.head_dim * options.seq_len * tokens
    each = topology.generation.devices_per_chip
    return {
        "flops_per_step_per_chip": each * step["flops"],
        "bytes_accessed_per_step_per_chip": each * step["bytes"],
        "model_flops_per_step": model_flops,
        "step_seconds_estimate": step["seconds"],
        "tokens_per_second_per_chip": tokens / step["seconds"] / topology.chips,
        "mfu_estimate": model_flops / (step["seconds"] * peak * topology.devices),
        "attention_seconds_at_peak": attention / (peak * topology.devices),
        "layer": {
            "flops": each * layer["flops"],
            "bytes": each * layer["bytes"],
            "seconds": layer["seconds"],
            "flops_over_least": layer["flops"] / least_flops(cfg, options.seq_len * rows / topology.devices),
        },
        "collective_bytes": {kind: each * size for kind, size in moved.items()},
        "_seconds": seconds,
    }


def stage_days(recipe: Recipe, name: str, plan: Mapping[str, Any]) -> dict[str, float | None]:
    """Steps, days and chip-hours of a stage; None where they depend on how much data there is (epochs)."""
    steps = config.stage_steps(recipe.stages[name])
    days = steps * plan["step_seconds_estimate"] / 86400
    cost: dict[str, float | None] = {"steps": steps, "days": days, "chip_hours": days * 24 * plan["chips"]}
    return cost if steps else dict.fromkeys(cost)


def split_layers(short: dict[str, float], long: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Costs of one layer, and of everything outside the layers, from those of the two unrolled models."""
    layer = {key: (long[key] - short[key]) / (LONG - SHORT) for key in short}
    return layer, {key: short[key] - SHORT * layer[key] for key in short}


def with_cost(cost: dict[str, float], peak: float) -> dict[str, float]:
    """The cost without the -1 second that the compiler says for each instruction it cannot price (a sort, collectives on v6e).

    There is a whole number of them, and the others take at least what their FLOPs do at the chip's `peak`, but for the
    rounding of the sum, which is in single precision.
    """
    least = cost["flops"] / peak
    missing = max(0, math.ceil(least - cost["seconds"] - 1e-4))
    return cost | {"seconds": max(least, cost["seconds"] + missing)}


def least_flops(cfg: config.ModelConfig, tokens: float) -> float:
    """FLOPs that a layer's matrix products need for these tokens, what `remat` computes again included; attention is not."""
    projections = cfg.d_model * cfg.head_dim * (2 * cfg.n_heads + 2 * cfg.n_kv_heads)
    share = len(config.moe_layers(cfg)) / cfg.n_layers
    ffn = 3 * cfg.d_model * (share * cfg.top_k * cfg.expert_width + (1 - share) * cfg.d_ff)
    qkv, o = cfg.d_model * cfg.head_dim * (cfg.n_heads + 2 * cfg.n_kv_heads), cfg.d_model * cfg.head_dim * cfg.n_heads
    # The last product of a block is never needed again.
    again = {
        "none": 0.0,
        "dots": 0.0,
        "ffn": qkv + o,
        "attention": o + ffn * 2 / 3,
        "offload": ffn * 2 / 3,
        "full": qkv + o + ffn * 2 / 3,
    }[cfg.compute.remat]
    return 2 * tokens * (3 * (projections + ffn) + again)


def advice(plan: dict[str, Any]) -> str:
    """What to change where a plan does not fit."""
    needed, limit = plan["hbm_bytes_per_chip"]["total"] / GIB, plan["hbm_limit"] / GIB
    stage_key, factor = f"--config.stages.{plan['stage']}", max(2, math.ceil(needed / limit))
    hints = [f"{stage_key}.gradient_accumulation_steps={plan['gradient_accumulation_steps'] * factor}"]
    if plan["remat"] != "full":
        hints.insert(0, "--config.compute.remat=full")
    hints += ["--config.mesh.tensor=2 or --config.mesh.context=2", "a larger slice"]
    return (
        f"plan: stage {plan['stage']} needs {needed:.1f} GiB of {limit:.1f} GiB on each chip of {plan['topology']}; "
        f"try {', '.join(hints)}, or --search"
    )
