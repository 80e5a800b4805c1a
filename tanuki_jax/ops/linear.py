"""The product of activations with a weight matrix."""

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
