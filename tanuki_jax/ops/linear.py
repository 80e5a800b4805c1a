"""The product of activations with a weight matrix, and the rows of a table."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, w: jax.Array, axes: int = 1) -> jax.Array:
    """x [..., *inner] times w [*inner, *outer], summed over the `axes` inner axes: [..., *outer], in x's dtype.

    The gradient of w is written as inner x outer.  JAX's own is the transpose of outer x inner, for which XLA's CPU backend
    writes a transposed copy of the wider of the two operands.
    """
    return jnp.tensordot(x, w, axes)


def _forward(x, w, axes):
    return linear(x, w, axes), (x, w)


def _backward(axes, kept, gradient):
    x, w = kept
    rows, outer = list(range(x.ndim - axes)), list(range(axes, w.ndim))
    of_x = jnp.tensordot(gradient, w, (list(range(len(rows), gradient.ndim)), outer))
    return of_x, jnp.tensordot(x, gradient, (rows, rows))


linear.defvjp(_forward, _backward)


@jax.custom_vjp
def embedding_lookup(table_VD: jax.Array, index_BS: jax.Array) -> jax.Array:
    """table[index], [B, S, D].

    Its gradient is summed in float32: in bfloat16 a sum of equal parts stops growing at 256 of them, and a batch has many more
    of some tokens.
    """
    return table_VD[index_BS]


def _lookup_forward(table_VD, index_BS):
    return table_VD[index_BS], (table_VD, index_BS)


def _lookup_backward(kept, gradient_BSD):
    table_VD, index_BS = kept
    zeros_VD = jnp.zeros(table_VD.shape, jnp.float32)  # nothing but shape and dtype of the table is kept
    return zeros_VD.at[index_BS].add(gradient_BSD.astype(jnp.float32)).astype(table_VD.dtype), None


embedding_lookup.defvjp(_lookup_forward, _lookup_backward)
