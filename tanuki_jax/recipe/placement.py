"""How a stage lies on its devices: its mesh, whether its sizes divide over it, and where each part of its state goes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax

from tanuki_jax import checkpoint, config, model, ops, parallel
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import UserError
from tanuki_jax.train import balance
from tanuki_jax.train.step import State, init_state


def make_mesh(recipe: Recipe, name: str, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The recipe's mesh, as this stage's rows divide over it.

    Where `mesh.fsdp` is left open (-1) and makes more groups of devices than a microbatch has rows, or other than divide
    them, the devices left over split the tokens of each row instead (`context`).
    """
    options, sizes = recipe.stages[name], recipe.mesh
    mesh = parallel.make_mesh(sizes, devices)
    rows = options.batch_size // options.gradient_accumulation_steps
    others, fsdp = mesh.shape["data"] * mesh.shape["expert"], mesh.shape["fsdp"]
    if (
        not STAGE_KINDS[options.kind].trains
        or sizes.fsdp != -1
        or sizes.context != 1
        or rows % others
        or not rows % (others * fsdp)
    ):
        return mesh
    groups = math.gcd(rows // others, fsdp)
    if options.seq_len % (2 * fsdp // groups):
        return mesh
    return parallel.make_mesh(dataclasses.replace(sizes, fsdp=groups, context=fsdp // groups), devices)


def check_mesh(recipe: Recipe, name: str, mesh: jax.sharding.Mesh) -> None:
    """An error that names the key to change where a stage's sizes do not divide over the mesh."""
    options, cfg = recipe.stages[name], config.model_config(recipe, name)
    parallel.per_device_rows(mesh, options.batch_size, options.gradient_accumulation_steps)
    tensor, expert, context = (mesh.shape[axis] for axis in ("tensor", "expert", "context"))
    sizes = {"n_kv_heads": cfg.n_kv_heads, "d_ff": cfg.d_ff, "vocab_size": cfg.vocab_size}
    for key, size in sizes.items():
        if size % tensor:
            raise UserError(f"config: mesh.tensor {tensor} does not divide model.{key} {size}; use a divisor of it")
    if cfg.n_experts % expert:
        raise UserError(f"config: mesh.expert {expert} does not divide model.n_experts {cfg.n_experts}; use a divisor of it")
    unit = 2 * context * ops.query_shards(cfg.compute.attention_impl, mesh.devices.flat[0].platform)
    if context > 1 and options.seq_len % unit:
        remark = (
            "" if recipe.mesh.context == context else f", the devices that batch_size {options.batch_size} leaves to each row"
        )
        raise UserError(
            f"config: stages.{name}.seq_len {options.seq_len} cannot be split over mesh.context {context}{remark}: it is not a "
            f"multiple of {unit}, two parts for each; set mesh.context, seq_len or batch_size, or take fewer devices"
        )


def trained_shardings(cfg: config.ModelConfig, lora: config.Lora, mesh: jax.sharding.Mesh) -> Any:
    """How the parameters that a stage trains are split: all, or the adapters."""
    if not lora.rank:
        return checkpoint.parameter_shardings(cfg, mesh)
    ranks = model.lora.ranks(cfg, lora)
    return parallel.tree_shardings(mesh, model.lora.adapter_axes(cfg, ranks)[0], model.lora.adapter_shapes(cfg, ranks))


def frozen_shardings(cfg: config.ModelConfig, lora: config.Lora, mesh: jax.sharding.Mesh) -> Any:
    """How those are split that it does not train."""
    if not lora.rank:
        return {}
    scales = model.lora.scale_tree(model.lora.scales(cfg, lora))
    return {**checkpoint.parameter_shardings(cfg, mesh), **jax.tree.map(lambda _: checkpoint.replicated(mesh), scales)}


def state_shardings(
    cfg: config.ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    loss: config.Loss | None = None,
    lora: config.Lora | None = None,
) -> tuple[State, State]:
    """Shapes of a state with their shardings, and the shardings alone: moments lie like their parameters."""
    key, options, lora = jax.random.key(0), loss or config.Loss(), lora or config.Lora()

    def make() -> State:
        params, frozen = model.init(cfg, key), {}
        if lora.rank:
            params, scales = model.lora.init_adapters(cfg, lora, key)
            frozen = model.lora.frozen_params(cfg, model.init(cfg, key)) | scales
        return init_state(params, optimizer, key, balance.init_balance(cfg, options), frozen)

    with jax.set_mesh(mesh):  # the dtype of what is frozen depends on the devices
        shapes = jax.eval_shape(make)
    split, whole = trained_shardings(cfg, lora, mesh), checkpoint.replicated(mesh)
    moments = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, shapes.opt_state, split, transform_non_params=lambda _: whole
    )
    shardings: Any = State(
        whole,  # type: ignore[arg-type]  # a tree of shardings, not arrays
        split,
        moments,
        whole,  # type: ignore[arg-type]
        dict.fromkeys(shapes.balance, whole),  # type: ignore[arg-type]
        frozen_shardings(cfg, lora, mesh),
        whole,  # type: ignore[arg-type]
    )
    return checkpoint.sharded_like(shapes, shardings), shardings


def describe_adapters(cfg: config.ModelConfig, lora: config.Lora) -> str:
    """A line on what a stage trains of a model that is frozen."""
    targets = list(model.lora.targets(cfg, model.lora.ranks(cfg, lora)))
    count = sum(math.prod(shape) for target in targets for _, shape in (target.a, target.b))
    ranks = ", ".join(f"{target.path.removeprefix('layers/')} {target.rank}" for target in targets)
    return f"adapters of rank {ranks}; {count:,} parameters trained, the others frozen"


def describe_parameters(cfg: config.ModelConfig, mesh: jax.sharding.Mesh) -> str:
    """A table of the parameters: name, axes, shape, which axis is split over what, number."""
    lines = []
    for name, axes, shape in model.named_parameters(cfg):
        where = parallel.spec(axes, "stored", mesh, shape)
        split = ", ".join(f"{axis} over {over}" for axis, over in zip(axes, where, strict=True) if over)
        lines.append(f"  {name:20s} {axes:6s} {str(shape):26s} {split:14s} {math.prod(shape):>15,}")
    total, active = model.count_parameters(cfg)
    return "\n".join([*lines, f"  {'total':20s} {'':6s} {'':26s} {'':14s} {total:>15,}  ({active:,} active)"])
