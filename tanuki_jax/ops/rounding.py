"""Stochastic rounding of float32 to bfloat16, so that changes too small for a step of bfloat16 count on average."""

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax.ops.random_normal import threefry


def round_stochastically(x: jax.Array, key_2: jax.Array) -> jax.Array:
    """x, float32, in bfloat16: the neighbour above or below, the nearer the likelier, so that the mean is x.

    What bfloat16 can represent stays as it is, NaN and infinities too.  The draw of an element depends only on the key (two
    words of uint32) and on its index in the array, not on how the array is split over devices.
    """
    words, _ = threefry(key_2, *_indices(x.shape))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # Of the 32 bits bfloat16 holds the upper half; a carry out of the lower half is as likely as that is large.
    rounded = (bits + (words & np.uint32(0xFFFF))) & np.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(rounded, jnp.float32), x).astype(jnp.bfloat16)


def _indices(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The row and the column of each element, by arithmetic along the array's own axes, which may be split over devices."""
    row = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape) - 1):
        row = row * np.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1) if shape else jnp.uint32(0)
    return row, column
