"""Where the arrays of a checkpoint go: shardings of a model's parameters, and shapes that carry them."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
from jax.sharding import NamedSharding, PartitionSpec

from tanuki_jax import config, model, parallel

Tree: TypeAlias = Any  # a pytree of arrays, of `jax.ShapeDtypeStruct`s or of shardings


def parameter_shardings(cfg: config.ModelConfig, mesh: jax.sharding.Mesh) -> Tree:
    """How a model's parameters are split over a mesh."""
    return parallel.tree_shardings(mesh, model.logical_axes(cfg), model.parameter_shapes(cfg))


def sharded_like(shapes: Tree, shardings: Tree) -> Tree:
    """ShapeDtypeStructs with shardings."""
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)


def single_device(shapes: Tree) -> Tree:
    """ShapeDtypeStructs on the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of scalars and other small things: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
