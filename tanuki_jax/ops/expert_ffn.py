"""Dispatch of tokens to SwiGLU experts and back: dropless, or with a fixed room for each expert."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tanuki_jax.ops import mosaic_gpu
from tanuki_jax.ops.device import platform
from tanuki_jax.ops.grouped_matmul import grouped_matmul

# Room per expert, relative to a perfectly even load, that the padded layout tries in turn; the last resort is T rows.
CAPACITY_FACTORS = (1.25, 2.0)
SMALL_BATCH = 256  # tokens up to which T rows per expert cost too little to choose
DEFAULT = {"cpu": "blocked", "gpu": "mosaic", "tpu": "pallas"}


def expert_ffn(
    x_TD: jax.Array,
    weights_Tk: jax.Array,
    experts_Tk: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    impl: str = "auto",
    capacity: float = 0.0,
    valid_T: jax.Array | None = None,
    axis: str = "",
) -> tuple[jax.Array, jax.Array]:
    """Sum over a token's experts of weight * down(silu(gate x) * up x).

    Args:
      x_TD: tokens, in the compute dtype.
      weights_Tk, experts_Tk: gate weights (float32) and expert numbers (int32, distinct within a token).
      gate_EDF, up_EDF, down_EFD: the experts, in the compute dtype.
      impl: how products over groups of rows are made:
        "pallas": our fused TPU kernels (interpreted elsewhere);
        "ragged", "blocked", "megablox", "mosaic": tokens sorted by expert, one grouped product after another
          (`grouped_matmul`);
        "padded": each expert gets equal room, the smallest that holds the fullest one;
        "reference": every expert for every token;
        "auto": by platform; on GPUs "mosaic" where its kernels fit, else "padded".
      capacity: 0 is dropless.  Else an expert takes the first ceil(capacity * T*k / E) assignments of these T tokens and
        drops the others, which then count 0 (Switch Transformer, Fedus et al. 2021); the layout is "padded".
      valid_T: bool, with a capacity: tokens that are not padding.  Only they take room, and only they count in the T above;
        padding gives 0.  Without it all are valid.
      axis: inside shard_map, the mesh axis over which the experts are split: each device holds E / (its size) of them, and
        tokens travel there and back by all-to-all; the layout is "padded".

    Returns:
      [T, D] in the dtype of x, the sum over experts in float32; and bool [T, k], the assignments that were not dropped.
    """
    T, k = experts_Tk.shape
    shards = jax.lax.axis_size(axis) if axis else 1
    E = gate_EDF.shape[0] * shards
    if impl == "auto":
        impl = DEFAULT.get(platform(), "ragged")
        if impl == "mosaic" and not mosaic_gpu.fits(gate_EDF):
            impl = "padded"
    everything = jnp.ones((T, k), bool)
    if impl == "reference" and not capacity:
        return _reference(x_TD, weights_Tk, experts_Tk, gate_EDF, up_EDF, down_EFD), everything

    # rank: how many earlier assignments went to the same expert, of valid tokens where there is a capacity
    onehot_AE = jax.nn.one_hot(experts_Tk.reshape(-1), E, dtype=jnp.int32)
    if capacity and valid_T is not None:
        onehot_AE *= jnp.repeat(valid_T, k)[:, None]
    sizes_E = onehot_AE.sum(axis=0)
    rank_Tk = ((jnp.cumsum(onehot_AE, axis=0) - 1) * onehot_AE).sum(axis=1).reshape(T, k)
    matrices = (gate_EDF, up_EDF, down_EFD)

    if capacity:
        share = np.float32(capacity * k / E * (1 - 2**-20))  # of each token; a little less, or an error would be rounded up
        room = min(T, int(np.ceil(np.float32(T) * share)))
        kept_Tk = rank_Tk < room
        if valid_T is not None:
            kept_Tk &= (rank_Tk < jnp.ceil(valid_T.sum().astype(jnp.float32) * share)) & valid_T[:, None]
        return _padded(x_TD, weights_Tk, experts_Tk, rank_Tk, kept_Tk, matrices, axis, shards, room), kept_Tk
    if impl == "padded" or axis:
        return _smallest_capacity(x_TD, weights_Tk, experts_Tk, rank_Tk, sizes_E, matrices, axis, shards), everything
    if impl == "pallas":
        return _pallas(x_TD, weights_Tk, experts_Tk, rank_Tk, sizes_E, matrices), everything
    if impl == "mosaic":
        return _mosaic(x_TD, weights_Tk, experts_Tk, rank_Tk, sizes_E, matrices), everything
    slot_Tk = (jnp.cumsum(sizes_E) - sizes_E)[experts_Tk] + rank_Tk
    x_RD, back = _dispatch(x_TD, slot_Tk, everything, T * k)
    matmul = functools.partial(grouped_matmul, group_sizes_E=sizes_E, impl=impl)
    return _combine(_swiglu(x_RD, matrices, matmul), weights_Tk, slot_Tk, back), everything


def _reference(x_TD, weights_Tk, experts_Tk, gate_EDF, up_EDF, down_EFD):
    h_TEF = jax.nn.silu(jnp.einsum("TD,EDF->TEF", x_TD, gate_EDF)) * jnp.einsum("TD,EDF->TEF", x_TD, up_EDF)
    y_TED = jnp.einsum("TEF,EFD->TED", h_TEF, down_EFD)
    chosen_TkE = jax.nn.one_hot(experts_Tk, gate_EDF.shape[0]) * weights_Tk[..., None]
    return jnp.einsum("TED,TkE->TD", y_TED, chosen_TkE).astype(x_TD.dtype)


def _swiglu(
    x_RD: jax.Array, matrices: tuple[jax.Array, ...], matmul: Callable[..., jax.Array], weight_R1: jax.Array | float = 1.0
) -> jax.Array:
    gate_EDF, up_EDF, down_EFD = matrices
    gate_RF, up_RF = checkpoint_name(matmul(x_RD, gate_EDF), "gate"), checkpoint_name(matmul(x_RD, up_EDF), "up")
    return matmul((jax.nn.silu(gate_RF) * up_RF * weight_R1).astype(x_RD.dtype), down_EFD)


def _pallas(x_TD, weights_Tk, experts_Tk, rank_Tk, sizes_E, matrices):
    from tanuki_jax.ops import expert_kernels  # Pallas takes its time to import

    T, k = experts_Tk.shape
    tiles, starts_E = expert_kernels.layout(sizes_E, T * k)
    slot_Tk = starts_E[experts_Tk] + rank_Tk
    rows = tiles.expert.shape[0] * expert_kernels.TILE
    x_RD, weight_R1, token_R = _dispatch_weighted(x_TD, weights_Tk, slot_Tk, rows)
    y_RD = expert_kernels.swiglu(x_RD, weight_R1[:, 0], *matrices, tiles)
    return _collect(y_RD, slot_Tk, token_R)


def _mosaic(x_TD, weights_Tk, experts_Tk, rank_Tk, sizes_E, matrices):
    """Whole tiles for every expert; weights before the last product, whose result their gradient then does not need."""
    (T, k), E, tile = experts_Tk.shape, sizes_E.shape[0], mosaic_gpu.ROWS
    sizes_E, rows = -(-sizes_E // tile) * tile, (-(-T * k // tile) + E - 1) * tile
    slot_Tk = (jnp.cumsum(sizes_E) - sizes_E)[experts_Tk] + rank_Tk
    x_RD, weight_R1, token_R = _dispatch_weighted(x_TD, weights_Tk, slot_Tk, rows)
    matmul = functools.partial(grouped_matmul, group_sizes_E=sizes_E, impl="mosaic")
    return _collect(_swiglu(x_RD, matrices, matmul, weight_R1), slot_Tk, token_R)


def _smallest_capacity(x_TD, weights_Tk, experts_Tk, rank_Tk, sizes_E, matrices, axis, shards):
    """The padded layout with the smallest room that drops nothing on any device."""
    (T, k), E = experts_Tk.shape, sizes_E.shape[0]
    rooms = sorted({min(T, int(np.ceil(r * T * k / E / 8)) * 8) for r in CAPACITY_FACTORS} | {T}) if T > SMALL_BATCH else [T]
    fullest = sizes_E.max()
    if axis:  # all must take the same branch, for there are collectives in it
        fullest = jax.lax.pmax(fullest, jax.sharding.get_abstract_mesh().manual_axes)
    # The usual case keeps its activations; the rare ones recompute theirs, or every case would store for all others.
    branches: list[Callable[[], jax.Array]] = [
        functools.partial(_padded, x_TD, weights_Tk, experts_Tk, rank_Tk, rank_Tk < room, matrices, axis, shards, room)
        for room in rooms
    ]
    branches[1:] = [jax.checkpoint(branch) for branch in branches[1:]]
    return jax.lax.switch(jnp.searchsorted(jnp.array(rooms), fullest), branches)


def _padded(x_TD, weights_Tk, experts_Tk, rank_Tk, kept_Tk, matrices, axis, shards, room):
    """Every expert takes up to `room` of these tokens, at rows e*room and on; those that are not kept are dropped."""
    E = matrices[0].shape[0] * shards
    slot_Tk = jnp.where(kept_Tk, experts_Tk * room + rank_Tk, E * room)
    x_RD, back = _dispatch(x_TD, slot_Tk, kept_Tk, E * room)
    if axis:
        x_RD = _to_experts(x_RD, axis, shards, E // shards, room)
    none_E = jnp.zeros((E // shards,), jnp.int32)  # the padded product does not look at sizes
    y_RD = _swiglu(x_RD, matrices, functools.partial(grouped_matmul, group_sizes_E=none_E, impl="padded"))
    if axis:
        y_RD = _to_tokens(y_RD, axis, shards, E // shards, room)
    return _combine(y_RD, jnp.where(kept_Tk, weights_Tk, 0), jnp.minimum(slot_Tk, E * room - 1), back)


def _to_experts(x_RD: jax.Array, axis: str, shards: int, mine: int, room: int) -> jax.Array:
    """Rows [shard, expert of the shard, room] of all experts -> rows [my expert, shard they come from, room]."""
    received = jax.lax.all_to_all(x_RD.reshape(shards, mine * room, -1), axis, 0, 0)
    return received.reshape(shards, mine, room, -1).swapaxes(0, 1).reshape(mine * shards * room, -1)


def _to_tokens(y_RD: jax.Array, axis: str, shards: int, mine: int, room: int) -> jax.Array:
    """The way back."""
    mine_first = y_RD.reshape(mine, shards, room, -1).swapaxes(0, 1).reshape(shards, mine * room, -1)
    return jax.lax.all_to_all(mine_first, axis, 0, 0).reshape(shards * mine * room, -1)


# --- rows of tokens -> rows of assignments, and back ----------------------------------------------------------------


def _dispatch(x_TD, slot_Tk, kept_Tk, rows):
    """x of the assignment in each of `rows` rows, and what `_combine` needs to go back: (assignment [R], filled [R, 1])."""
    T, k = slot_Tk.shape
    numbers = jnp.arange(T * k, dtype=jnp.int32)
    assignment_R = jnp.full((rows,), T * k, jnp.int32).at[slot_Tk.reshape(-1)].set(numbers, mode="drop")
    x_RD = _take(x_TD, jnp.minimum(assignment_R // k, T - 1), jnp.minimum(slot_Tk, rows - 1), kept_Tk)
    return x_RD, (assignment_R, (assignment_R < T * k)[:, None])


def _dispatch_weighted(x_TD, weights_Tk, slot_Tk, rows):
    """x, gate weight [R, 1] and token of each row; those of no assignment have weight 0, and so no part in any gradient."""
    T, k = slot_Tk.shape
    x_RD, (assignment_R, filled_R1) = _dispatch(x_TD, slot_Tk, jnp.ones((T, k), bool), rows)
    weight_R1 = _take(weights_Tk.reshape(-1, 1), jnp.minimum(assignment_R, T * k - 1), slot_Tk.reshape(-1, 1), None)
    return x_RD, jnp.where(filled_R1, weight_R1, 0), jnp.minimum(assignment_R // k, T - 1)


def _combine(y_RD, weights_Tk, slot_Tk, back):
    (T, k), (assignment_R, filled_R1) = slot_Tk.shape, back
    y_TkD = _take(y_RD, slot_Tk.reshape(-1), jnp.minimum(assignment_R, T * k - 1)[:, None], filled_R1).reshape(T, k, -1)
    return jnp.einsum("TkD,Tk->TD", y_TkD, weights_Tk, preferred_element_type=jnp.float32).astype(y_RD.dtype)


@jax.custom_vjp
def _take(x_MD: jax.Array, index_R: jax.Array, back_Mj: jax.Array, valid_Mj: jax.Array | None) -> jax.Array:
    """x[index], whose gradient gathers too: row m of x was used by the rows back[m, j] of the result where valid."""
    return x_MD[index_R]


def _take_forward(x_MD, index_R, back_Mj, valid_Mj):
    return x_MD[index_R], (back_Mj, valid_Mj)


def _take_backward(residuals, g_RD):
    return _sum_of_rows(g_RD, *residuals), None, None, None


_take.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def _collect(y_RD: jax.Array, slot_Tk: jax.Array, token_R: jax.Array) -> jax.Array:
    """Sum over a token's k rows.  Its gradient is that of the token in every row, those out of use included."""
    return _sum_of_rows(y_RD, slot_Tk, None)


def _collect_forward(y_RD, slot_Tk, token_R):
    return _collect(y_RD, slot_Tk, token_R), token_R


def _collect_backward(token_R, g_TD):
    return g_TD[token_R], None, None


_collect.defvjp(_collect_forward, _collect_backward)


def _sum_of_rows(rows_RD, index_Tj, valid_Tj):
    """Sum over j of rows[index[:, j]] where valid, in float32; one gather for each j, for TPUs lay [T, j, D] out badly."""
    total_TD = jnp.float32(0)
    for j in range(index_Tj.shape[1]):
        part_TD = rows_RD[index_Tj[:, j]].astype(jnp.float32)
        total_TD += part_TD if valid_Tj is None else jnp.where(valid_Tj[:, j, None], part_TD, 0)
    return total_TD.astype(rows_RD.dtype)
