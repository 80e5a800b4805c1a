"""JAX's Pallas kernels for grouped products on Hopper GPUs (Mosaic GPU), joined with their gradients."""

from __future__ import annotations

from typing import Any

import jax

from tanuki_jax.ops.device import gpu_capability

ROWS, STEP, STAGES = 128, 64, 4  # of a tile: rows, inner length, tiles of it on their way
COLUMNS = (192, 128)  # of a tile, the first that divides


def fits(w_EDF: jax.Array) -> bool:
    """Whether the kernels take such matrices, and their transposes, here."""
    _, D, F = w_EDF.shape
    return gpu_capability()[0] == 9 and D % ROWS == F % ROWS == 0 and w_EDF.dtype.itemsize == 2


@jax.custom_vjp
def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows of group e times w[e]: [R, D], [E, D, F], group sizes [E] (int32, multiples of ROWS) -> [R, F].

    bfloat16 or float16, accumulated in float32.  Rows past the last group, of the result and of the gradient of x, stay
    unwritten.
    """
    return _product(x_RD, w_EDF, sizes_E, transposed=False)


def _forward(x_RD, w_EDF, sizes_E):
    return grouped_matmul(x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _backward(kept, gradient_RF):
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu  # it brings JAX's test tools along

    x_RD, w_EDF, sizes_E = kept
    of_w_EDF = transposed_ragged_dot_mgpu.transposed_ragged_dot(
        x_RD, gradient_RF, group_sizes=sizes_E, block_m=ROWS, **_tiles(w_EDF.shape[2])
    )
    return _product(gradient_RF, w_EDF, sizes_E, transposed=True), of_w_EDF, None


grouped_matmul.defvjp(_forward, _backward)


def _product(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transposed: bool) -> jax.Array:
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    tiles = _tiles(w_EDF.shape[1 if transposed else 2])
    return ragged_dot_mgpu.ragged_dot(x_RD, w_EDF, group_sizes=sizes_E, block_m=ROWS, transpose_rhs=transposed, **tiles)


def _tiles(columns: int) -> dict[str, Any]:
    width = next(w for w in COLUMNS if columns % w == 0)
    together = next(n for n in (4, 2, 1) if columns // width % n == 0)
    return {"block_n": width, "block_k": STEP, "max_concurrent_steps": STAGES, "grid_block_n": together}
