"""Matrix products of groups of rows, each group with its own matrix: the core of a mixture of experts."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm

from tanuki_jax.ops.device import on_tpu

MEGABLOX_TILES = (512, 1024, 1024)  # rows, inner, columns


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, *, impl: str = "ragged") -> jax.Array:
    """Row r of group e times w[e].

    Args:
      x_RD: rows.  "ragged", "megablox" and "reference": the groups lie one after another, group e has group_sizes[e] rows,
        and rows after the last group give 0.  "padded": R = E*C and group e starts at row e*C; rows past its size give
        values that the caller must not use.
      w_EDF: one matrix for each group, same dtype as x.
      group_sizes_E: int32.
      impl: "ragged" is `jax.lax.ragged_dot`, "megablox" JAX's Pallas kernel for TPU (interpreted elsewhere), "padded" one
        batched product, "reference" masks every group's product.

    Returns:
      [R, F] in the dtype of x, accumulated in float32.
    """
    E, D, F = w_EDF.shape
    if impl == "padded":
        return jnp.einsum("ECD,EDF->ECF", x_RD.reshape(E, -1, D), w_EDF).reshape(-1, F)
    inside_R1 = (jnp.arange(x_RD.shape[0]) < group_sizes_E.sum())[:, None]
    if impl == "reference":
        ends_E = jnp.cumsum(group_sizes_E)
        group_R = jnp.searchsorted(ends_E, jnp.arange(x_RD.shape[0]), side="right")
        onehot_RE = jax.nn.one_hot(group_R, E, dtype=x_RD.dtype)
        return jnp.einsum("RD,EDF,RE->RF", x_RD, w_EDF, onehot_RE)
    # Kernels leave rows past the last group unwritten, forward and backward.
    x_RD = jnp.where(inside_R1, x_RD, 0)
    if impl == "megablox":
        tiles = tuple(min(tile, size) for tile, size in zip(MEGABLOX_TILES, (x_RD.shape[0], D, F), strict=True))
        rest = -x_RD.shape[0] % tiles[0]
        padded = jnp.pad(x_RD, ((0, rest), (0, 0)))
        y_RF = gmm(padded, w_EDF, group_sizes_E, x_RD.dtype, tiles, interpret=not on_tpu())[: x_RD.shape[0]]
    elif impl == "ragged":
        y_RF = jax.lax.ragged_dot(x_RD, w_EDF, group_sizes_E)
    else:
        raise ValueError(f"grouped_matmul: unknown impl {impl!r}")
    return jnp.where(inside_R1, y_RF, 0)
