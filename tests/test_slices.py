import json
import subprocess
import sys
from pathlib import Path

import pytest

from tanuki_jax import slices
from tanuki_jax.errors import UserError
from tanuki_jax.slices import parse


@pytest.mark.parametrize(
    ("name", "shape", "chips"),
    [
        ("v5p-8", "2x2x1", 4),
        ("v5p-128", "4x4x4", 64),
        ("v5p-256", "4x4x8", 128),
        ("v6e-256", "16x16", 256),
        ("v6e-8", "2x4", 8),
        ("v5e-256", "16x16", 256),
        ("v5litepod-16", "4x4", 16),
        ("2xv5p-256", "4x4x8", 256),
        ("v6e-1", "1x1", 1),
        ("v5e-1", "1x1", 1),
        ("tpu7x-8", "2x2x1", 4),
        ("tpu7x-128", "4x4x4", 64),
        ("2xtpu7x-16384", "16x16x32", 16384),
    ],
)
def test_a_name_is_that_many_chips(name, shape, chips):
    assert (parse(name).shape, parse(name).chips) == (shape, chips)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("v5p-8", (False,) * 3),
        ("v5p-64", (False,) * 3),  # 2x4x4
        ("v5p-128", (True,) * 3),
        ("2xv5p-256", (True,) * 3),
        ("v6e-64", (False,) * 3),
        ("v6e-128", (False, True, False)),  # 8x16
        ("v5e-256", (True, True, False)),
    ],
)
def test_which_dimensions_of_a_slice_are_rings(name, wrap):
    assert parse(name).wrap == wrap


NONE = ["v5p", "v9-8", "v5p-100", "v5p-7", "v6e-512", "0xv6e-8", "", "v5p-0", "v5p-2", "v5p-4", "v6e-2", "v6e-3", "v5e-2"]
NONE += ["v6e--4", "v6e-4.5", "xv6e-4", "1e3xv6e-4", "V5P-8", f"v6e-{'9' * 5000}", f"{'9' * 5000}xv6e-4", "v5p-16384", "v6e-٤"]
NONE += ["tpu7x-4", "tpu7x-32768", "tpu7x-9", "v7x-8"]


@pytest.mark.parametrize("name", NONE)
def test_other_names_are_answered_with_those_there_are(name):
    with pytest.raises(UserError, match="v5p-256|v[56]e-256|tpu7x-8"):
        parse(name)


def test_more_chips_than_anybody_has_are_not_planned():
    with pytest.raises(UserError, match="25,599,744 chips; no more than 65,536"):
        parse("99999xv6e-256")


# Type of the Cloud TPU API, its runtime, Compute Engine's machine type, machines of a slice, GKE's labels of accelerator and
# topology, and JAX's devices of the slice: from the pages that slices.py names, and xpk (core/system_characteristics.py,
# June 2026).
PLATFORMS = {
    "v5p-8": ("v5p-8", "v2-alpha-tpuv5", "ct5p-hightpu-4t", 1, "tpu-v5p-slice", "2x2x1", 4),
    "v5p-256": ("v5p-256", "v2-alpha-tpuv5", "ct5p-hightpu-4t", 32, "tpu-v5p-slice", "4x4x8", 128),
    "v5e-1": ("v5litepod-1", "v2-alpha-tpuv5-lite", "ct5lp-hightpu-1t", 1, "tpu-v5-lite-podslice", "1x1", 1),
    "v5e-4": ("v5litepod-4", "v2-alpha-tpuv5-lite", "ct5lp-hightpu-4t", 1, "tpu-v5-lite-podslice", "2x2", 4),
    "v5e-8": ("v5litepod-8", "v2-alpha-tpuv5-lite", "ct5lp-hightpu-8t", 1, "tpu-v5-lite-podslice", "2x4", 8),
    "v5litepod-16": ("v5litepod-16", "v2-alpha-tpuv5-lite", "ct5lp-hightpu-4t", 4, "tpu-v5-lite-podslice", "4x4", 16),
    "v6e-1": ("v6e-1", "v2-alpha-tpuv6e", "ct6e-standard-1t", 1, "tpu-v6e-slice", "1x1", 1),
    "v6e-8": ("v6e-8", "v2-alpha-tpuv6e", "ct6e-standard-8t", 1, "tpu-v6e-slice", "2x4", 8),
    "v6e-256": ("v6e-256", "v2-alpha-tpuv6e", "ct6e-standard-4t", 64, "tpu-v6e-slice", "16x16", 256),
    "tpu7x-8": ("", "", "tpu7x-standard-4t", 1, "tpu7x", "2x2x1", 8),
    "tpu7x-128": ("", "", "tpu7x-standard-4t", 16, "tpu7x", "4x4x4", 128),
}


@pytest.mark.parametrize("name", PLATFORMS)
def test_what_the_platforms_call_a_slice(name):
    t = parse(name)
    g = t.generation
    assert (t.accelerator_type, g.runtime, t.machine_type, t.machines, g.gke_accelerator, t.shape, t.devices) == PLATFORMS[name]
    assert t.machines * t.chips_per_machine == t.chips_per_slice


def test_every_slice_has_the_chips_of_its_sides_and_a_machine_type_that_exists():
    there = {"ct5p-hightpu-4t", "tpu7x-standard-4t"} | {
        f"{kind}-{n}t" for kind in ("ct5lp-hightpu", "ct6e-standard") for n in (1, 4, 8)
    }
    for kind, generation in slices.GENERATIONS.items():
        for power in range(14):
            try:
                t = parse(f"{kind}-{generation.cores_in_name << power}")
            except UserError:
                continue
            product = 1
            for side in t.sides:
                product *= side
            assert product == t.chips_per_slice <= generation.largest and t.machine_type in there


@pytest.mark.parametrize("module", ["tanuki_jax.slices", "tanuki_jax.launch.settings", "tanuki_jax.launch.gke"])
def test_a_launch_imports_nothing_heavy(module):
    code = f"import sys, json, {module}; print(json.dumps(sorted({{'jax', 'numpy', 'flax'}} & sys.modules.keys())))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert json.loads(done.stdout) == []
