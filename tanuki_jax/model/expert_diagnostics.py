"""Diagnostics of a mixture's parameters that show whether its experts diverge: their similarity, and the routers' norms."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tanuki_jax.model.layers import FFN_MATRICES
from tanuki_jax.model.transformer import Params


def expert_similarity(moe: Mapping[str, jax.Array]) -> jax.Array:
    """Mean cosine of the experts of each layer with one another, [L], over gate, up and down together; float32.

    1 right after a copy.  In Tanuki-8x8B it fell from 0.97 to 0.49 over the run.
    """
    gram_LEE = sum(
        jnp.einsum("LEXY,LGXY->LEG", moe[n], moe[n], preferred_element_type=jnp.float32, precision="highest")
        for n in FFN_MATRICES
    )
    size_LE = jnp.sqrt(jnp.diagonal(gram_LEE, axis1=1, axis2=2))
    cosine_LEE = gram_LEE / jnp.maximum(size_LE[:, :, None] * size_LE[:, None, :], 1e-30)
    E = size_LE.shape[1]
    return (cosine_LEE.sum(axis=(1, 2)) - E) / max(E * (E - 1), 1)


def expert_diagnostics(params: Params) -> dict[str, jax.Array]:
    """`moe/similarity` and `moe/router_norm` (root of the sum of squares), a value for each layer; float32."""
    moe = params["layers"]["moe"]
    return {
        "moe/similarity": expert_similarity(moe),
        "moe/router_norm": jnp.sqrt((moe["router"].astype(jnp.float32) ** 2).sum(axis=(1, 2))),
    }
