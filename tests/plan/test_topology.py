import importlib.util
import sys

import pytest

from tanuki_jax.errors import UserError
from tanuki_jax.plan import topology
from tanuki_jax.slices import parse


@pytest.mark.parametrize(
    ("found", "wanted", "words"),
    [
        ("0.0.52", "libtpu==0.0.42.*; extra == 'tpu'", ["libtpu 0.0.52", "0.0.42.*", "pip install"]),
        ("0.0.41", "libtpu==0.0.42.*; extra == 'tpu'", ["libtpu 0.0.41", "0.0.42.*"]),
        ("0.0.4", "libtpu == 0.0.42 ; extra == 'tpu'", ["0.0.42"]),
        ("0.0.42.1", "libtpu==0.0.42.*; extra == 'tpu'", None),
        ("0.0.42", "libtpu==0.0.42.*; extra == 'tpu'", None),
        ("0.0.42", "libtpu==0.0.42", None),
        ("9.9", "numpy>=2.0", None),  # a JAX that names none
    ],
)
def test_a_compiler_of_another_jax_is_told_before_it_compiles(found, wanted, words, monkeypatch):
    monkeypatch.setattr(topology.importlib.metadata, "version", lambda _: found)
    monkeypatch.setattr(
        topology.importlib.metadata, "requires", lambda _: ["jaxlib<=0.10.2", wanted, "requests; extra == 'tpu'"]
    )
    if words is None:
        return topology._check_compiler()
    with pytest.raises(UserError) as error:
        topology._check_compiler()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_no_compiler_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"pip install 'tanuki-jax\[plan\]'"):
        topology.devices.__wrapped__(parse("v5e-16"))


needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")


@needs_compiler
@pytest.mark.parametrize("name", ["v5p-16", "v5e-8", "v6e-16", "2xv6e-16", "tpu7x-16", "2xtpu7x-16", "v6e-1"])
def test_the_table_of_slices_is_what_the_compiler_lays_out(name):
    described = parse(name)
    found = topology.devices(described)
    each = described.generation.devices_per_chip
    assert {d.device_kind for d in found} == {described.generation.device_kind}
    assert len(found) == described.devices == described.chips * each
    assert {getattr(d, "slice_index", None) or 0 for d in found} == set(range(described.slices))
    places = {(getattr(d, "slice_index", None) or 0, *d.coords) for d in found}
    assert len(places) == described.chips
    sides = (*described.sides, 1)[:3]
    assert {place[1:] for place in places} == {
        (x, y, z) for x in range(sides[0]) for y in range(sides[1]) for z in range(sides[2])
    }


@needs_compiler
@pytest.mark.parametrize("name", ["v5p-16", "v5e-16", "v6e-16", "tpu7x-16"])
def test_machines_of_several_are_those_of_the_compiler(name):
    described = parse(name)
    found = topology.devices(described)
    assert len({d.process_index for d in found}) == described.machines
