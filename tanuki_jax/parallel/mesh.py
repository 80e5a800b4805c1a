"""The device mesh and the one table that says which mesh axis an array axis is split over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tanuki_jax import config
from tanuki_jax.errors import UserError

MESH_AXES = ("data", "fsdp")
BATCH_AXES = ("data", "fsdp")

# Array axis (the letters of every docstring) -> mesh axes.  A letter that is missing here is not split.
PARAMETER_RULES: dict[str, str | tuple[str, ...]] = {"D": "fsdp"}
ACTIVATION_RULES: dict[str, str | tuple[str, ...]] = {"B": BATCH_AXES}


def make_mesh(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or those given).  -1 stands for what is left; a product that does not fit is an error."""
    devices = list(jax.devices() if devices is None else devices)
    shape = [getattr(sizes, axis) for axis in MESH_AXES]
    fixed = math.prod(s for s in shape if s != -1)
    if shape.count(-1) > 1 or min(s for s in [*shape, 1] if s != -1) < 1:
        raise UserError(
            f"config: mesh {dict(zip(MESH_AXES, shape, strict=True))}: sizes must be positive, one of them may be -1"
        )
    shape = [len(devices) // fixed if s == -1 else s for s in shape]
    if math.prod(shape) != len(devices):
        raise UserError(
            f"config: mesh {dict(zip(MESH_AXES, shape, strict=True))} has {math.prod(shape)} places "
            f"for {len(devices)} devices; make their product equal (one size may be -1)"
        )
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _spec(axes: Sequence[str | None], rules: dict[str, str | tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(rules.get(axis) if axis else None for axis in axes))


def tree_shardings(mesh: Mesh, logical_axes: Any, shapes: Any) -> Any:
    """NamedShardings of a parameter tree from its tree of axis letters; axes that do not divide stay whole."""

    def one(axes: tuple[str, ...], shape: Any) -> NamedSharding:
        spec = _spec(axes, PARAMETER_RULES)
        fits = [s if s is None or n % mesh.shape[s] == 0 else None for s, n in zip(spec, shape.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map(one, logical_axes, shapes, is_leaf=lambda a: isinstance(a, tuple))


def sharding(mesh: Mesh, axes: str) -> NamedSharding:
    """The sharding of a batch or activation whose axes are the letters of `axes`, "BS" say."""
    return NamedSharding(mesh, _spec(axes, ACTIVATION_RULES))


def splits_batch(rows: int) -> bool:
    """Whether there is a mesh in context over whose batch axes this many rows divide."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Tells the compiler how an activation with these axis letters is split.

    Without a mesh, or where the batch does not divide (a few rows while decoding), it does nothing.
    """
    if not splits_batch(x.shape[axes.index("B")]):
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, ACTIVATION_RULES))


def whole(x: jax.Array) -> jax.Array:
    """Tells the compiler to have a parameter whole on every device while it is used; without a mesh it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * x.ndim))


def per_device_rows(mesh: Mesh, batch_size: int, microbatches: int = 1) -> int:
    """Rows of a microbatch on one device; a batch that does not divide is an error."""
    shards = math.prod(mesh.shape[a] for a in BATCH_AXES)
    if batch_size % (shards * microbatches):
        raise UserError(
            f"config: batch_size {batch_size} is not a multiple of {shards} devices x {microbatches} microbatches; "
            f"use a multiple of {shards * microbatches}"
        )
    return batch_size // (shards * microbatches)
