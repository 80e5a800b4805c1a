"""Matrix products of groups of rows, each group with its own matrix: the core of a mixture of experts."""

from __future__ import annotations

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp

from tanuki_jax.ops import mosaic_gpu
from tanuki_jax.ops.device import on_tpu

MEGABLOX_TILES = (512, 1024, 1024)  # rows, inner, columns
MAX_BLOCK = 256  # rows of one product of the blocked path


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, *, impl: str = "ragged") -> jax.Array:
    """Row r of group e times w[e].

    Args:
      x_RD: rows.  The groups lie one after another, group e has group_sizes[e] rows, and rows after the last group give 0.
        Two are different, and give values that the caller must not use for rows in no group: "padded", R = E*C and group e
        starts at row e*C; "mosaic", whose group sizes are multiples of `mosaic_gpu.ROWS`.
      w_EDF: one matrix for each group, same dtype as x.
      group_sizes_E: int32.
      impl: "ragged" is `jax.lax.ragged_dot`, "megablox" JAX's Pallas kernel for TPU (interpreted elsewhere), "mosaic" those
        for Hopper GPUs, "blocked" a loop over blocks of each group's rows, for CPUs, where a ragged dot costs E times the
        work; "padded" one batched product; "reference" masks every group's product.

    Returns:
      [R, F] in the dtype of x, accumulated in float32.
    """
    E, D, F = w_EDF.shape
    if impl == "padded":
        return jnp.einsum("ECD,EDF->ECF", x_RD.reshape(E, -1, D), w_EDF).reshape(-1, F)
    if impl == "reference":
        ends_E = jnp.cumsum(group_sizes_E)
        group_R = jnp.searchsorted(ends_E, jnp.arange(x_RD.shape[0]), side="right")
        onehot_RE = jax.nn.one_hot(group_R, E, dtype=x_RD.dtype)
        return jnp.einsum("RD,EDF,RE->RF", x_RD, w_EDF, onehot_RE)
    if impl == "blocked":
        return _blocked(x_RD, w_EDF, group_sizes_E)
    if impl == "mosaic":
        return mosaic_gpu.grouped_matmul(x_RD, w_EDF, group_sizes_E)
    # Kernels leave rows past the last group unwritten, forward and backward.
    inside_R1 = (jnp.arange(x_RD.shape[0]) < group_sizes_E.sum())[:, None]
    x_RD = jnp.where(inside_R1, x_RD, 0)
    if impl == "megablox":
        from jax.experimental.pallas.ops.tpu.megablox import gmm  # Pallas is slow to import

        tiles = tuple(min(tile, size) for tile, size in zip(MEGABLOX_TILES, (x_RD.shape[0], D, F), strict=True))
        padded = jnp.pad(x_RD, ((0, -x_RD.shape[0] % tiles[0]), (0, 0)))
        y_RF = gmm(padded, w_EDF, group_sizes_E, x_RD.dtype, tiles, interpret=not on_tpu())[: x_RD.shape[0]]
    elif impl == "ragged":
        y_RF = jax.lax.ragged_dot(x_RD, w_EDF, group_sizes_E)
    else:
        raise ValueError(f"grouped_matmul: unknown impl {impl!r}")
    return jnp.where(inside_R1, y_RF, 0)


# --- blocked: a loop over the groups, and inside it one over the group's blocks of C rows ----------------------------------

Residuals: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def _blocked(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _products(x_RD, w_EDF, sizes_E, over=0)


def _products(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, over: int) -> jax.Array:
    """Each group's rows times its matrix, summed over the matrix's axis 0 or (the transposed product) 1.

    Rows of a block that are not the group's stay as they are.
    """
    R, E = x_RD.shape[0], w_EDF.shape[0]
    C = _block(R, E)

    def multiply_group(y_RF: jax.Array, group: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        w_DF, group_start, size = group

        def multiply_block(i: jax.Array, y_RF: jax.Array) -> jax.Array:
            start, in_group_C1 = _place_block(group_start, size, i, C, R)
            old_CF = jax.lax.dynamic_slice_in_dim(y_RF, start, C)
            y_CF = jnp.tensordot(jax.lax.dynamic_slice_in_dim(x_RD, start, C), w_DF, (1, over))
            y_CF = jnp.where(in_group_C1, y_CF, old_CF)
            return jax.lax.dynamic_update_slice_in_dim(y_RF, y_CF, start, 0)

        return jax.lax.fori_loop(0, (size + C - 1) // C, multiply_block, y_RF), None

    zero_RF = jnp.zeros((R, w_EDF.shape[2 - over]), x_RD.dtype)
    return jax.lax.scan(multiply_group, zero_RF, (w_EDF, jnp.cumsum(sizes_E) - sizes_E, sizes_E))[0]


def _forward(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, Residuals]:
    return _blocked(x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _backward(residuals: Residuals, gradient_RF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_RD, w_EDF, sizes_E = residuals
    (R, _), (E, D, F) = x_RD.shape, w_EDF.shape
    C = _block(R, E)

    def sum_group(_: None, group: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        group_start, size = group

        def add_block(i: jax.Array, total_DF: jax.Array) -> jax.Array:
            start, in_group_C1 = _place_block(group_start, size, i, C, R)
            x_CD = jnp.where(in_group_C1, jax.lax.dynamic_slice_in_dim(x_RD, start, C), 0)
            y_CF = jax.lax.dynamic_slice_in_dim(gradient_RF, start, C)
            return total_DF + jnp.einsum("CD,CF->DF", x_CD, y_CF, preferred_element_type=jnp.float32)

        total_DF = jax.lax.fori_loop(0, (size + C - 1) // C, add_block, jnp.zeros((D, F), jnp.float32))
        return None, total_DF.astype(w_EDF.dtype)

    w_gradient_EDF = jax.lax.scan(sum_group, None, (jnp.cumsum(sizes_E) - sizes_E, sizes_E))[1]
    return _products(gradient_RF, w_EDF, sizes_E, over=1), w_gradient_EDF, None


_blocked.defvjp(_forward, _backward)


def _block(R: int, E: int) -> int:
    """Rows of a block: a quarter of a group of the usual size, so that about an eighth of the work is wasted."""
    return max(1, min(MAX_BLOCK, math.ceil(R / E / 4 / 8) * 8, R))


def _place_block(group_start: jax.Array, size: jax.Array, i: jax.Array, C: int, R: int) -> tuple[jax.Array, jax.Array]:
    """The first row of block i of a group, moved up where the block would run past the rows, and [C, 1] which rows are its."""
    unclipped = group_start + i * C
    start = jnp.minimum(unclipped, R - C)
    rows_C1 = start + jnp.arange(C)[:, None]
    return start, (rows_C1 >= unclipped) & (rows_C1 < group_start + size)
