import pytest

from tanuki_jax.errors import UserError
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


@pytest.mark.parametrize("name", ["v5p", "v9-8", "v5p-100", "v5p-7", "v6e-512", "0xv6e-8", "", "v5p-0"])
def test_other_names_are_answered_with_those_there_are(name):
    with pytest.raises(UserError, match="v5p-256|v6e-256"):
        parse(name)
