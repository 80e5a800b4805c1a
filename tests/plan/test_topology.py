import sys

import pytest

from tanuki_jax.errors import UserError
from tanuki_jax.plan import topology
from tanuki_jax.plan.topology import parse


@pytest.mark.parametrize(
    ("name", "shape", "chips"),
    [
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-256", "v5p:4x4x8", 128),
        ("v6e-256", "v6e:16x16", 256),
        ("v6e-8", "v6e:2x4", 8),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-16", "v5e:4x4", 16),
        ("2xv5p-256", "v5p:4x4x8", 256),
        ("v6e-1", "v6e:1x1", 1),
        ("v5e-1", "v5e:1x1", 1),
    ],
)
def test_a_name_is_that_many_chips(name, shape, chips):
    topology = parse(name)
    assert (topology.shape, topology.chips) == (shape, chips)


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
NONE += ["v6e--4", "v6e-4.5", "xv6e-4", "1e3xv6e-4", "V5P-8", f"v6e-{'9' * 5000}", f"{'9' * 5000}xv6e-4", "v5p-32768", "v6e-٤"]


@pytest.mark.parametrize("name", NONE)
def test_other_names_are_answered_with_those_there_are(name):
    with pytest.raises(UserError, match="v5p-256|v[56]e-256"):
        parse(name)


def test_more_chips_than_anybody_has_are_not_planned():
    with pytest.raises(UserError, match="25,599,744 chips; no more than 65,536"):
        parse("99999xv6e-256")


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
        parse("v5e-16").devices()
