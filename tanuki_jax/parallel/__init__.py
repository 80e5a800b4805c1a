"""Devices of one or many processes: the mesh, the one table from axis letters to mesh axes, and XLA's options."""

from tanuki_jax.parallel.mesh import make_mesh, per_device_rows
from tanuki_jax.parallel.sharding import (
    BATCH_AXES,
    MESH_AXES,
    Layout,
    activation_spec,
    axis_size,
    batch_is_sharded,
    constrain,
    constrain_as_stored,
    embedding_lookup,
    explain,
    sharding,
    spec,
    tree_shardings,
    unshard,
    unshard_local,
    zigzag,
    zigzag_order,
)
from tanuki_jax.parallel.xla_options import compiler_options

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "Layout",
    "activation_spec",
    "axis_size",
    "batch_is_sharded",
    "compiler_options",
    "constrain",
    "constrain_as_stored",
    "embedding_lookup",
    "explain",
    "make_mesh",
    "per_device_rows",
    "sharding",
    "spec",
    "tree_shardings",
    "unshard",
    "unshard_local",
    "zigzag",
    "zigzag_order",
]
