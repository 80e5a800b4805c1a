"""Dropless dispatch of tokens to SwiGLU experts and back."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax.ops.grouped_matmul import grouped_matmul

# Room per expert, relative to a perfectly even load, that the padded layout tries in turn; the last resort is T rows.
CAPACITIES = (1.25, 2.0)
FEW = 256  # tokens up to which T rows per expert cost too little to choose


def expert_ffn(
    x_TD: jax.Array,
    weights_Tk: jax.Array,
    experts_Tk: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    impl: str = "auto",
) -> jax.Array:
    """Sum over a token's experts of weight * down(silu(gate x) * up x); no token is ever dropped.

    Args:
      x_TD: tokens, in the compute dtype.
      weights_Tk, experts_Tk: gate weights (float32) and expert numbers (int32, distinct within a token).
      gate_EDF, up_EDF, down_EFD: the experts, in the compute dtype.
      impl: "ragged" sorts tokens by expert and uses a ragged product (accelerators); "padded" gives each expert
        equal room and takes the smallest room that holds the fullest expert (CPU, where a ragged product costs E times
        the work); "reference" computes every expert for every token; "auto" chooses by backend.

    Returns:
      [T, D] in the dtype of x; the weighted sum over experts is float32.
    """
    E, T, k = gate_EDF.shape[0], *experts_Tk.shape
    if impl == "auto":
        impl = "padded" if jax.default_backend() == "cpu" else "ragged"
    if impl == "reference":
        h_TEF = jax.nn.silu(jnp.einsum("TD,EDF->TEF", x_TD, gate_EDF)) * jnp.einsum("TD,EDF->TEF", x_TD, up_EDF)
        y_TED = jnp.einsum("TEF,EFD->TED", h_TEF, down_EFD)
        chosen_TkE = jax.nn.one_hot(experts_Tk, E) * weights_Tk[..., None]
        return jnp.einsum("TED,TkE->TD", y_TED, chosen_TkE).astype(x_TD.dtype)

    # rank: how many earlier assignments went to the same expert
    onehot_AE = jax.nn.one_hot(experts_Tk.reshape(-1), E, dtype=jnp.int32)
    sizes_E = onehot_AE.sum(axis=0)
    rank_Tk = ((jnp.cumsum(onehot_AE, axis=0) - 1) * onehot_AE).sum(axis=1).reshape(T, k)

    def run(starts_E: jax.Array, rows: int, layout: str) -> jax.Array:
        slot_Tk = starts_E[experts_Tk] + rank_Tk
        assignment_R = jnp.full((rows,), T * k, jnp.int32).at[slot_Tk.reshape(-1)].set(jnp.arange(T * k, dtype=jnp.int32))
        filled_R1 = (assignment_R < T * k)[:, None]
        x_RD = _take(x_TD, jnp.minimum(assignment_R // k, T - 1), slot_Tk, jnp.ones((T, k), bool))
        matmul = functools.partial(grouped_matmul, group_sizes_E=sizes_E, impl=layout)
        h_RF = jax.nn.silu(matmul(x_RD, gate_EDF)) * matmul(x_RD, up_EDF)
        y_RD = matmul(h_RF, down_EFD)
        back_R1 = jnp.minimum(assignment_R, T * k - 1)[:, None]
        y_TkD = _take(y_RD, slot_Tk.reshape(-1), back_R1, filled_R1).reshape(T, k, -1)
        return jnp.einsum("TkD,Tk->TD", y_TkD, weights_Tk, preferred_element_type=jnp.float32).astype(x_TD.dtype)

    if impl == "ragged":
        return run(jnp.cumsum(sizes_E) - sizes_E, T * k, "ragged")
    if impl != "padded":
        raise ValueError(f"expert_ffn: unknown impl {impl!r}")
    rooms = sorted({min(T, int(np.ceil(c * T * k / E / 8)) * 8) for c in CAPACITIES} | {T}) if T > FEW else [T]
    # The usual case keeps its activations; the rare ones recompute theirs, or every case would store for all others.
    branches: list[Callable[[], jax.Array]] = [
        functools.partial(run, jnp.arange(E) * room, E * room, "padded") for room in rooms
    ]
    branches[1:] = [jax.checkpoint(branch) for branch in branches[1:]]
    return jax.lax.switch(jnp.searchsorted(jnp.array(rooms), sizes_E.max()), branches)


@jax.custom_vjp
def _take(x_MD: jax.Array, index_R: jax.Array, back_Mj: jax.Array, valid_Mj: jax.Array) -> jax.Array:
    """x[index], whose gradient gathers too: row m of x was used by the rows back[m, j] of the result where valid."""
    return x_MD[index_R]


def _take_forward(x_MD, index_R, back_Mj, valid_Mj):
    return x_MD[index_R], (back_Mj, valid_Mj)


def _take_backward(residuals, g_RD):
    back_Mj, valid_Mj = residuals
    g_MjD = jnp.where(valid_Mj[..., None], g_RD[back_Mj], 0)
    return g_MjD.astype(jnp.float32).sum(axis=1).astype(g_RD.dtype), None, None, None


_take.defvjp(_take_forward, _take_backward)
