"""Plans of whole recipes, each distinct program compiled once, and the search for what fits best."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from tanuki_jax import config, model, parallel
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import UserError
from tanuki_jax.plan.estimate import advice, lay_out, plan_stage, stage_days
from tanuki_jax.plan.topology import devices
from tanuki_jax.recipe import placement
from tanuki_jax.slices import Topology


def plan(recipe: Recipe, only: str, topology: Topology) -> dict[str, Any]:
    """Plans of the stages: {"topology", "chips", "stages": [...], "days", "chip_hours"}.

    Where one stage is named, its plan's keys stand beside these.
    """
    names = [only] if only else [n for n, stage in recipe.stages.items() if STAGE_KINDS[stage.kind].trains]
    for name in names:  # what cannot work is said before anything is compiled
        lay_out(recipe, name, topology)
    plans: dict[str, dict[str, Any]] = {}
    stages = []
    for name in names:
        key = _program(recipe, name)
        if key not in plans:
            print(f"plan: compiling stage {name} for {topology.name}", file=sys.stderr, flush=True)
            plans[key] = plan_stage(recipe, name, topology)
        stage_plan = plans[key] | {"stage": name, "kind": recipe.stages[name].kind}
        stages.append(
            stage_plan | stage_days(recipe, name, stage_plan) if "step_seconds_estimate" in stage_plan else stage_plan
        )
    return _sum_stages(topology, stages) | (stages[0] if only else {})


def _sum_stages(topology: Topology, stages: list[dict[str, Any]]) -> dict[str, Any]:
    days = [s["days"] for s in stages if s.get("days")]
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "stages": stages,
        "days": sum(days) if days else None,
        "chip_hours": sum(days) * 24 * topology.chips if days else None,
    }


def _program(recipe: Recipe, name: str) -> str:
    """What two stages must share to be one program but for constants."""
    options = recipe.stages[name]
    shape = (
        options.kind,
        options.seq_len,
        options.batch_size,
        options.gradient_accumulation_steps,
        options.reset_attention,
        options.optimizer.moment_dtype,
    )
    return repr((shape, options.lora, config.is_moe(recipe, name), bool(options.optimizer.clip_norm)))


def problems(plan: dict[str, Any]) -> list[str]:
    """One line for each stage that does not fit; for a search, one if nothing does."""
    if "ranked" in plan:
        return [] if any(p["fits"] for p in plan["ranked"]) else [f"plan: nothing that was tried fits {plan['topology']}"]
    lines = {advice(p): None for p in plan["stages"] if not p["fits"]}
    return list(lines)


def explain(recipe: Recipe, only: str, topology: Topology) -> str:
    """How every parameter and activation of a stage (the last one if none is named) lies on the slice."""
    name = only or list(recipe.stages)[-1]
    recipe = dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, slices=topology.slices))
    mesh = placement.make_mesh(recipe, name, devices(topology))
    return "\n".join(parallel.explain(mesh, model.named_parameters(config.model_config(recipe, name))))


# --- search ---------------------------------------------------------------------------------------------------------

REMAT = ("none", "dots", "ffn", "attention", "full")  # from the one that keeps most
KEEP = 3  # plans whose costs are looked at


def search(recipe: Recipe, only: str, topology: Topology) -> dict[str, Any]:
    """Tries meshes x accumulation steps x remat; what keeps most and still fits is ranked by its estimated speed.

    On each mesh and number of rows a policy is tried from the one that keeps most until one fits; costs, which take two more
    compilations, are estimated for the most promising.
    """
    if not only:
        raise UserError("plan: --search works on one stage; name it with --stage")
    fitting: list[tuple[Recipe, dict[str, Any]]] = []
    tried: list[dict[str, Any]] = []
    for sizes, gradient_accumulation_steps in _candidates(recipe, only, topology):
        for remat in REMAT:
            changed = _with_settings(recipe, only, sizes, gradient_accumulation_steps, remat)
            try:
                plan = plan_stage(changed, only, topology, costs=False)
            except UserError as error:  # sizes that do not divide
                print(f"plan: context {sizes.context}, tensor {sizes.tensor}: {error}", file=sys.stderr, flush=True)
                break
            tried.append(plan)
            print(f"plan: {_label(plan)}: {'fits' if plan['fits'] else 'too large'}", file=sys.stderr, flush=True)
            if plan["fits"]:
                fitting.append((changed, plan))
                break
    if not tried:
        raise UserError(
            f"plan: batch_size {recipe.stages[only].batch_size} of stage {only} divides over no mesh of {topology.name} that "
            f"was tried; take a smaller slice, or a multiple of {topology.devices}"
        )
    fitting.sort(key=lambda item: (REMAT.index(item[1]["remat"]), item[1]["gradient_accumulation_steps"]))
    ranked = [plan_stage(changed, only, topology) for changed, _ in fitting[:KEEP]]
    ranked = [plan | stage_days(recipe, only, plan) for plan in ranked]
    ranked.sort(key=lambda plan: plan["step_seconds_estimate"])
    others = [plan for _, plan in fitting[KEEP:]] + [plan for plan in tried if not plan["fits"]]
    return {"topology": topology.name, "chips": topology.chips, "ranked": [*ranked, *others]}


def _candidates(recipe: Recipe, name: str, topology: Topology) -> Iterator[tuple[config.Mesh, int]]:
    """Meshes from the plainest on, each with the fewest accumulation steps first."""
    options, cfg = recipe.stages[name], config.model_config(recipe, name)
    for tensor, context in ((1, 1), (1, 2), (1, 8), (2, 1)):
        if topology.devices // topology.slices % (tensor * context):
            continue
        groups = topology.devices // (tensor * context)
        rows = options.batch_size // groups
        if options.batch_size % groups or cfg.n_kv_heads % tensor:
            continue
        for gradient_accumulation_steps in sorted({m for m in (1, 2, 4, 8) if rows % m == 0}):
            yield config.Mesh(slices=topology.slices, context=context, tensor=tensor), gradient_accumulation_steps


def _with_settings(recipe: Recipe, name: str, sizes: config.Mesh, gradient_accumulation_steps: int, remat: str) -> Recipe:
    stages = recipe.stages | {
        name: dataclasses.replace(recipe.stages[name], gradient_accumulation_steps=gradient_accumulation_steps)
    }
    return dataclasses.replace(recipe, mesh=sizes, stages=stages, compute=dataclasses.replace(recipe.compute, remat=remat))


def _label(plan: dict[str, Any]) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    return f"{mesh}, {plan['gradient_accumulation_steps']} accumulation steps, remat {plan['remat']}"
