"""TPU slices by the names people use (v5p-256, v6e-256, 2xv5p-256): chips, torus, machines; nothing here needs one, or JAX.

Sources, of Google Cloud: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x} (chips, tori, largest slices),
.../tpu/docs/runtimes (versions), .../kubernetes-engine/docs/concepts/plan-tpus (machine types and labels).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tanuki_jax.errors import UserError

GIB = 2**30
MAX_CHIPS = 65_536  # of all slices


@dataclass(frozen=True)
class Generation:
    """A kind of TPU chip.  Sizes in bytes."""

    device_kind: str  # as JAX names it
    devices_per_chip: int  # of JAX
    cores_in_name: int  # TensorCores that one chip adds to the number in a slice's name
    dimensions: int  # of the torus
    largest: int  # slice, in chips; a power of two
    whole: int  # largest slice that is one machine, in chips
    hbm_limit: int  # what the compiler leaves to a program on a device, as it says when one does not fit
    accelerator: str  # of the Cloud TPU API, before the dash; empty where it has none
    runtime: str  # version of the Cloud TPU API's images
    gke_accelerator: str  # node label cloud.google.com/gke-tpu-accelerator
    machine: str  # Compute Engine's machine type, before the number of chips
    workload_policy: bool = False  # GKE's node pools of several machines need a placement policy


GENERATIONS = {
    "v5p": Generation(
        device_kind="TPU v5",
        devices_per_chip=1,
        cores_in_name=2,
        dimensions=3,
        largest=4096,
        whole=4,
        hbm_limit=int(95.74 * GIB),
        accelerator="v5p",
        runtime="v2-alpha-tpuv5",
        gke_accelerator="tpu-v5p-slice",
        machine="ct5p-hightpu-",
    ),
    "v5e": Generation(
        device_kind="TPU v5 lite",
        devices_per_chip=1,
        cores_in_name=1,
        dimensions=2,
        largest=256,
        whole=8,
        hbm_limit=int(15.75 * GIB),
        accelerator="v5litepod",
        runtime="v2-alpha-tpuv5-lite",
        gke_accelerator="tpu-v5-lite-podslice",
        machine="ct5lp-hightpu-",
    ),
    "v6e": Generation(
        device_kind="TPU v6 lite",
        devices_per_chip=1,
        cores_in_name=1,
        dimensions=2,
        largest=256,
        whole=8,
        hbm_limit=int(31.25 * GIB),
        accelerator="v6e",
        runtime="v2-alpha-tpuv6e",
        gke_accelerator="tpu-v6e-slice",
        machine="ct6e-standard-",
    ),
    "tpu7x": Generation(
        device_kind="TPU7x",
        devices_per_chip=2,
        cores_in_name=2,
        dimensions=3,
        largest=8192,
        whole=4,
        hbm_limit=int(94.75 * GIB),
        accelerator="",
        runtime="",
        gke_accelerator="tpu7x",
        machine="tpu7x-standard-",
        workload_policy=True,
    ),
}
ALIASES = {"v5litepod": "v5e"}
CHIPS_PER_MACHINE = 4  # of a slice of several machines


@dataclass(frozen=True)
class Topology:
    """Slices of one kind."""

    name: str
    kind: str  # a key of GENERATIONS
    chips_per_slice: int
    slices: int
    sides: tuple[int, ...]  # of a slice's torus, in chips

    @property
    def generation(self) -> Generation:
        """Its chip."""
        return GENERATIONS[self.kind]

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * self.chips_per_slice

    @property
    def devices(self) -> int:
        """JAX's devices of all slices."""
        return self.chips * self.generation.devices_per_chip

    @property
    def chips_per_machine(self) -> int:
        """Chips of each machine of a slice."""
        return self.chips_per_slice if self.chips_per_slice <= self.generation.whole else CHIPS_PER_MACHINE

    @property
    def machines(self) -> int:
        """Machines of a slice: workers of the Cloud TPU API, nodes of GKE."""
        return self.chips_per_slice // self.chips_per_machine

    @property
    def machine_type(self) -> str:
        """Compute Engine's machine type: ct5p-hightpu-4t say."""
        return f"{self.generation.machine}{self.chips_per_machine}t"

    @property
    def accelerator_type(self) -> str:
        """The Cloud TPU API's name of a slice: v5litepod-16 say; empty where that API has none."""
        accelerator = self.generation.accelerator
        return accelerator and f"{accelerator}-{self.chips_per_slice * self.generation.cores_in_name}"

    @property
    def shape(self) -> str:
        """Of a slice, as GKE names it: 4x4x8."""
        return "x".join(map(str, self.sides))

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which of a slice's three dimensions close into rings.

        v5p, TPU7x: all, where all are multiples of 4 (a cube of 4x4x4 chips is wired inside, larger ones by optical switches);
        v5e and v6e: those that span the pod, 16 chips.
        """
        if self.generation.dimensions == 3:
            return (all(n % 4 == 0 for n in self.sides),) * 3
        return (*(n == 16 for n in self.sides), False)


def parse(name: str, flag: str = "--topology") -> Topology:
    """`v5p-256`, `tpu7x-256` (256 TensorCores: 128 chips), `v6e-256`, `v5e-256` (chips), `2xv5p-256` for two slices of it.

    Args:
      name: of a slice; an error where there is none of this size.
      flag: what the error calls it.
    """
    match = re.fullmatch(r"(?:([0-9]{1,6})x)?([a-z0-9]+?)-([0-9]{1,9})", name)
    kind = ALIASES.get(match[2], match[2]) if match else ""
    if not match or kind not in GENERATIONS:
        raise UserError(f"{flag}: {name!r} is not a slice; give v5p-256, v6e-256, v5e-256 or 2xv5p-256 for two slices")
    generation, slices = GENERATIONS[kind], int(match[1] or 1)
    chips = int(match[3]) // generation.cores_in_name
    power = max(0, chips.bit_length() - 1)
    # Powers of two; flat ones have a single chip, but no pair.
    least = 0 if generation.dimensions == 2 else 2
    powers = [p for p in range(least, generation.largest.bit_length()) if p != 1]
    if chips != 1 << power or int(match[3]) % generation.cores_in_name or power not in powers or not slices:
        sizes = ", ".join(f"{kind}-{generation.cores_in_name << p}" for p in powers)
        raise UserError(f"{flag}: there is no slice {name!r}; {kind} has {sizes}")
    if slices * chips > MAX_CHIPS:
        raise UserError(f"{flag}: {name!r} is {slices * chips:,} chips; no more than {MAX_CHIPS:,} can be planned")
    # The torus is as near to a cube (or square) as powers of two allow, its longest side last; sides of 1 come last of all.
    sides = [1 << (power + i) // generation.dimensions for i in range(generation.dimensions)]
    return Topology(name, kind, chips, slices, tuple(sorted(sides, key=lambda s: (s == 1, s))))
