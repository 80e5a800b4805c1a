"""Splash attention: JAX's Pallas TPU kernel that skips the blocks above the diagonal, for whole rows or parts of them."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from tanuki_jax.ops.device import LANES, on_tpu

MAX_BLOCK = 1024  # queries, and keys, of a block


class _ReorderedCausalMask(masks._ComputableMask):
    """Causal for queries that lie in another order: query i is the row's token query_order[i]."""

    def __init__(self, length: int, query_order: np.ndarray, num_shards: int) -> None:
        super().__init__((length, length), lambda q, kv: q >= kv)
        self.q_sequence = np.asarray(query_order, np.int32)
        self._identity = (length, num_shards, self.q_sequence.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ReorderedCausalMask) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


def make_kernel(
    length: int, heads: int, query_order: np.ndarray | None = None, num_shards: int = 1
) -> splash.SplashAttentionKernel:
    """The kernel for rows of `length` tokens whose queries lie in `query_order` on `num_shards` devices."""
    block_q, block_kv = _block(length // (num_shards if num_shards == 1 else 2 * num_shards)), _block(length)
    if block_q % LANES:
        raise ValueError(f"splash attention: {length} tokens over {num_shards} devices; each needs a multiple of {2 * LANES}")
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,  # the fused backward kernel would save two products, and write q's gradient once per block
        block_kv_dq=block_kv,
    )
    mask = masks.CausalMask((length, length)) if query_order is None else _ReorderedCausalMask(length, query_order, num_shards)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=num_shards,
        residual_checkpoint_name="attention",
        interpret=not on_tpu(),
    )


def attention(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    q_segments_BS: jax.Array,
    kv_segments_BT: jax.Array,
    kernel: splash.SplashAttentionKernel | None,
) -> jax.Array:
    """Causal attention inside segments; without a kernel the queries are the whole row, of any length."""
    S, N, _ = q_BSNH.shape[1:]
    whole_rows = kernel is None
    padding = -S % LANES if whole_rows else 0
    if padding:  # rows are padded with tokens of segment 0 after all others
        q_BSNH, k_BTKH, v_BTKH = (jnp.pad(a, ((0, 0), (0, padding), (0, 0), (0, 0))) for a in (q_BSNH, k_BTKH, v_BTKH))
        q_segments_BS, kv_segments_BT = (jnp.pad(a, ((0, 0), (0, padding))) for a in (q_segments_BS, kv_segments_BT))
    kernel = make_kernel(S + padding, N) if kernel is None else kernel
    q_BNSH, k_BKTH, v_BKTH = (a.swapaxes(1, 2) for a in (q_BSNH, k_BTKH, v_BTKH))
    q_BNSH = checkpoint_name(q_BNSH, "q")
    if whole_rows:
        k_BKTH, v_BKTH = checkpoint_name(k_BKTH, "k"), checkpoint_name(v_BKTH, "v")
    segments = splash.SegmentIds(q_segments_BS, kv_segments_BT)
    y_BNSH = cast(jax.Array, jax.vmap(kernel)(q_BNSH, k_BKTH, v_BKTH, segment_ids=segments))
    return y_BNSH.swapaxes(1, 2)[:, :S].astype(q_BSNH.dtype)


def _block(length: int) -> int:
    return max((b for b in (128, 256, 512, MAX_BLOCK) if length % b == 0), default=length)
