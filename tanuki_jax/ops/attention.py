"""Causal grouped-query attention with segment ids (Ainslie et al. 2023 for GQA); K and V are never repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tanuki_jax.ops import cudnn
from tanuki_jax.ops.device import LANES, platform

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel

DEFAULT_IMPL = {"tpu": "splash", "gpu": "cudnn", "cpu": "xla"}
# The xla path splits a row's queries into this many blocks, none of fewer tokens than the minimum.
QUERY_BLOCKS, MIN_QUERY_BLOCK = 8, 64


# Eight arguments: the last three are for context parallelism, where a device has only some of a row's queries.
def attention(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BS: jax.Array,
    *,
    impl: str = "auto",
    key_segment_ids_BT: jax.Array | None = None,
    query_positions_S: jax.Array | None = None,
    kernel: SplashAttentionKernel | None = None,
) -> jax.Array:
    """Causal self-attention inside segments.

    Args:
      q_BSNH, k_BTKH, v_BTKH: queries, already divided by sqrt(H), and G = N/K times fewer keys and values, any float dtype.
      segment_ids_BS: int32; a token sees the tokens of its own segment up to itself.  0 is padding.
      impl: "splash" (Pallas, TPU; interpreted elsewhere), "cudnn" (GPU, bfloat16 or float16), "xla", "reference" (a plain
        loop over heads in float32, for tests), or "auto": by platform.
      key_segment_ids_BT, query_positions_S: where the queries are only some of the row's tokens (context parallelism): the
        segment ids of all T keys, and the index in the row of each query.
      kernel: for splash with `query_positions_S`: this device's part of the kernel that `splash_kernel` made for all queries
        of the row.

    Returns:
      [B, S, N, H] in the dtype of q; softmax and its sum in float32.  For remat policies the queries are named "q", and,
      where they are the whole row's, keys "k" and values "v", in the layout that the kernel takes; the result "attention".
    """
    impl = _resolve(impl, platform())
    keys_BT = segment_ids_BS if key_segment_ids_BT is None else key_segment_ids_BT
    if impl == "splash":
        from tanuki_jax.ops import splash  # Pallas is slow to import

        return splash.attention(q_BSNH, k_BTKH, v_BTKH, segment_ids_BS, keys_BT, kernel)
    q_BSNH = checkpoint_name(q_BSNH, "q")
    whole_rows = query_positions_S is None
    if whole_rows:
        k_BTKH, v_BTKH = checkpoint_name(k_BTKH, "k"), checkpoint_name(v_BTKH, "v")
    make_mask_BST = _mask_maker(segment_ids_BS, keys_BT, query_positions_S)
    if impl == "reference":
        return _reference(q_BSNH, k_BTKH, v_BTKH, make_mask_BST())
    if impl == "cudnn":  # its remat policy is cudnn.residuals
        return cudnn.attention(q_BSNH, k_BTKH, v_BTKH, segment_ids_BS, make_mask_BST)
    if impl == "xla":
        compute = _xla_in_blocks if whole_rows else _xla
        return checkpoint_name(compute(q_BSNH, k_BTKH, v_BTKH, make_mask_BST()), "attention")
    raise ValueError(f"attention: unknown impl {impl!r}")


def _resolve(impl: str, platform: str) -> str:
    return DEFAULT_IMPL.get(platform, "xla") if impl == "auto" else impl


def _mask_maker(segment_ids_BS: jax.Array, keys_BT: jax.Array, query_positions_S: jax.Array | None) -> Callable[[], jax.Array]:
    """Makes the mask, True where a query sees a key, when it is called: not every implementation needs it."""

    def make_mask_BST() -> jax.Array:
        positions_S = jnp.arange(segment_ids_BS.shape[1]) if query_positions_S is None else query_positions_S
        causal_ST = positions_S[:, None] >= jnp.arange(keys_BT.shape[1])
        return causal_ST & (segment_ids_BS[:, :, None] == keys_BT[:, None, :])

    return make_mask_BST


def splash_kernel(
    impl: str, query_order_S: np.ndarray | None, length: int, heads: int, num_shards: int
) -> SplashAttentionKernel | None:
    """The kernel for `num_shards` devices that hold a row's queries in `query_order_S`; None where `impl` is not splash."""
    if _resolve(impl, platform()) != "splash" or num_shards == 1:
        return None
    from tanuki_jax.ops import splash

    return splash.make_kernel(length, heads, query_order_S, num_shards)


def query_shards(impl: str, platform: str) -> int:
    """Where devices split a row: each half of a device's queries must be a multiple of this many tokens."""
    return LANES if _resolve(impl, platform) == "splash" else 1


def cached_attention(q_BSNH: jax.Array, k_BKMH: jax.Array, v_BKMH: jax.Array, positions_BS: jax.Array) -> jax.Array:
    """Attention of new tokens, their queries already divided by sqrt(H), to a cache whose slot m holds the key of position m.

    A query at position p sees the slots 0..p, so slots that hold no token yet are never seen.  Returns [B, S, N, H].
    """
    slots_M = jnp.arange(k_BKMH.shape[2])
    return _xla_by_head(q_BSNH, k_BKMH, v_BKMH, slots_M <= positions_BS[:, :, None])


def _xla_in_blocks(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BSS: jax.Array) -> jax.Array:
    """The queries in blocks, each with the keys up to its end, which halves the work."""
    S = q_BSNH.shape[1]
    block = max(-(-S // QUERY_BLOCKS), MIN_QUERY_BLOCK)
    parts = []
    for start in range(0, S, block):
        end = min(start + block, S)
        parts.append(_xla(q_BSNH[:, start:end], k_BSKH[:, :end], v_BSKH[:, :end], mask_BSS[:, start:end, :end]))
    return jnp.concatenate(parts, axis=1)


def _xla(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BST: jax.Array) -> jax.Array:
    return _xla_by_head(q_BSNH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), mask_BST)


def _xla_by_head(q_BSNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, mask_BST: jax.Array) -> jax.Array:
    """The queries of the heads that share keys are the rows of one matrix product: XLA's CPU backend is slow at other orders.

    The softmax is divided by its sum after the product with the values, where its backward pass is the shortest.
    """
    (B, S, N, H), (K, T) = q_BSNH.shape, k_BKTH.shape[1:3]
    q_BKRH = q_BSNH.reshape(B, S, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)  # R = G*S
    scores = jnp.einsum("BKRH,BKTH->BKRT", q_BKRH, k_BKTH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BST[:, None, None], scores.reshape(B, K, -1, S, T), jnp.finfo(jnp.float32).min)
    exp = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights_BKRT = exp.reshape(B, K, -1, T).astype(v_BKTH.dtype)
    y_BKRH = jnp.einsum("BKRT,BKTH->BKRH", weights_BKRT, v_BKTH, preferred_element_type=jnp.float32)
    y_BKGSH = y_BKRH.reshape(B, K, -1, S, H) / exp.sum(axis=-1, keepdims=True)
    return y_BKGSH.astype(q_BSNH.dtype).transpose(0, 3, 1, 2, 4).reshape(B, S, N, H)


def _reference(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BST: jax.Array) -> jax.Array:
    N = q_BSNH.shape[2]
    G = N // k_BTKH.shape[2]
    heads = []
    for n in range(N):
        q, k, v = (a.astype(jnp.float32) for a in (q_BSNH[:, :, n], k_BTKH[:, :, n // G], v_BTKH[:, :, n // G]))
        scores = jnp.where(mask_BST, q @ k.swapaxes(1, 2), -jnp.inf)
        heads.append(jax.nn.softmax(scores, axis=-1) @ v)
    return jnp.stack(heads, axis=2).astype(q_BSNH.dtype)
