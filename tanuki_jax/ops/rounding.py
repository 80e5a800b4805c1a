"""From float32 to bfloat16, up or down by chance, so that changes too small for a step of bfloat16 count on the average."""

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax.ops.random_normal import threefry


def round_stochastically(x: jax.Array, key_2: jax.Array) -> jax.Array:
    """x, float32, in bfloat16: the neighbour above or below, each the likelier the nearer, so that the mean is x's.

    What bfloat16 holds stays as it is, NaN and infinities too.  The draw of an element depends on the key (two words of uint32)
    and on its place in the array alone, not on how the array is split over devices.
    """
    words, _ = threefry(key_2, *_places(x.shape))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # Of the 32 bits bfloat16 holds the upper half; a carry out of the lower half is as likely as that is large.
    drawn = (bits + (words & np.uint32(0xFFFF))) & np.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(drawn, jnp.float32), x).astype(jnp.bfloat16)


def _places(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Of each element the number of its row and its column, in the array's own axes, along which it may be split."""
    row = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape) - 1):
        row = row * np.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1) if shape else jnp.uint32(0)
    return row, column
