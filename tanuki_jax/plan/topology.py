"""The devices of TPU slices, without having any: the TPU compiler describes them."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import importlib.metadata
import os
import re
from collections.abc import Sequence

import jax

from tanuki_jax.errors import UserError
from tanuki_jax.slices import Topology


@functools.cache
def devices(topology: Topology) -> Sequence[jax.Device]:
    """All devices of the slices; an error where the compiler is missing, belongs to another JAX, or cannot lay them out.

    The compiler comes as a Python package; no device is opened, so another process that compiles is no hindrance.
    """
    # Else the compiler asks the network who it is, and complains that nobody answers.
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": re.sub(r"^[0-9]+x", "", topology.name),
    }
    for name, value in (quiet | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        importlib.import_module("libtpu")  # the compiler itself; jax finds it by this name
    except ImportError as error:
        raise UserError("plan: the TPU compiler is not installed; pip install 'tanuki-jax[plan]'") from error
    _check_compiler()
    host = {"chips_per_host_bounds": (1, 1, 1)} if topology.chips_per_slice == 1 else {}
    shape = f"{topology.kind}:{topology.shape}"
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=shape, num_slices=topology.slices, wrap=topology.wrap, **host
        ).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology: the TPU compiler cannot lay out {topology.name} ({shape}): {reason}") from error


def _check_compiler() -> None:
    """An error where the libtpu that is there is not the one that this JAX belongs to: XLA would end in an error much later."""
    try:
        installed, needed = importlib.metadata.version("libtpu"), importlib.metadata.requires("jax") or []
    except importlib.metadata.PackageNotFoundError:  # built or found elsewhere: nothing is known of it
        return
    expected = next((m[1] for line in needed if (m := re.match(r"libtpu\s*==\s*([\w.*]+)", line))), installed)
    if not fnmatch.fnmatchcase(installed, expected) and not fnmatch.fnmatchcase(f"{installed}.0", expected):
        raise UserError(
            f"plan: libtpu {installed} is here, but JAX {jax.__version__} needs libtpu {expected}; "
            f"pip install 'libtpu=={expected}'"
        )
