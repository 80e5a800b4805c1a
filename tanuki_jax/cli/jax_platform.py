"""The machine that a command runs on: what JAX may start there, and how `tanuki` is called."""

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
GOOGLE = "0x1ae0"
NO_CHIP = ("0x01", "0x02")  # PCI classes of storage and network, which Google's other devices are


def choose_platform() -> None:
    """Keeps JAX from starting libtpu on a machine without any accelerator, before JAX is imported.

    There libtpu would ask the network which TPU this is, complain that nobody answers, and lock other processes out.  Where
    JAX_PLATFORMS is set, libtpu is not installed, or there is a sign of an accelerator, nothing changes.
    """
    if sys.platform != "linux" or "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if not any(map(glob.glob, DEVICES)) and not has_tpu():
        os.environ["JAX_PLATFORMS"] = "cpu"


def has_tpu(devices: str = PCI) -> bool:
    """Whether a PCI device is Google's and may be a chip, though no driver has made a file of it yet."""
    for home in map(Path, glob.glob(f"{devices}/*")):
        try:
            vendor, kind = ((home / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        except (OSError, ValueError):
            continue
        if vendor == GOOGLE and not kind.startswith(NO_CHIP):
            return True
    return False


def program() -> str:
    """What to type for `tanuki` from any directory; that of a virtual environment is on PATH only once it is activated."""
    mine, found = Path(sys.executable).parent / "tanuki", shutil.which("tanuki")
    if found and (not mine.exists() or Path(found).samefile(mine)):
        return "tanuki"
    return shlex.quote(str(mine)) if mine.exists() else f"{shlex.quote(sys.executable)} -m tanuki_jax.cli"
