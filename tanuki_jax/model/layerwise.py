"""The model one part at a time, for models larger than memory: the same modules, put together by the caller."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from tanuki_jax import config
from tanuki_jax.model.attention import Attention, Batch
from tanuki_jax.model.layers import compute_dtype, rms_norm
from tanuki_jax.model.moe import route


def embed(cfg: config.ModelConfig, table_VD: Any, tokens_BS: Any) -> jax.Array:
    """The residual stream before the first layer, [B, S, D]; of a table of NumPy's only these rows are taken."""
    return jnp.asarray(table_VD[tokens_BS], compute_dtype(cfg))


def attend(cfg: config.ModelConfig, layer: Any, x_BSD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The stream after a layer's attention, and what the FFN or the mixture sees of it; `layer` has attn and both norms."""
    normed_BSD = rms_norm(x_BSD, layer["norm_attn"], cfg.norm_eps)
    y_BSD, _ = cast(Any, Attention(cfg).apply({"params": layer["attn"]}, normed_BSD, batch, None))
    x_BSD = x_BSD + y_BSD
    return x_BSD, rms_norm(x_BSD, layer["norm_mlp"], cfg.norm_eps)


def ffn(weights: Any, h_BSD: jax.Array) -> jax.Array:
    """One FFN (dense, or one expert) of every token, computed in float32."""
    gate_BSF, up_BSF = (_product(h_BSD, weights[name]) for name in ("gate", "up"))
    return _product(jax.nn.silu(gate_BSF) * up_BSF, weights["down"])


def _product(x_BSD: jax.Array, w_DF: Any) -> jax.Array:
    """x w in float32; weights in bfloat16 are used as they are, since for few tokens their conversion costs CPUs the most.

    A number of float32 is the sum of three of bfloat16, and the product of two of those is exact in float32.
    """
    if w_DF.dtype != jnp.bfloat16:
        return jnp.einsum("BSD,DF->BSF", x_BSD, w_DF)
    parts = []
    for _ in range(3):
        rounded = jax.lax.reduce_precision(x_BSD, exponent_bits=8, mantissa_bits=7)
        parts.append(rounded.astype(jnp.bfloat16))
        x_BSD = x_BSD - rounded
    return jnp.einsum("pBSD,DF->pBSF", jnp.stack(parts), w_DF, preferred_element_type=jnp.float32).sum(axis=0)


def gates(cfg: config.ModelConfig, router_DE: jax.Array, h_BSD: jax.Array) -> jax.Array:
    """Gate weight of every expert for every token, [B, S, E], 0 where it is not chosen; float32."""
    logits_BSE = jnp.einsum(
        "BSD,DE->BSE", h_BSD.astype(jnp.float32), router_DE.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    weights_BSk, experts_BSk, _ = route(logits_BSE, cfg.top_k, cfg.normalized_gate, cfg.gate_scale)
    return (jax.nn.one_hot(experts_BSk, cfg.n_experts) * weights_BSk[..., None]).sum(axis=2)


def logits(cfg: config.ModelConfig, norm_final_D: jax.Array, head_DV: jax.Array, x_BSD: jax.Array) -> jax.Array:
    """Logits [B, S, V], float32."""
    return (rms_norm(x_BSD, norm_final_D, cfg.norm_eps) @ head_DV.astype(x_BSD.dtype)).astype(jnp.float32)
