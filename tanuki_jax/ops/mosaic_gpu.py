"""JAX's Pallas kernels for grouped products on Hopper GPUs (Mosaic GPU), joined with their gradients."""

from __future__ import annotations

from typing import TypedDict

import jax

from tanuki_jax.ops.device import gpu_capability

# Of a tile: rows, inner length, and how many tiles of the inner length are in flight.
ROWS, INNER, STAGES = 128, 64, 4
COLUMNS = (192, 128)  # of a tile; the first that divides is used


def fits(w_EDF: jax.Array) -> bool:
    """Whether the kernels take such matrices, and their transposes, on this device."""
    _, D, F = w_EDF.shape
    return gpu_capability()[0] == 9 and D % ROWS == F % ROWS == 0 and w_EDF.dtype.itemsize == 2


@jax.custom_vjp
def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows of group e times w[e]: [R, D], [E, D, F], group sizes [E] (int32, multiples of ROWS) -> [R, F].

    bfloat16 or float16, accumulated in float32.  Rows past the last group, of the result and of the gradient of x, stay
    unwritten.
    """
    return _product(x_RD, w_EDF, sizes_E, transposed=False)


def _forward(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return grouped_matmul(x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _backward(residuals: tuple[jax.Array, jax.Array, jax.Array], gradient_RF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu  # slow to import: it brings JAX's test tools along

    x_RD, w_EDF, sizes_E = residuals
    w_gradient_EDF = transposed_ragged_dot_mgpu.transposed_ragged_dot(
        x_RD, gradient_RF, group_sizes=sizes_E, block_m=ROWS, **_tiles(w_EDF.shape[2])
    )
    return _product(gradient_RF, w_EDF, sizes_E, transposed=True), w_gradient_EDF, None


grouped_matmul.defvjp(_forward, _backward)


def _product(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transposed: bool) -> jax.Array:
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    tiles = _tiles(w_EDF.shape[1 if transposed else 2])
    return ragged_dot_mgpu.ragged_dot(x_RD, w_EDF, group_sizes=sizes_E, block_m=ROWS, transpose_rhs=transposed, **tiles)


class _Tiles(TypedDict):
    block_n: int
    block_k: int
    max_concurrent_steps: int
    grid_block_n: int


def _tiles(columns: int) -> _Tiles:
    width = next(w for w in COLUMNS if columns % w == 0)
    grid_block = next(n for n in (4, 2, 1) if columns // width % n == 0)
    return {"block_n": width, "block_k": INNER, "max_concurrent_steps": STAGES, "grid_block_n": grid_block}
