import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax import ops

REAL = jax.random.normal


def refuse(*args, **more):
    raise AssertionError("these numbers are not ours")


@pytest.fixture
def ours(monkeypatch):
    monkeypatch.setattr(jax.random, "normal", refuse)


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(1, 9), max_size=3))
@settings(max_examples=30, deadline=None)
def test_the_numbers_are_those_of_jax(seed, shape):
    key = jax.random.fold_in(jax.random.key(seed), seed % 1000)
    np.testing.assert_array_equal(ops.normal(key, tuple(shape)), REAL(key, tuple(shape), jnp.float32))


def test_they_are_ours_on_cpus(ours):
    key = jax.random.key(3)
    found = jax.jit(functools.partial(ops.normal, shape=(300, 1001)))(key)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, REAL(key, (300, 1001), jnp.float32))


def test_mapped_over_keys_and_sharded_they_are_the_same(ours):
    keys = jax.random.split(jax.random.key(5), 3)
    mapped = jax.vmap(lambda key: ops.normal(key, (7, 16)))(keys)
    mesh = jax.make_mesh((8,), ("x",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    spread = jax.jit(functools.partial(ops.normal, shape=(7, 16)), out_shardings=where)
    for key, row in zip(keys, mapped, strict=True):
        np.testing.assert_array_equal(row, REAL(key, (7, 16), jnp.float32))
        np.testing.assert_array_equal(spread(key), row)


def test_keys_of_another_kind_are_left_to_jax():
    key = jax.random.key(1, impl="rbg")
    np.testing.assert_array_equal(ops.normal(key, (4, 5)), REAL(key, (4, 5), jnp.float32))
    old = jax.random.PRNGKey(1)
    np.testing.assert_array_equal(ops.normal(old, (4, 5)), REAL(old, (4, 5), jnp.float32))


def test_another_way_of_counting_is_left_to_jax():
    key = jax.random.key(1)
    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(ops.normal(key, (4, 5)), REAL(key, (4, 5), jnp.float32))
