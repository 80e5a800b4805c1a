"""The device mesh: named axes over the devices of one or several slices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from tanuki_jax import config
from tanuki_jax.errors import UserError
from tanuki_jax.parallel.sharding import BATCH_AXES, MESH_AXES


def make_mesh(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or the given ones).  -1 is what is left; a product that does not fit is an error.

    With `slices` the data axis is that many times longer, and only it crosses the slow network between slices; every other
    axis lies inside a slice, laid out along the wires of its torus.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices, shape = sizes.slices, [getattr(sizes, axis) for axis in MESH_AXES]
    named = dict(zip(MESH_AXES, shape, strict=True)) | ({"slices": slices} if slices != 1 else {})
    fixed = slices * math.prod(s for s in shape if s != -1)
    if shape.count(-1) > 1 or min(s for s in [slices, *shape, 1] if s != -1) < 1 or slices < 1:
        raise UserError(f"config: mesh {named}: sizes must be positive, one of the axes may be -1")
    shape = [len(devices) // fixed if s == -1 else s for s in shape]
    if slices * math.prod(shape) != len(devices):
        raise UserError(
            f"config: mesh {named} has {slices * math.prod(shape)} places for {len(devices)} devices; "
            "make their product equal (one size may be -1)"
        )
    return Mesh(_arrange_devices(devices, slices, shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange_devices(devices: Sequence[jax.Device], slices: int, shape: list[int]) -> np.ndarray:
    """Devices in the shape of the mesh, the slices along the first axis."""
    mesh_shape = [slices * shape[0], *shape[1:]]
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(mesh_shape)
    actual = len({getattr(d, "slice_index", 0) for d in devices})
    if actual != slices:
        raise UserError(f"config: mesh.slices is {slices}, but the devices lie in {actual}; set mesh.slices={actual}")
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across_slices = [slices, *[1] * (len(shape) - 1)]
    return mesh_utils.create_hybrid_device_mesh(shape, across_slices, devices, allow_split_physical_axes=True)


def per_device_rows(mesh: Mesh, batch_size: int, gradient_accumulation_steps: int = 1) -> int:
    """Rows of a microbatch per device; a batch that does not divide is an error."""
    shards = math.prod(mesh.shape[a] for a in BATCH_AXES)
    if batch_size % (shards * gradient_accumulation_steps):
        raise UserError(
            f"config: batch_size {batch_size} is not a multiple of {shards} groups of devices x "
            f"gradient_accumulation_steps {gradient_accumulation_steps}; "
            f"use a multiple of {shards * gradient_accumulation_steps}"
        )
    return batch_size // (shards * gradient_accumulation_steps)
