"""Devices: the mesh, the table from axis letters to mesh axes, and multi-host bring-up."""

from tanuki_jax.parallel.distributed import initialize, listening, to_host, told_to_stop
from tanuki_jax.parallel.mesh import make_mesh, per_device_rows
from tanuki_jax.parallel.peers import agree, exchange, first_of, host, name, on_first, once, share, wait_seconds
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
from tanuki_jax.parallel.watch import at, slowest, spends, watching
from tanuki_jax.parallel.xla import compiler_options

__all__ = [
    "wait_seconds",
    "watching",
    "spends",
    "slowest",
    "name",
    "host",
    "exchange",
    "at",
    "agree",
    "BATCH_AXES",
    "MESH_AXES",
    "activation_spec",
    "balanced",
    "balanced_order",
    "compiler_options",
    "constrain",
    "explain",
    "first_of",
    "gathered",
    "gathered_within",
    "initialize",
    "listening",
    "make_mesh",
    "on_first",
    "once",
    "per_device_rows",
    "rows_of",
    "share",
    "sharding",
    "size",
    "spec",
    "splits_batch",
    "stored",
    "to_host",
    "told_to_stop",
    "tree_shardings",
]
