"""Devices of one process or many: the mesh, the one table from axis letters to mesh axes, and XLA's options."""

from tanuki_jax.parallel.mesh import make_mesh, per_device_rows
from tanuki_jax.parallel.sharding import (
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
from tanuki_jax.parallel.xla_options import compiler_options

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
    "make_mesh",
    "per_device_rows",
    "rows_of",
    "sharding",
    "size",
    "spec",
    "splits_batch",
    "stored",
    "tree_shardings",
]
