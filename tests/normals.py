"""The normal numbers of `ops.random_normal` from their definition: JAX's own hash, and the rest in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32


def expected_normal(key, shape):
    rows, columns = math.prod(shape[:-1]), math.prod(shape[-1:])
    row, column = np.indices((rows, (columns + 1) // 2), np.uint32)
    key_2 = jax.random.bits(key, (2,), jnp.uint32)
    radius, angle = np.split(np.asarray(threefry_2x32(key_2, np.concatenate([row.ravel(), column.ravel()]))), 2)
    length = np.sqrt(-2 * np.log(((radius >> 9) + 0.5) / 2**23))
    first_quadrant = math.pi / 4 + ((angle.view(np.int32) >> 8) + 0.5) / 2**24 * math.pi / 2
    even = length * np.cos(first_quadrant) * np.where(angle & 1, -1, 1)
    odd = length * np.sin(first_quadrant) * np.where(angle & 2, -1, 1)
    return np.stack([even, odd], axis=-1).reshape(rows, -1)[:, :columns].reshape(shape)
