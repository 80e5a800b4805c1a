import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax import ops
from tests.normals import expected_normal

CLOSE = dict(rtol=2e-6, atol=1e-6)  # of numbers up to 5.8


@given(st.integers(0, 2**63 - 1), st.sampled_from([(), (1,), (7,), (4, 9), (3, 1, 6)]))
@settings(max_examples=30, deadline=None)
def test_the_numbers_are_those_of_their_definition(seed, shape):
    key = jax.random.fold_in(jax.random.key(seed), seed % 1000)
    np.testing.assert_allclose(ops.random_normal(key, shape), expected_normal(key, shape), **CLOSE)


@pytest.mark.parametrize("shape", [(1, 2), (7, 16), (300, 1002)])
def test_pairs_are_the_even_and_the_odd_columns(shape):
    key = jax.random.key(5)
    found = jax.jit(functools.partial(ops.random_normal, shape=shape))(key)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected_normal(key, shape), **CLOSE)
    for start, half in enumerate(ops.normal_pairs(key, shape)):
        np.testing.assert_allclose(half, found[:, start::2], **CLOSE)


def test_mapped_over_keys_and_sharded_they_are_the_same():
    keys = jax.random.split(jax.random.key(5), 3)
    mapped = jax.vmap(lambda key: ops.random_normal(key, (7, 16)))(keys)
    mesh = jax.make_mesh((8,), ("x",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    spread = jax.jit(functools.partial(ops.random_normal, shape=(7, 16)), out_shardings=where)
    for key, row in zip(keys, mapped, strict=True):
        np.testing.assert_allclose(row, expected_normal(key, (7, 16)), **CLOSE)
        np.testing.assert_array_equal(spread(key), row)


def test_keys_of_any_kind_will_do():
    np.testing.assert_array_equal(
        ops.random_normal(jax.random.PRNGKey(1), (4, 6)), ops.random_normal(jax.random.key(1), (4, 6))
    )
    for kind in ("rbg", "unsafe_rbg"):
        one, other = (ops.random_normal(jax.random.key(seed, impl=kind), (40, 60)) for seed in (1, 2))
        assert abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]) < 4.5 / math.sqrt(2400)


@pytest.fixture(scope="module")
def many():
    return np.asarray(ops.random_normal(jax.random.key(2), (1024, 4096)), np.float64)


def test_their_distribution_is_normal(many):
    n = many.size
    assert abs(many.mean()) < 4.5 / math.sqrt(n)
    assert abs(many.var() - 1) < 4.5 * math.sqrt(2 / n)
    assert abs((many**3).mean()) < 4.5 * math.sqrt(15 / n) and abs((many**4).mean() - 3) < 4.5 * math.sqrt(96 / n)
    for level in np.linspace(-4.5, 4.5, 37):
        below = (1 + math.erf(level / math.sqrt(2))) / 2
        assert abs((many < level).mean() - below) < 4.5 * math.sqrt(below * (1 - below) / n) + 1 / n, level
    assert 4.8 < np.abs(many).max() < 5.8  # four million of them: 5.1 expected


@pytest.mark.parametrize("of", [np.asarray, np.abs, np.sign], ids=["number", "size", "sign"])
def test_no_number_says_anything_of_its_neighbours(many, of):
    x = of(many)
    for down, across in ((0, 1), (0, 2), (1, 0), (1, 1), (512, 0), (0, 2048)):
        one, other = x[down:, across:], x[: len(x) - down, : x.shape[1] - across]
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4.5 / math.sqrt(one.size), (down, across)


def test_another_key_gives_other_numbers(many):
    other = ops.random_normal(jax.random.fold_in(jax.random.key(2), 1), many.shape)
    assert abs(np.corrcoef(many.ravel(), np.ravel(other))[0, 1]) < 4.5 / math.sqrt(many.size)
