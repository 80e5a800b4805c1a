"""Normal numbers from a key: two from each hash, by arithmetic that XLA compiles to one loop on every platform."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@functools.partial(jax.jit, static_argnames="shape")
def random_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Numbers of N(0, 1), float32, the same on any mesh; the last axis, and the product of all others, are below 2^32.

    Not those of `jax.random.normal`, whose hash XLA compiles for CPUs as a loop of rounds, each of which goes through memory.
    """
    row, column = _indices(math.prod(shape[:-1]), math.prod(shape[-1:]))
    even, odd = _normal_pair(key, row, column >> 1)
    return jnp.where(column & 1, odd, even).reshape(shape)


@functools.partial(jax.jit, static_argnames="shape")
def normal_pairs(key: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """The even and the odd columns of `random_normal(key, shape)`, equally many, up to rounding; for half the work."""
    return _normal_pair(key, *_indices(shape[0], shape[1] // 2))


def _indices(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """The row and the column of each element."""
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, (rows, columns), axis) for axis in (0, 1))
    return row, column


def _normal_pair(key: jax.Array, row: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two normal numbers for each element (Box and Muller 1958): 2^23 radii, and 2^24 angles in each of the four quadrants."""
    a, b = threefry(jax.random.bits(key, (2,), jnp.uint32), row, column)
    # Halves keep both within their open intervals, and are exact.
    uniform = ((a >> 9).astype(jnp.int32).astype(jnp.float32) + 0.5) * np.float32(2**-23)
    angle = ((b.astype(jnp.int32) >> 8).astype(jnp.float32) + 0.5) * np.float32(math.pi / 2 * 2**-24)
    # With angle + pi/4 the cosine is (cos - sin) / sqrt(2) and the sine (cos + sin) / sqrt(2).
    radius, square = jnp.sqrt(-jnp.log(uniform)), angle * angle
    cos = _taylor_series(square, 0)
    sin = angle * _taylor_series(square, 1)
    return _flip_sign(radius * (cos - sin), b << 31), _flip_sign(radius * (cos + sin), b >> 1 << 31)


def _taylor_series(square: jax.Array, first: int) -> jax.Array:
    """cos x (first 0) or sin x / x (first 1) from x^2, for |x| up to pi/4 to float32's precision."""
    total = jnp.zeros_like(square)
    for n in range(first + 8, -1, -2):
        total = total * square + np.float32((-1) ** (n // 2) / math.factorial(n))
    return total


def _flip_sign(x: jax.Array, sign: jax.Array) -> jax.Array:
    """-x where the highest bit of `sign` is set."""
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) ^ sign, jnp.float32)


def threefry(key_2: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two words of hash for two words of a counter: Threefry-2x32 with 20 rounds (Salmon et al. 2011), written out."""
    keys = (key_2[0], key_2[1], key_2[0] ^ key_2[1] ^ np.uint32(0x1BD11BDA))
    x, y = x + keys[0], y + keys[1]
    for turn in range(1, 6):
        for bits in ROTATIONS[(turn - 1) % 2]:
            x = x + y
            y = x ^ (y << np.uint32(bits) | y >> np.uint32(32 - bits))
        x, y = x + keys[turn % 3], y + keys[(turn + 1) % 3] + np.uint32(turn)
    return x, y
