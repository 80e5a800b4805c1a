"""Weights as planes of float32: one plane for an ordinary matrix, two for a matrix of bfloat16 pairs, each packed in a uint32.

A hash gives two normal numbers, but XLA's loops for CPUs have one result each.  Where an element is a pair, one hash serves
both numbers, in one pass through memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import ops


def pack(w: np.ndarray) -> np.ndarray:
    """A matrix [R, C] of bfloat16, C even, as pairs [R, C/2]; the same memory."""
    return w.view(np.uint32)


def is_packed(w: jax.Array) -> bool:
    """Whether a matrix holds pairs."""
    return w.dtype == jnp.uint32


def planes(w: jax.Array) -> tuple[jax.Array, ...]:
    """The numbers of w in float32: all of them, or even columns and odd ones."""
    if not is_packed(w):
        return (w.astype(jnp.float32),)
    low, high = w << 16, w & np.uint32(0xFFFF0000)
    return tuple(jax.lax.bitcast_convert_type(half, jnp.float32) for half in (low, high))


def unpack(parts: Sequence[jax.Array], w: jax.Array) -> jax.Array:
    """A matrix like w from its planes, rounded to its dtype."""
    if not is_packed(w):
        return parts[0].astype(w.dtype)
    rounded = (jax.lax.reduce_precision(part, 8, 7) for part in parts)
    low, high = (jax.lax.bitcast_convert_type(part, jnp.uint32) for part in rounded)
    return low >> 16 | high


def across(row_C: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
    """A value per column of w, once per plane."""
    return (row_C[0::2], row_C[1::2]) if is_packed(w) else (row_C,)


def down(column_R: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
    """A value per row of w, once per plane."""
    return (column_R[:, None],) * (2 if is_packed(w) else 1)


def normals(key: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
    """A normal number per element of w, by its planes."""
    rows, columns = w.shape
    return ops.normal_pairs(key, (rows, 2 * columns)) if is_packed(w) else (ops.random_normal(key, w.shape),)
