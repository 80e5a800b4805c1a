"""The product of activations with a weight matrix, and the lookup of rows in a table."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, w: jax.Array, axes: int = 1) -> jax.Array:
    """x [..., *in] times w [*in, *out], summed over the `axes` input axes: [..., *out], in x's dtype.

    The gradient of w is written as in x out.  JAX's own is the transpose of out x in, for which XLA's CPU backend writes a
    transposed copy of the wider of the two operands.
    """
    return jnp.tensordot(x, w, axes)


def _forward(x: jax.Array, w: jax.Array, axes: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear(x, w, axes), (x, w)


def _backward(axes: int, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    rows, out = list(range(x.ndim - axes)), list(range(axes, w.ndim))
    x_gradient = jnp.tensordot(gradient, w, (list(range(len(rows), gradient.ndim)), out))
    return x_gradient, jnp.tensordot(x, gradient, (rows, rows))


linear.defvjp(_forward, _backward)


@jax.custom_vjp
def embedding_lookup(table_VD: jax.Array, index_BS: jax.Array) -> jax.Array:
    """table[index], [B, S, D].

    Its gradient is summed in float32: in bfloat16 a sum of equal terms stops growing after 256 of them, and a batch has many
    more of some tokens.
    """
    return table_VD[index_BS]


def _lookup_forward(table_VD: jax.Array, index_BS: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table_VD[index_BS], (table_VD, index_BS)


def _lookup_backward(residuals: tuple[jax.Array, jax.Array], gradient_BSD: jax.Array) -> tuple[jax.Array, None]:
    table_VD, index_BS = residuals
    zeros_VD = jnp.zeros(table_VD.shape, jnp.float32)  # only shape and dtype of the table are used
    return zeros_VD.at[index_BS].add(gradient_BSD.astype(jnp.float32)).astype(table_VD.dtype), None


embedding_lookup.defvjp(_lookup_forward, _lookup_backward)
