"""Devices: the mesh, the table from axis letters to mesh axes, and multi-host bring-up."""

from tanuki_jax.parallel.distributed import initialize, on_first, once, to_host
from tanuki_jax.parallel.mesh import make_mesh, per_device_rows
from tanuki_jax.parallel.rules import (
    BATCH_AXES,
    MESH_AXES,
    activation_spec,
    balanced,
    balanced_order,
    constrain,
    explain,
    gathered,
    gathered_within,
    rows_of,
    sharding,
    size,
    spec,
    splits_batch,
    stored,
    tree_shardings,
)
from tanuki_jax.parallel.xla import compiler_options

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "activation_spec",
    "balanced",
    "balanced_order",
    "compiler_options",
    "constrain",
    "explain",
    "gathered",
    "gathered_within",
    "initialize",
    "make_mesh",
    "on_first",
    "once",
    "per_device_rows",
    "rows_of",
    "sharding",
    "size",
    "spec",
    "splits_batch",
    "stored",
    "to_host",
    "tree_shardings",
]
