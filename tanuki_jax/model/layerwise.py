"""The model one part at a time, for models larger than memory: the same modules, assembled by the caller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config
from tanuki_jax.model.attention import Attention, Batch
from tanuki_jax.model.layer_groups import Params
from tanuki_jax.model.layers import compute_dtype, rms_norm
from tanuki_jax.model.moe import route


def embed(cfg: config.ModelConfig, table_VD: jax.Array | np.ndarray, tokens_BS: jax.Array | np.ndarray) -> jax.Array:
    """The residual stream before the first layer, [B, S, D]; only these rows of a NumPy table are moved to the device."""
    return jnp.asarray(table_VD[tokens_BS], compute_dtype(cfg))


def attend(cfg: config.ModelConfig, layer: Params, x_BSD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The stream after a layer's attention, and the input of its FFN or mixture; `layer` has attn and both norms."""
    normed_BSD = rms_norm(x_BSD, layer["norm_attn"], cfg.norm_eps)
    x_BSD = x_BSD + cast(jax.Array, Attention(cfg).apply({"params": layer["attn"]}, normed_BSD, batch))
    return x_BSD, rms_norm(x_BSD, layer["norm_mlp"], cfg.norm_eps)


def ffn(weights: Mapping[str, jax.Array], h_BSD: jax.Array) -> jax.Array:
    """One FFN (dense, or one expert) of every token, computed in float32."""
    gate_BSF, up_BSF = (_product(h_BSD, weights[name]) for name in ("gate", "up"))
    return _product(jax.nn.silu(gate_BSF) * up_BSF, weights["down"])


def _product(x_BSD: jax.Array, w_DF: jax.Array) -> jax.Array:
    """x w in float32; bfloat16 weights are used as they are, since with few tokens CPUs spend most time on converting them.

    A float32 number is the sum of three bfloat16 numbers, and the product of two bfloat16 numbers is exact in float32.
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
    """Gate weight of every expert for every token, [B, S, E], 0 for experts that are not chosen; float32."""
    logits_BSE = jnp.einsum(
        "BSD,DE->BSE", h_BSD.astype(jnp.float32), router_DE.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    routing = route(logits_BSE, cfg.top_k, cfg.normalized_gate, cfg.gate_scale)
    return (jax.nn.one_hot(routing.experts_BSk, cfg.n_experts) * routing.weights_BSk[..., None]).sum(axis=2)


def logits(cfg: config.ModelConfig, norm_final_D: jax.Array, head_DV: jax.Array, x_BSD: jax.Array) -> jax.Array:
    """Logits [B, S, V], float32."""
    return (rms_norm(x_BSD, norm_final_D, cfg.norm_eps) @ head_DV.astype(x_BSD.dtype)).astype(jnp.float32)
