"""Figures of a mixture's parameters that tell whether its experts part ways: similarity, and the size of the routers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

MATRICES = ("gate", "up", "down")


def expert_similarity(moe: Any) -> jax.Array:
    """Mean cosine of the experts of each layer with one another, [L], over gate, up and down together; float32.

    1 right after a copy.  The original's fell from 0.97 to 0.49 over its run.
    """
    gram_LEE = sum(
        jnp.einsum("LEXY,LGXY->LEG", moe[n], moe[n], preferred_element_type=jnp.float32, precision="highest") for n in MATRICES
    )
    size_LE = jnp.sqrt(jnp.diagonal(gram_LEE, axis1=1, axis2=2))
    cosine_LEE = gram_LEE / jnp.maximum(size_LE[:, :, None] * size_LE[:, None, :], 1e-30)
    E = size_LE.shape[1]
    return (cosine_LEE.sum(axis=(1, 2)) - E) / max(E * (E - 1), 1)


def expert_diagnostics(params: Any) -> dict[str, jax.Array]:
    """`moe/similarity` and `moe/router_norm` (root of the sum of squares), a value for each layer; float32."""
    moe = params["layers"]["moe"]
    return {
        "moe/similarity": expert_similarity(moe),
        "moe/router_norm": jnp.sqrt((moe["router"].astype(jnp.float32) ** 2).sum(axis=(1, 2))),
    }
