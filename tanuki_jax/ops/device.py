"""What the traced program will run on: the devices of the mesh in context, which need not be on this machine."""

import jax

LANES = 128  # of a TPU's vector registers; kernels' tiles are multiples of it


def platform() -> str:
    """cpu, gpu or tpu."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()


def on_tpu() -> bool:
    """Whether Pallas TPU kernels are compiled; elsewhere they are interpreted."""
    return platform() == "tpu"


def gpu_capability() -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU, (9, 0) for Hopper; (0, 0) for other devices (AMD's has the form gfx942)."""
    major, _, minor = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def vmem_bytes() -> int:
    """Vector memory of one TPU core that a kernel may use; small on other platforms, so that tests see many tiles."""
    if not on_tpu():
        return 2**20
    from jax.experimental.pallas import tpu as pltpu

    return int(pltpu.get_tpu_info().vmem_capacity_bytes) * 3 // 4


def mxu_columns() -> int:
    """Columns of a TPU's matrix unit; those of most generations on other platforms."""
    if not on_tpu():
        return 128
    from jax.experimental.pallas import tpu as pltpu

    return int(pltpu.get_tpu_info().mxu_column_size)
