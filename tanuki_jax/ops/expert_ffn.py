"""Dispatch of tokens to SwiGLU experts and back: dropless, or with a fixed capacity for each expert."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tanuki_jax.ops import mosaic_gpu
from tanuki_jax.ops.device import platform
from tanuki_jax.ops.grouped_matmul import grouped_matmul

# Capacities, relative to a perfectly even load, that the padded layout tries in turn; the last resort is T rows.
CAPACITY_FACTORS = (1.25, 2.0)
SMALL_BATCH = 256  # tokens up to which T rows per expert cost too little to choose
FEW_ROWS = 256  # of the padded layout of a few tokens, up to which a CPU computes them faster than a loop over blocks begins
DEFAULT_IMPL = {"cpu": "blocked", "gpu": "mosaic", "tpu": "pallas"}


class ExpertMatrices(NamedTuple):
    """The experts, in the compute dtype."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array


class Assignments(NamedTuple):
    """To which experts each token goes."""

    weights_Tk: jax.Array  # gate weights, float32
    experts_Tk: jax.Array  # expert numbers, int32
    rank_Tk: jax.Array  # how many earlier assignments went to the same expert
    sizes_E: jax.Array  # assignments to each expert


# Ten arguments: the arrays one by one, as their gradients are taken, and options that are passed by name.
def expert_ffn(
    x_TD: jax.Array,
    weights_Tk: jax.Array,
    experts_Tk: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    impl: str = "auto",
    capacity_factor: float = 0.0,
    valid_T: jax.Array | None = None,
    axis: str = "",
) -> tuple[jax.Array, jax.Array]:
    """Sum over a token's experts of weight * down(silu(gate x) * up x).

    Args:
      x_TD: tokens, in the compute dtype.
      weights_Tk, experts_Tk: gate weights (float32) and expert numbers (int32, distinct within a token).
      gate_EDF, up_EDF, down_EFD: the experts, in the compute dtype.
      impl: how products over groups of rows are computed:
        "pallas": our fused TPU kernels (interpreted elsewhere);
        "ragged", "blocked", "megablox", "mosaic": tokens sorted by expert, one grouped product after another
          (`grouped_matmul`);
        "padded": all experts have the same capacity, the smallest that holds the fullest one;
        "reference": every expert for every token;
        "auto": by platform; "padded" for a few tokens on CPUs, and on GPUs where the kernels of "mosaic" do not fit.
      capacity_factor: 0 is dropless.  Else an expert takes the first ceil(capacity_factor * T*k / E) assignments of these T
        tokens and drops the others, which then count 0 (Switch Transformer, Fedus et al. 2021); the layout is "padded".
      valid_T: bool, with a capacity: tokens that are not padding.  Only they take capacity, and only they count in the T
        above; padding gives 0.  Without it all are valid.
      axis: inside shard_map, the mesh axis over which the experts are split: each device holds E / (its size) of them, and
        tokens travel there and back by all-to-all; the layout is "padded".

    Returns:
      [T, D] in the dtype of x, the sum over experts in float32; and bool [T, k], the assignments that were not dropped.
    """
    T, k = experts_Tk.shape
    matrices = ExpertMatrices(gate_EDF, up_EDF, down_EFD)
    if impl == "auto":
        impl = DEFAULT_IMPL.get(platform(), "ragged")
        few = impl == "blocked" and T * gate_EDF.shape[0] <= FEW_ROWS
        if few or (impl == "mosaic" and not mosaic_gpu.fits(gate_EDF)):
            impl = "padded"
    all_Tk = jnp.ones((T, k), bool)
    if impl == "reference" and not capacity_factor:
        return _reference(x_TD, weights_Tk, experts_Tk, matrices), all_Tk
    E = gate_EDF.shape[0] * _shards(axis)
    assignments = _assign(weights_Tk, experts_Tk, E, valid_T if capacity_factor else None)
    if capacity_factor:
        capacity, kept_Tk = _limit(assignments, capacity_factor, valid_T)
        return _padded_layout(x_TD, assignments, kept_Tk, matrices, axis, capacity), kept_Tk
    if impl == "padded" or axis:
        return _smallest_capacity(x_TD, assignments, matrices, axis), all_Tk
    compute = {"pallas": _pallas_layout, "mosaic": _mosaic_layout}.get(impl) or functools.partial(_sorted_layout, impl=impl)
    return compute(x_TD, assignments, matrices), all_Tk


def _shards(axis: str) -> int:
    """Over how many devices the experts are split."""
    return jax.lax.axis_size(axis) if axis else 1


def _assign(weights_Tk: jax.Array, experts_Tk: jax.Array, E: int, valid_T: jax.Array | None) -> Assignments:
    """Assignments with their ranks and the sizes of the experts' groups; with `valid_T` those of valid tokens count alone."""
    T, k = experts_Tk.shape
    onehot_AE = jax.nn.one_hot(experts_Tk.reshape(-1), E, dtype=jnp.int32)
    if valid_T is not None:
        onehot_AE *= jnp.repeat(valid_T, k)[:, None]
    sizes_E = onehot_AE.sum(axis=0)
    rank_Tk = ((jnp.cumsum(onehot_AE, axis=0) - 1) * onehot_AE).sum(axis=1).reshape(T, k)
    return Assignments(weights_Tk, experts_Tk, rank_Tk, sizes_E)


def _limit(assignments: Assignments, capacity_factor: float, valid_T: jax.Array | None) -> tuple[int, jax.Array]:
    """Rows for each expert, and which assignments are kept, [T, k]."""
    (T, k), E = assignments.experts_Tk.shape, assignments.sizes_E.shape[0]
    # Of each token; a little less than the factor says, or a rounding error would be rounded up to a row.
    share = np.float32(capacity_factor * k / E * (1 - 2**-20))
    capacity = min(T, int(np.ceil(np.float32(T) * share)))
    kept_Tk = assignments.rank_Tk < capacity
    if valid_T is not None:
        kept_Tk &= (assignments.rank_Tk < jnp.ceil(valid_T.sum().astype(jnp.float32) * share)) & valid_T[:, None]
    return capacity, kept_Tk


def _reference(x_TD: jax.Array, weights_Tk: jax.Array, experts_Tk: jax.Array, matrices: ExpertMatrices) -> jax.Array:
    gate_EDF, up_EDF, down_EFD = matrices
    h_TEF = jax.nn.silu(jnp.einsum("TD,EDF->TEF", x_TD, gate_EDF)) * jnp.einsum("TD,EDF->TEF", x_TD, up_EDF)
    y_TED = jnp.einsum("TEF,EFD->TED", h_TEF, down_EFD)
    weights_TkE = jax.nn.one_hot(experts_Tk, gate_EDF.shape[0]) * weights_Tk[..., None]
    return jnp.einsum("TED,TkE->TD", y_TED, weights_TkE).astype(x_TD.dtype)


def _swiglu(
    x_RD: jax.Array, matrices: ExpertMatrices, matmul: Callable[..., jax.Array], weight_R1: jax.Array | float = 1.0
) -> jax.Array:
    gate_EDF, up_EDF, down_EFD = matrices
    gate_RF, up_RF = checkpoint_name(matmul(x_RD, gate_EDF), "gate"), checkpoint_name(matmul(x_RD, up_EDF), "up")
    return matmul((jax.nn.silu(gate_RF) * up_RF * weight_R1).astype(x_RD.dtype), down_EFD)


def _sorted_layout(x_TD: jax.Array, assignments: Assignments, matrices: ExpertMatrices, impl: str) -> jax.Array:
    """Rows sorted by expert, without gaps."""
    weights_Tk, experts_Tk, rank_Tk, sizes_E = assignments
    T, k = experts_Tk.shape
    slot_Tk = (jnp.cumsum(sizes_E) - sizes_E)[experts_Tk] + rank_Tk
    x_RD, inverse = _dispatch(x_TD, slot_Tk, jnp.ones((T, k), bool), T * k)
    matmul = functools.partial(grouped_matmul, group_sizes_E=sizes_E, impl=impl)
    return _combine(_swiglu(x_RD, matrices, matmul), weights_Tk, slot_Tk, inverse)


def _pallas_layout(x_TD: jax.Array, assignments: Assignments, matrices: ExpertMatrices) -> jax.Array:
    from tanuki_jax.ops import expert_kernels  # Pallas is slow to import

    weights_Tk, experts_Tk, rank_Tk, sizes_E = assignments
    T, k = experts_Tk.shape
    tiles, starts_E = expert_kernels.layout(sizes_E, T * k)
    slot_Tk = starts_E[experts_Tk] + rank_Tk
    rows = tiles.expert.shape[0] * expert_kernels.TILE
    x_RD, weight_R1, token_R = _dispatch_weighted(x_TD, weights_Tk, slot_Tk, rows)
    y_RD = expert_kernels.swiglu(x_RD, weight_R1[:, 0], *matrices, tiles)
    return _collect(y_RD, slot_Tk, token_R)


def _mosaic_layout(x_TD: jax.Array, assignments: Assignments, matrices: ExpertMatrices) -> jax.Array:
    """Whole tiles for every expert; weights before the last product, whose result their gradient then does not need."""
    weights_Tk, experts_Tk, rank_Tk, sizes_E = assignments
    (T, k), E, tile = experts_Tk.shape, sizes_E.shape[0], mosaic_gpu.ROWS
    sizes_E, rows = -(-sizes_E // tile) * tile, (-(-T * k // tile) + E - 1) * tile
    slot_Tk = (jnp.cumsum(sizes_E) - sizes_E)[experts_Tk] + rank_Tk
    x_RD, weight_R1, token_R = _dispatch_weighted(x_TD, weights_Tk, slot_Tk, rows)
    matmul = functools.partial(grouped_matmul, group_sizes_E=sizes_E, impl="mosaic")
    return _collect(_swiglu(x_RD, matrices, matmul, weight_R1), slot_Tk, token_R)


def _smallest_capacity(x_TD: jax.Array, assignments: Assignments, matrices: ExpertMatrices, axis: str) -> jax.Array:
    """The padded layout with the smallest capacity that drops nothing on any device."""
    (T, k), E = assignments.experts_Tk.shape, assignments.sizes_E.shape[0]
    if T > SMALL_BATCH:
        capacities = sorted({min(T, int(np.ceil(r * T * k / E / 8)) * 8) for r in CAPACITY_FACTORS} | {T})
    else:
        capacities = [T]
    fullest = assignments.sizes_E.max()
    if axis:  # all devices must take the same branch, for there are collectives in it
        fullest = jax.lax.pmax(fullest, jax.sharding.get_abstract_mesh().manual_axes)
    # The usual case saves its activations; the rare ones recompute theirs, or every case would store for all others.
    branches: list[Callable[[], jax.Array]] = [
        functools.partial(_padded_layout, x_TD, assignments, assignments.rank_Tk < capacity, matrices, axis, capacity)
        for capacity in capacities
    ]
    branches[1:] = [jax.checkpoint(branch) for branch in branches[1:]]
    return jax.lax.switch(jnp.searchsorted(jnp.array(capacities), fullest), branches)


def _padded_layout(
    x_TD: jax.Array, assignments: Assignments, kept_Tk: jax.Array, matrices: ExpertMatrices, axis: str, capacity: int
) -> jax.Array:
    """Every expert takes up to `capacity` of these tokens, from row e*capacity on; those that are not kept are dropped."""
    weights_Tk, experts_Tk, rank_Tk, _ = assignments
    shards, local_experts = _shards(axis), matrices.gate_EDF.shape[0]
    E = local_experts * shards
    slot_Tk = jnp.where(kept_Tk, experts_Tk * capacity + rank_Tk, E * capacity)
    x_RD, inverse = _dispatch(x_TD, slot_Tk, kept_Tk, E * capacity)
    if axis:
        x_RD = _to_experts(x_RD, axis, shards, local_experts, capacity)
    no_sizes_E = jnp.zeros((local_experts,), jnp.int32)  # the padded product does not use them
    y_RD = _swiglu(x_RD, matrices, functools.partial(grouped_matmul, group_sizes_E=no_sizes_E, impl="padded"))
    if axis:
        y_RD = _to_tokens(y_RD, axis, shards, local_experts, capacity)
    return _combine(y_RD, jnp.where(kept_Tk, weights_Tk, 0), jnp.minimum(slot_Tk, E * capacity - 1), inverse)


def _to_experts(x_RD: jax.Array, axis: str, shards: int, local_experts: int, capacity: int) -> jax.Array:
    """Rows [shard, expert of the shard, capacity] of all experts -> rows [local expert, shard they come from, capacity]."""
    received = jax.lax.all_to_all(x_RD.reshape(shards, local_experts * capacity, -1), axis, 0, 0)
    received = received.reshape(shards, local_experts, capacity, -1)
    return received.swapaxes(0, 1).reshape(local_experts * shards * capacity, -1)


def _to_tokens(y_RD: jax.Array, axis: str, shards: int, local_experts: int, capacity: int) -> jax.Array:
    """The inverse of `_to_experts`."""
    by_shard = y_RD.reshape(local_experts, shards, capacity, -1).swapaxes(0, 1).reshape(shards, local_experts * capacity, -1)
    return jax.lax.all_to_all(by_shard, axis, 0, 0).reshape(shards * local_experts * capacity, -1)


# --- rows of tokens -> rows of assignments, and back ----------------------------------------------------------------


class Inverse(NamedTuple):
    """What `_combine` needs to undo a dispatch."""

    assignment_R: jax.Array  # the assignment in each row, T*k where there is none
    filled_R1: jax.Array  # bool, whether there is one


def _dispatch(x_TD: jax.Array, slot_Tk: jax.Array, kept_Tk: jax.Array, rows: int) -> tuple[jax.Array, Inverse]:
    """x of the assignment in each of `rows` rows."""
    T, k = slot_Tk.shape
    numbers = jnp.arange(T * k, dtype=jnp.int32)
    assignment_R = jnp.full((rows,), T * k, jnp.int32).at[slot_Tk.reshape(-1)].set(numbers, mode="drop")
    x_RD = _take(x_TD, jnp.minimum(assignment_R // k, T - 1), jnp.minimum(slot_Tk, rows - 1), kept_Tk)
    return x_RD, Inverse(assignment_R, (assignment_R < T * k)[:, None])


def _dispatch_weighted(
    x_TD: jax.Array, weights_Tk: jax.Array, slot_Tk: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, gate weight [R, 1] and token of each row; rows without an assignment have weight 0, and so no part in any gradient."""
    T, k = slot_Tk.shape
    x_RD, (assignment_R, filled_R1) = _dispatch(x_TD, slot_Tk, jnp.ones((T, k), bool), rows)
    weight_R1 = _take(weights_Tk.reshape(-1, 1), jnp.minimum(assignment_R, T * k - 1), slot_Tk.reshape(-1, 1), None)
    return x_RD, jnp.where(filled_R1, weight_R1, 0), jnp.minimum(assignment_R // k, T - 1)


def _combine(y_RD: jax.Array, weights_Tk: jax.Array, slot_Tk: jax.Array, inverse: Inverse) -> jax.Array:
    (T, k), (assignment_R, filled_R1) = slot_Tk.shape, inverse
    y_TkD = _take(y_RD, slot_Tk.reshape(-1), jnp.minimum(assignment_R, T * k - 1)[:, None], filled_R1).reshape(T, k, -1)
    return jnp.einsum("TkD,Tk->TD", y_TkD, weights_Tk, preferred_element_type=jnp.float32).astype(y_RD.dtype)


@jax.custom_vjp
def _take(x_MD: jax.Array, index_R: jax.Array, inverse_Mj: jax.Array, valid_Mj: jax.Array | None) -> jax.Array:
    """x[index], whose gradient gathers too: row m of x was used by the rows inverse[m, j] of the result where valid."""
    return x_MD[index_R]


def _take_forward(
    x_MD: jax.Array, index_R: jax.Array, inverse_Mj: jax.Array, valid_Mj: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    return x_MD[index_R], (inverse_Mj, valid_Mj)


def _take_backward(residuals: tuple[jax.Array, jax.Array | None], gradient_RD: jax.Array) -> tuple[jax.Array, None, None, None]:
    return _sum_of_rows(gradient_RD, *residuals), None, None, None


_take.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def _collect(y_RD: jax.Array, slot_Tk: jax.Array, token_R: jax.Array) -> jax.Array:
    """Sum over a token's k rows.  Its gradient is the gradient of the token in every row, unused ones included."""
    return _sum_of_rows(y_RD, slot_Tk, None)


def _collect_forward(y_RD: jax.Array, slot_Tk: jax.Array, token_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _collect(y_RD, slot_Tk, token_R), token_R


def _collect_backward(token_R: jax.Array, gradient_TD: jax.Array) -> tuple[jax.Array, None, None]:
    return gradient_TD[token_R], None, None


_collect.defvjp(_collect_forward, _collect_backward)


def _sum_of_rows(rows_RD: jax.Array, index_Tj: jax.Array, valid_Tj: jax.Array | None) -> jax.Array:
    """Sum over j of rows[index[:, j]] where valid, in float32; one gather for each j, for TPUs lay [T, j, D] out badly."""
    total_TD = jnp.float32(0)
    for j in range(index_Tj.shape[1]):
        part_TD = rows_RD[index_Tj[:, j]].astype(jnp.float32)
        total_TD += part_TD if valid_Tj is None else jnp.where(valid_Tj[:, j, None], part_TD, 0)
    return total_TD.astype(rows_RD.dtype)
