"""What parameters are, as one short name: for what was made with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tanuki_jax import files
from tanuki_jax.checkpoint.sharding import Tree


def fingerprint(params: Tree) -> str:
    """A hash of all bits of a tree of parameters, wherever they lie; another mesh changes none of it."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    sums = jax.device_get(jax.jit(lambda arrays: [_sum_of_bits(a) for a in arrays])([leaf for _, leaf in leaves]))
    return files.fingerprint(
        [
            [jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape, int(total)]
            for (path, leaf), total in zip(leaves, sums, strict=True)
        ]
    )


def _sum_of_bits(array: jax.Array) -> jax.Array:
    """The bits of every number times an odd number of its place, added up modulo 2^32, uint32."""
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place, stride = jnp.uint32(1), 1
    for axis, size in reversed(list(enumerate(array.shape))):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(2 * stride % 2**32)
        stride *= size
    return (bits * place).sum(dtype=jnp.uint32)
