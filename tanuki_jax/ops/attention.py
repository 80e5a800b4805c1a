"""Causal grouped-query attention with segment ids (Ainslie et al. 2023 for GQA); K and V are never repeated."""

import jax
import jax.numpy as jnp


def attention(
    q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BS: jax.Array, *, impl: str = "xla"
) -> jax.Array:
    """Causal self-attention inside segments.

    Args:
      q_BSNH, k_BSKH, v_BSKH: queries and G = N/K times fewer keys and values, any float dtype.
      segment_ids_BS: int32; a token sees the tokens of its own segment up to itself.  0 is padding.
      impl: "xla", or "reference" (a plain loop over heads in float32, for tests).

    Returns:
      [B, S, N, H] in the dtype of q; softmax and its sum in float32.
    """
    S = q_BSNH.shape[1]
    causal_SS = jnp.tril(jnp.ones((S, S), bool))
    mask_BST = causal_SS & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :])
    if impl == "reference":
        return _reference(q_BSNH, k_BSKH, v_BSKH, mask_BST)
    return _xla(q_BSNH, k_BSKH, v_BSKH, mask_BST)


def cached_attention(q_BSNH: jax.Array, k_BMKH: jax.Array, v_BMKH: jax.Array, positions_BS: jax.Array) -> jax.Array:
    """Attention of new tokens to a cache whose slot m holds the key of position m.

    A query at position p sees the slots 0..p, so slots that hold no token yet are never seen.  Returns [B, S, N, H].
    """
    slots_M = jnp.arange(k_BMKH.shape[1])
    return _xla(q_BSNH, k_BMKH, v_BMKH, slots_M <= positions_BS[:, :, None])


def _xla(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BST: jax.Array) -> jax.Array:
    B, S, N, H = q_BSNH.shape
    K = k_BTKH.shape[2]
    q_BSKGH = (q_BSNH * H**-0.5).reshape(B, S, K, N // K, H)
    scores = jnp.einsum("BSKGH,BTKH->BKGST", q_BSKGH, k_BTKH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BST[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("BKGST,BTKH->BSKGH", weights, v_BTKH).reshape(B, S, N, H)


def _reference(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BST: jax.Array) -> jax.Array:
    N, H = q_BSNH.shape[2:]
    G = N // k_BTKH.shape[2]
    heads = []
    for n in range(N):
        q, k, v = (a.astype(jnp.float32) for a in (q_BSNH[:, :, n], k_BTKH[:, :, n // G], v_BTKH[:, :, n // G]))
        scores = jnp.where(mask_BST, q @ k.swapaxes(1, 2) / H**0.5, -jnp.inf)
        heads.append(jax.nn.softmax(scores, axis=-1) @ v)
    return jnp.stack(heads, axis=2).astype(q_BSNH.dtype)
