"""Rotary positions: against complex numbers, their gradient, and as the product that TPUs make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import ops
from tanuki_jax.model import layers


def inputs(dtype="float32"):
    x = jax.random.normal(jax.random.key(0), (2, 7, 3, 16), dtype)
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2], [5, 6, 7, 8, 900, 901, 902]])
    return x, positions


def test_a_pair_turns_by_its_position_times_its_frequency():
    x, positions = inputs()
    frequencies = 1e4 ** (-np.arange(8) / 8)
    turn = np.exp(1j * np.asarray(positions)[:, :, None, None] * frequencies)
    expected = (np.asarray(x[..., :8]) + 1j * np.asarray(x[..., 8:])) * turn
    found = layers.apply_rope(x, positions, 1e4, scale=0.5)
    np.testing.assert_allclose(found, 0.5 * np.concatenate([expected.real, expected.imag], -1), atol=2e-4)


def plain(x, positions, theta, scale):
    angles = positions[:, :, None, None] * theta ** (-jnp.arange(8) / 8)
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = scale * jnp.cos(angles), scale * jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def test_its_gradient_is_that_of_the_plain_formula():
    x, positions = inputs()
    weights = jax.random.normal(jax.random.key(1), x.shape)
    found, expected = (
        jax.grad(lambda x, f=f: (f(x, positions, 1e4, 0.3) * weights).sum())(x) for f in (layers.apply_rope, plain)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_that_tpus_make_is_the_same_bit_for_bit(dtype, monkeypatch):
    x, positions = inputs(dtype)
    halves = layers.apply_rope(x, positions, 1e4)
    monkeypatch.setattr(ops, "on_tpu", lambda: True)
    np.testing.assert_array_equal(halves, layers.apply_rope(x, positions, 1e4))
