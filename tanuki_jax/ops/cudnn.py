"""cuDNN's flash attention on NVIDIA GPUs: packed segments go by their lengths, so that no mask is made or read."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType  # of what JAX has, the packed layout alone is not public
from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention as kernel

TOKENS = 64  # a row has room for S / TOKENS segments; the kernel keeps [B, N, S] float32 for each
FIXED = (0, 11, 1)  # before it, JAX gave the kernel wrong offsets where heads share keys


def attention(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BS: jax.Array, mask_BST: jax.Array) -> jax.Array:
    """Causal attention inside segments, for bfloat16 or float16.

    Where the queries are a row's own (S = T), a segment is a run of equal ids, and a batch with more of them in a row than
    there is room for is computed with the mask, which reads [S, T] for every head and skips nothing.
    """
    masked = functools.partial(jax.nn.dot_product_attention, mask=mask_BST[:, None], scale=1.0, implementation="cudnn")
    (B, S, N, H), (T, K) = q_BSNH.shape, k_BTKH.shape[1:3]
    if S != T or not _packs(N, K) or B * S * N * H >= 2**31:
        return masked(q_BSNH, k_BTKH, v_BTKH)
    lengths_BM, starts_Bm, fits = segments(ids_BS, max(2, S // TOKENS))

    def packed(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        where = {"q_seqlen": lengths_BM, "kv_seqlen": lengths_BM, "q_offsets": starts_Bm, "kv_offsets": starts_Bm}
        return kernel(q_BSNH, k_BSKH, v_BSKH, **where, mask_type=MaskType.PADDING_CAUSAL, scale=1.0)

    # The rare branch keeps nothing, or the usual one would store its mask, too.
    return jax.lax.cond(fits, packed, jax.checkpoint(masked), q_BSNH, k_BTKH, v_BTKH)


def segments(ids_BS: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The runs of equal ids in each row, padding's included.

    Returns:
      lengths [B, M] and starts [B, M + 1], int32, of up to M = `most` runs, -1 where there are no more; and whether no row
      has more than M.
    """
    B, S = ids_BS.shape
    begins_BS = jnp.concatenate([jnp.ones((B, 1), bool), ids_BS[:, 1:] != ids_BS[:, :-1]], axis=1)
    run_BS = jnp.cumsum(begins_BS, axis=1) - 1
    lengths_BM = jnp.zeros((B, most), jnp.int32).at[jnp.arange(B)[:, None], run_BS].add(1, mode="drop")
    starts_BM = jnp.where(lengths_BM > 0, jnp.cumsum(lengths_BM, axis=1) - lengths_BM, -1)
    starts_Bm = jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(lengths_BM > 0, lengths_BM, -1), starts_Bm, run_BS.max() < most


def residuals(primitive: Any, *_: Any, **__: Any) -> bool:
    """A remat policy: keep the kernel's output and softmax statistics, without which its backward pass runs it again."""
    return str(primitive).startswith("dot_product_attention_fwd")


def _packs(N: int, K: int) -> bool:
    """Whether the packed layout works here: from Hopper on, and for shared keys in a JAX without the wrong offsets."""
    capability = str(getattr(jax.devices()[0], "compute_capability", "0"))
    return float(capability) >= 9 and (N == K or jax.__version_info__ >= FIXED)
