"""TPU slices by the names people use (v5p-256, v6e-256, 2xv5p-256), and their devices, without having any."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from tanuki_jax.errors import UserError

GIB = 2**30


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
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+?)-(\d+)", name)
    kind = ALIASES.get(match[2], match[2]) if match else ""
    if not match or kind not in GENERATIONS:
        raise UserError(f"--topology: {name!r} is not a slice; give v5p-256, v6e-256, v5e-256 or 2xv5p-256 for two slices")
    generation, slices = GENERATIONS[kind], int(match[1] or 1)
    chips = int(match[3]) // generation.cores_in_name
    power = max(0, chips.bit_length() - 1)
    largest = 256 if generation.dimensions == 2 else 8192
    if chips != 1 << power or int(match[3]) % generation.cores_in_name or chips > largest or not slices:
        sizes = ", ".join(f"{kind}-{generation.cores_in_name << p}" for p in (2, 3, 4, 5, 6, 7, 8))
        raise UserError(f"--topology: there is no slice {name!r}; {kind} has {sizes} and further powers of two")
    # The torus is as near to a cube (or square) as powers of two allow, its longest side last; sides of 1 come last of all.
    sides = [1 << (power + i) // generation.dimensions for i in range(generation.dimensions)]
    shape = "x".join(str(s) for s in sorted(sides, key=lambda s: (s == 1, s)))
    return Topology(name, generation, chips, slices, f"{kind}:{shape}")


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
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.shape, num_slices=topology.slices, wrap=topology.wrap
        ).devices
    except ImportError as error:
        raise UserError("plan: the TPU compiler is not installed; pip install 'tanuki-jax[plan]'") from error
