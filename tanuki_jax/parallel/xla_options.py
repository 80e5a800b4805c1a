"""XLA options per TPU generation: one table, for both the train step and the planner.

They are passed to `jax.jit`, so no environment variable changes what is compiled.
"""

from __future__ import annotations

from jax.sharding import Mesh

Options = dict[str, str | bool | int]

# All-gathers run inside the arithmetic that hides them.  The compiler refuses this on other chips than v5e, where it may give
# wrong results; on v5p and v6e its own scheduler hides latency and no option is needed.
CONTINUATION_FUSION: Options = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
# Between slices: all-reduces of one layer's gradients run while the next layer's are computed.
BETWEEN_SLICES: Options = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}
# By device kind: v5e, v5p, v6e.
TPU_OPTIONS: dict[str, Options] = {
    "TPU v5 lite": CONTINUATION_FUSION,
    "TPU v5": {},
    "TPU v6 lite": {},
}


def compiler_options(mesh: Mesh) -> Options:
    """The options for the devices of a mesh; none on other platforms or for a generation that is not in the table."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu" or device.device_kind not in TPU_OPTIONS:
        return {}
    slices = {getattr(d, "slice_index", 0) for d in mesh.devices.flat}
    return TPU_OPTIONS[device.device_kind] | (BETWEEN_SLICES if len(slices) > 1 else {})
