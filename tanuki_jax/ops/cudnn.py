"""cuDNN's flash attention on NVIDIA GPUs: packed segments are passed as lengths, so that no mask is made or read."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType  # JAX has no public function for the packed layout
from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention as kernel

from tanuki_jax.ops.device import gpu_capability

# Segments that the kernel takes per row: one for every this many tokens.  Its time and its residuals grow with their number.
TOKENS_PER_SEGMENT = (256, 64)
CORRECT_OFFSETS = (0, 11, 1)  # older JAX gave the kernel wrong offsets where heads share keys


def attention(
    q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BS: jax.Array, make_mask_BST: Callable[[], jax.Array]
) -> jax.Array:
    """Causal attention inside segments.

    Where the queries are the whole row's (S = T), a segment is a run of equal ids, and the row of the batch with the most
    segments decides how the kernel gets them: not at all (one segment and padding after it), by their lengths, or, where there
    are more than it takes, by a mask, which is read whole for every head and skips nothing.

    Args:
      q_BSNH, k_BTKH, v_BTKH: bfloat16 or float16, the queries already divided by sqrt(H).
      ids_BS: int32, the queries' segments.
      make_mask_BST: makes the mask, bool, True where a query sees a key; called where nothing else will do.

    Returns:
      [B, S, N, H] in the dtype of q; softmax in float32.
    """

    def with_mask(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        mask_B1ST = make_mask_BST()[:, None]  # made here, or every layer would write it for the rare branch alone
        return jax.nn.dot_product_attention(q_BSNH, k_BTKH, v_BTKH, mask=mask_B1ST, scale=1.0, implementation="cudnn")

    (B, S, N, H), (T, K) = q_BSNH.shape, k_BTKH.shape[1:3]
    if S != T or not _packs(N, K) or B * S * N * H >= 2**31:
        return with_mask(q_BSNH, k_BTKH, v_BTKH)
    capacities = sorted({max(2, S // tokens) for tokens in TOKENS_PER_SEGMENT})

    def with_lengths(capacity: int, q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        lengths_BM, starts_Bm = segments(ids_BS, capacity)
        return kernel(
            *(q_BSNH, k_BSKH, v_BSKH),
            q_seqlen=lengths_BM,
            kv_seqlen=lengths_BM,
            q_offsets=starts_Bm,
            kv_offsets=starts_Bm,
            mask_type=MaskType.PADDING_CAUSAL,
            scale=1.0,
        )

    one_segment = functools.partial(jax.nn.dot_product_attention, is_causal=True, scale=1.0, implementation="cudnn")
    # The rare branch is recomputed in the backward pass, or the usual ones would have to store its mask, too.
    branches: list[Callable[..., jax.Array]] = [
        one_segment,
        *(functools.partial(with_lengths, capacity) for capacity in capacities),
        jax.checkpoint(with_mask),
    ]
    run_BS = _runs(ids_BS)
    branch = 1 + jnp.searchsorted(jnp.array(capacities), run_BS.max() + 1)
    single = jnp.where(ids_BS > 0, run_BS, 0).max() == 0
    return jax.lax.switch(jnp.where(single, 0, branch), branches, q_BSNH, k_BTKH, v_BTKH)


def _runs(ids_BS: jax.Array) -> jax.Array:
    """The index, from 0 in each row, of the run of equal ids that a token lies in."""
    begins_BS = jnp.pad(ids_BS[:, 1:] != ids_BS[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(begins_BS, axis=1, dtype=jnp.int32)


def segments(ids_BS: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Lengths [B, M] and starts [B, M + 1], int32, of the first M = `capacity` runs of equal ids in each row.

    Runs of padding count as well; -1 where a row has no more runs.
    """
    rows_B1 = jnp.arange(len(ids_BS))[:, None]
    lengths_BM = jnp.zeros((len(ids_BS), capacity), jnp.int32).at[rows_B1, _runs(ids_BS)].add(1, mode="drop")
    starts_BM = jnp.where(lengths_BM > 0, jnp.cumsum(lengths_BM, axis=1) - lengths_BM, -1)
    return jnp.where(lengths_BM > 0, lengths_BM, -1), jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1)


def residuals(primitive: object, *_: object, **__: object) -> bool:
    """A remat policy: save the kernel's output and softmax statistics, without which its backward pass runs it again."""
    return str(primitive).startswith("dot_product_attention_fwd")


def _packs(N: int, K: int) -> bool:
    """Whether the packed layout works here: from Hopper on, and for shared keys in a JAX without the wrong offsets."""
    return gpu_capability() >= (9, 0) and (N == K or jax.__version_info__ >= CORRECT_OFFSETS)
