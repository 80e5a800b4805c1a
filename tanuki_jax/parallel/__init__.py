"""Devices: the mesh, the table from axis letters to mesh axes, and multi-host bring-up."""

from tanuki_jax.parallel.distributed import initialize, on_first, once, to_host
from tanuki_jax.parallel.mesh import (
    BATCH_AXES,
    constrain,
    make_mesh,
    per_device_rows,
    sharding,
    splits_batch,
    tree_shardings,
    whole,
)

__all__ = [
    "BATCH_AXES",
    "constrain",
    "initialize",
    "make_mesh",
    "on_first",
    "once",
    "per_device_rows",
    "sharding",
    "splits_batch",
    "to_host",
    "tree_shardings",
    "whole",
]
