"""cuDNN's flash attention on NVIDIA GPUs: packed segments go by their lengths, so that no mask is made or read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType  # of what JAX has, the packed layout alone is not public
from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention as kernel

from tanuki_jax.ops.device import gpu_capability

TOKENS = (256, 64)  # room for S / this many segments in a row; the kernel's time and what it keeps grow with the room
FIXED = (0, 11, 1)  # before it, JAX gave the kernel wrong offsets where heads share keys


def attention(
    q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BS: jax.Array, make_mask_BST: Callable[[], jax.Array]
) -> jax.Array:
    """Causal attention inside segments.

    Where the queries are a row's own (S = T), a segment is a run of equal ids, and the batch's fullest row decides how they
    are told to the kernel: not at all (one segment and padding after it), by their lengths, or, if there are more than it has
    room for, by a mask, which is read whole for every head and skips nothing.

    Args:
      q_BSNH, k_BTKH, v_BTKH: bfloat16 or float16, the queries divided by sqrt(H) already.
      ids_BS: int32, the queries' segments.
      make_mask_BST: makes the mask, bool, True where a query sees a key; called where nothing else serves.

    Returns:
      [B, S, N, H] in the dtype of q; softmax in float32.
    """

    def masked(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        mask_B1ST = make_mask_BST()[:, None]  # made here, or every layer would write it for the rare branch alone
        return jax.nn.dot_product_attention(q_BSNH, k_BTKH, v_BTKH, mask=mask_B1ST, scale=1.0, implementation="cudnn")

    (B, S, N, H), (T, K) = q_BSNH.shape, k_BTKH.shape[1:3]
    if S != T or not _packs(N, K) or B * S * N * H >= 2**31:
        return masked(q_BSNH, k_BTKH, v_BTKH)
    rooms = sorted({max(2, S // tokens) for tokens in TOKENS})

    def packed(room: int, q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        lengths_BM, starts_Bm = segments(ids_BS, room)
        where: dict[str, Any] = dict.fromkeys(("q_seqlen", "kv_seqlen"), lengths_BM)
        where |= dict.fromkeys(("q_offsets", "kv_offsets"), starts_Bm)
        return kernel(q_BSNH, k_BSKH, v_BSKH, **where, mask_type=MaskType.PADDING_CAUSAL, scale=1.0)

    whole = functools.partial(jax.nn.dot_product_attention, is_causal=True, scale=1.0, implementation="cudnn")
    # The rare branch keeps nothing, or the usual ones would have to store its mask, too.
    branches: list[Any] = [whole, *(functools.partial(packed, room) for room in rooms), jax.checkpoint(masked)]
    run_BS = _runs(ids_BS)
    chosen = 1 + jnp.searchsorted(jnp.array(rooms), run_BS.max() + 1)
    alone = jnp.where(ids_BS > 0, run_BS, 0).max() == 0
    return jax.lax.switch(jnp.where(alone, 0, chosen), branches, q_BSNH, k_BTKH, v_BTKH)


def _runs(ids_BS: jax.Array) -> jax.Array:
    """The number, from 0 in each row, of the run of equal ids that a token lies in."""
    begins_BS = jnp.pad(ids_BS[:, 1:] != ids_BS[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(begins_BS, axis=1, dtype=jnp.int32)


def segments(ids_BS: jax.Array, room: int) -> tuple[jax.Array, jax.Array]:
    """Lengths [B, M] and starts [B, M + 1], int32, of the first M = `room` runs of equal ids in each row, padding's included.

    -1 where a row has no more of them.
    """
    rows_B1 = jnp.arange(len(ids_BS))[:, None]
    lengths_BM = jnp.zeros((len(ids_BS), room), jnp.int32).at[rows_B1, _runs(ids_BS)].add(1, mode="drop")
    starts_BM = jnp.where(lengths_BM > 0, jnp.cumsum(lengths_BM, axis=1) - lengths_BM, -1)
    return jnp.where(lengths_BM > 0, lengths_BM, -1), jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1)


def residuals(primitive: Any, *_: Any, **__: Any) -> bool:
    """A remat policy: keep the kernel's output and softmax statistics, without which its backward pass runs it again."""
    return str(primitive).startswith("dot_product_attention_fwd")


def _packs(N: int, K: int) -> bool:
    """Whether the packed layout works here: from Hopper on, and for shared keys in a JAX without the wrong offsets."""
    return gpu_capability() >= (9, 0) and (N == K or jax.__version_info__ >= FIXED)
