"""TPU slices by the names people use (v5p-256, v6e-256, 2xv5p-256), and their devices, without having any."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import importlib.metadata
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from tanuki_jax.errors import UserError

GIB = 2**30
MAX_CHIPS = 65_536  # of all slices


@dataclass(frozen=True)
class Generation:
    """A kind of TPU chip.  Sizes in bytes, rates in bytes/s of one chip."""

    device_kind: str  # as JAX names it
    cores_in_name: int  # TensorCores that one chip adds to the number in a slice's name
    dimensions: int  # of the torus
    hbm_limit: int  # what the compiler leaves to a program, as it says when one does not fit


GENERATIONS = {
    "v5p": Generation("TPU v5", 2, 3, int(95.74 * GIB)),
    "v5e": Generation("TPU v5 lite", 1, 2, int(15.75 * GIB)),
    "v6e": Generation("TPU v6 lite", 1, 2, int(31.25 * GIB)),
}
ALIASES = {"v5litepod": "v5e"}


@dataclass(frozen=True)
class Topology:
    """Slices of one kind."""

    name: str
    generation: Generation
    chips_per_slice: int
    slices: int
    shape: str  # of a slice, as the TPU compiler names it: v5p:4x4x8

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * self.chips_per_slice

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which of a slice's three dimensions close into rings.

        v5p: all, where all are multiples of 4 (a cube of 4x4x4 chips is wired inside, larger ones by optical switches);
        v5e and v6e: those that span the pod, 16 chips.
        """
        sides = [int(n) for n in self.shape.split(":")[1].split("x")]
        if self.generation.dimensions == 3:
            return (all(n % 4 == 0 for n in sides),) * 3
        return (*(n == 16 for n in sides), False)

    def devices(self) -> Sequence[jax.Device]:
        """The devices, as the TPU compiler describes them; one for each chip."""
        return _devices(self)


def parse(name: str) -> Topology:
    """`v5p-256` (256 TensorCores: 128 chips), `v6e-256` and `v5e-256` (chips), `2xv5p-256` for two slices of it."""
    match = re.fullmatch(r"(?:([0-9]{1,6})x)?([a-z0-9]+?)-([0-9]{1,9})", name)
    kind = ALIASES.get(match[2], match[2]) if match else ""
    if not match or kind not in GENERATIONS:
        raise UserError(f"--topology: {name!r} is not a slice; give v5p-256, v6e-256, v5e-256 or 2xv5p-256 for two slices")
    generation, slices = GENERATIONS[kind], int(match[1] or 1)
    chips = int(match[3]) // generation.cores_in_name
    power = max(0, chips.bit_length() - 1)
    least, largest = (
        (0, 8) if generation.dimensions == 2 else (2, 13)
    )  # powers of two; flat ones have a single chip, but no pair
    powers = [p for p in range(least, largest + 1) if p != 1]
    if chips != 1 << power or int(match[3]) % generation.cores_in_name or power not in powers or not slices:
        sizes = ", ".join(f"{kind}-{generation.cores_in_name << p}" for p in powers)
        raise UserError(f"--topology: there is no slice {name!r}; {kind} has {sizes}")
    if slices * chips > MAX_CHIPS:
        raise UserError(f"--topology: {name!r} is {slices * chips:,} chips; no more than {MAX_CHIPS:,} can be planned")
    # The torus is as near to a cube (or square) as powers of two allow, its longest side last; sides of 1 come last of all.
    sides = [1 << (power + i) // generation.dimensions for i in range(generation.dimensions)]
    shape = "x".join(str(s) for s in sorted(sides, key=lambda s: (s == 1, s)))
    return Topology(name, generation, chips, slices, f"{kind}:{shape}")


@functools.cache
def _devices(topology: Topology) -> Sequence[jax.Device]:
    """The compiler comes as a Python package; no device is opened, so another process that compiles is no hindrance."""
    # Else the compiler asks the network who it is, and complains that nobody answers.
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": topology.name.split("x", 1)[-1],
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
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.shape, num_slices=topology.slices, wrap=topology.wrap, **host
        ).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology: the TPU compiler cannot lay out {topology.name} ({topology.shape}): {reason}") from error


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
