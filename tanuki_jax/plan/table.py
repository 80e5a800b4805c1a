"""A plan for people."""

from __future__ import annotations

from typing import Any

from tanuki_jax.slices import GIB

COLUMNS = (
    f"{'stage':16s} {'kind':9s} {'mesh':26s} {'micro':>5s} {'remat':9s} {'HBM GiB':>14s} {'fits':4s} {'step s':>7s} "
    f"{'tok/s/chip':>10s} {'MFU':>5s} {'days':>7s} {'chip-hours':>11s}"
)


def table(plan: dict[str, Any]) -> str:
    """Lines for the terminal: one for each stage (or candidate), then details of the first."""
    plans = plan["ranked"] if "ranked" in plan else plan["stages"]
    lines = [f"{plan['topology']}: {plan['chips']} chips", COLUMNS, *map(_row, plans)]
    if plan.get("days"):
        lines.append(f"all stages with a token budget: {plan['days']:.1f} days, {plan['chip_hours']:,.0f} chip-hours")
    return "\n".join([*lines, "", *_details(plans[0])]) if plans else "\n".join(lines)


def _row(plan: dict[str, Any]) -> str:
    memory = plan["hbm_bytes_per_chip"]
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    text = (
        f"{plan['stage']:16s} {plan['kind']:9s} {mesh:26s} {plan['gradient_accumulation_steps']:>5d} {plan['remat']:9s} "
        f"{memory['total'] / GIB:>6.1f}/{plan['hbm_limit'] / GIB:<7.1f} {'yes' if plan['fits'] else 'NO':4s} "
    )
    if "step_seconds_estimate" not in plan:
        return text
    text += f"{plan['step_seconds_estimate']:>7.2f} {plan['tokens_per_second_per_chip']:>10,.0f} {plan['mfu_estimate']:>5.0%} "
    return text + (f"{plan['days']:>7.2f} {plan['chip_hours']:>11,.0f}" if plan.get("days") else f"{'?':>7s} {'?':>11s}")


def _details(plan: dict[str, Any]) -> list[str]:
    memory = plan["hbm_bytes_per_chip"]
    lines = [
        f"stage {plan['stage']}: {plan['params_total']:,} parameters ({plan['params_active']:,} active), "
        f"{plan['tokens_per_step']:,} tokens a step",
        f"memory of a chip: arguments {memory['arguments'] / 1e9:.2f} GB, temporaries {memory['temporaries'] / 1e9:.2f} GB; "
        f"compiled in {plan['compile_seconds']:.0f} s",
    ]
    if plan["largest_buffers"]:
        lines.append("largest buffers:")
        lines += [f"  {b['bytes'] / 1e9:6.2f} GB  {b['shape']:28s} {b['name'][-90:]}" for b in plan["largest_buffers"]]
    if plan["kernels"]:
        lines.append("Pallas kernels: " + ", ".join(sorted(plan["kernels"])))
    if "layer" in plan:
        layer = plan["layer"]
        lines.append(
            f"a layer: {layer['flops'] / 1e12:.2f} TFLOP ({layer['flops_over_least']:.3f} x the least for this remat), "
            f"{1e3 * layer['seconds']:.1f} ms, {layer['bytes'] / 1e9:.1f} GB accessed"
        )
        moved = ", ".join(f"{kind} {size / 1e9:.1f} GB" for kind, size in plan["collective_bytes"].items())
        lines.append(f"collectives of a chip and step: {moved or 'none'}")
        lines.append(f"attention at the chip's peak, not in the estimate: {plan['attention_seconds_at_peak']:.3f} s a step")
    return [*lines, plan["note"]]
