"""The machine that a command runs on: which platform JAX may start there, and how to call `tanuki`."""

from __future__ import annotations

import glob
import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path

DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/dri/render*")
PCI = "/sys/bus/pci/devices"
GOOGLE = "0x1ae0"  # PCI vendor
OTHER_CLASSES = ("0x01", "0x02")  # PCI classes of Google's other devices: storage and network


def choose_platform() -> None:
    """Keeps JAX from starting libtpu on a machine without any accelerator, before JAX is imported.

    There libtpu would query the network for the TPU's type, print errors, and lock other processes out.  Where JAX_PLATFORMS
    is set, libtpu is not installed, or there is a sign of an accelerator, nothing changes.
    """
    if sys.platform != "linux" or "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if not any(map(glob.glob, DEVICES)) and not has_tpu():
        os.environ["JAX_PLATFORMS"] = "cpu"


def has_tpu(devices: str = PCI) -> bool:
    """Whether a PCI device is Google's and may be a chip, even if no driver has created a device file yet."""
    for device in map(Path, glob.glob(f"{devices}/*")):
        try:
            vendor, pci_class = ((device / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        except (OSError, ValueError):
            continue
        if vendor == GOOGLE and not pci_class.startswith(OTHER_CLASSES):
            return True
    return False


def program() -> str:
    """The shell word for `tanuki` from any directory; a virtual environment's is on PATH only once it is activated."""
    script, on_path = Path(sys.executable).parent / "tanuki", shutil.which("tanuki")
    if on_path and (not script.exists() or Path(on_path).samefile(script)):
        return "tanuki"
    return shlex.quote(str(script)) if script.exists() else f"{shlex.quote(sys.executable)} -m tanuki_jax.cli"
