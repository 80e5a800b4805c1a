"""The mixture of experts: Tanuki's normalised gate, Mixtral's plain one, and the statistics for balance losses."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tanuki_jax import config, ops, parallel
from tanuki_jax.model.layers import Matrix, param_with_lora, parameter

GATE_BINS = 10  # equal parts of [0, 1], by which the largest gate weight of a token is counted
EXPERT_MATRICES = (Matrix("gate", "EDF"), Matrix("up", "EDF"), Matrix("down", "EFD", "residual_out"))


class Routing(NamedTuple):
    """Where a router sends each token; weights and probabilities are float32."""

    weights_BSk: jax.Array  # gate weights of the chosen experts; they sum to 1
    experts_BSk: jax.Array  # the chosen experts, int32
    probs_BSE: jax.Array  # probabilities over all experts


class RouterStats(NamedTuple):
    """Statistics of one layer's router over the tokens that are not padding; float32."""

    aux_B: jax.Array  # Switch load-balancing loss of each row, 1 at perfect balance
    z_B: jax.Array  # mean over the row of logsumexp(logits)^2
    load_E: jax.Array  # assignments to each expert, summed over the batch
    dropped: jax.Array  # assignments beyond an expert's capacity, summed over the batch
    gate_bins: jax.Array  # [GATE_BINS] tokens by their largest gate weight, summed over the batch


def route(logits_BSE: jax.Array, top_k: int, normalized: bool, scale: float = 1.0, bias_E: jax.Array | None = None) -> Routing:
    """Chooses the experts of each token, in float32.

    With `normalized`, logits become z-scores over the experts, scale * (x - mean) / (std + 1e-5) with the unbiased std, as in
    Tanuki-8x8B (Skywork-MoE, eq. 5; scale is its lambda).  The top-k are softmaxed among themselves.  A bias counts only in
    choosing the top-k, not in their weights (Wang et al. 2024, loss-free balancing).
    """
    logits_BSE = logits_BSE.astype(jnp.float32)
    if normalized:
        centred = logits_BSE - logits_BSE.mean(axis=-1, keepdims=True)
        # sqrt has no finite gradient at 0, where all logits are equal
        variance = (centred**2).sum(axis=-1, keepdims=True) / (logits_BSE.shape[-1] - 1)
        std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
        logits_BSE = scale * centred / (std + 1e-5)
    if bias_E is None:
        top_BSk, experts_BSk = jax.lax.top_k(logits_BSE, top_k)
    else:
        experts_BSk = jax.lax.top_k(logits_BSE + jax.lax.stop_gradient(bias_E), top_k)[1]
        top_BSk = jnp.take_along_axis(logits_BSE, experts_BSk, axis=-1)
    return Routing(jax.nn.softmax(top_BSk, axis=-1), experts_BSk, jax.nn.softmax(logits_BSE, axis=-1))


def router_stats(logits_BSE: jax.Array, routing: Routing, kept_BSk: jax.Array, valid_BS: jax.Array) -> RouterStats:
    """Balance of one layer, per row, so that neither accumulation nor the number of devices changes it.

    The Switch loss (Fedus et al. 2021, eq. 4-6; top-k as in Megatron-LM) is E * sum_e P_e * f_e with P_e the mean
    probability of expert e and f_e its share of the assignments.  The original computed it per micro-batch of 1-2 rows.

    Args:
      kept_BSk: bool, the assignments that were not dropped.
      valid_BS: the tokens that are not padding.
    """
    weights_BSk, experts_BSk, probs_BSE = routing
    E = probs_BSE.shape[-1]
    valid_BS = valid_BS.astype(jnp.float32)
    tokens_B = jnp.maximum(valid_BS.sum(axis=1), 1.0)
    counts_BE = jnp.einsum("BSkE,BS->BE", jax.nn.one_hot(experts_BSk, E), valid_BS)
    share_BE = counts_BE / (tokens_B[:, None] * experts_BSk.shape[-1])
    mean_probs_BE = jnp.einsum("BSE,BS->BE", probs_BSE, valid_BS) / tokens_B[:, None]
    z_BS = jax.nn.logsumexp(logits_BSE.astype(jnp.float32), axis=-1) ** 2
    bins_BS = jnp.minimum((weights_BSk.max(axis=-1) * GATE_BINS).astype(jnp.int32), GATE_BINS - 1)
    return RouterStats(
        aux_B=E * (jax.lax.stop_gradient(share_BE) * mean_probs_BE).sum(axis=-1),
        z_B=(z_BS * valid_BS).sum(axis=1) / tokens_B,
        load_E=jax.lax.stop_gradient(counts_BE.sum(axis=0)),
        dropped=jax.lax.stop_gradient((~kept_BSk * valid_BS[..., None]).sum()),
        gate_bins=jnp.einsum("BSn,BS->n", jax.nn.one_hot(bins_BS, GATE_BINS), valid_BS),
    )


class MoE(nn.Module):
    """Router and experts in place of the dense SwiGLU block."""

    cfg: config.ModelConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array) -> tuple[jax.Array, RouterStats]:
        cfg = self.cfg
        router_DE = parallel.unshard(param_with_lora(self, cfg, "router", "DE").astype(jnp.float32), "DE", whole=True)
        matrices = tuple(
            param_with_lora(self, cfg, m.name, m.axes, m.kind, expert=True).astype(x_BSD.dtype) for m in EXPERT_MATRICES
        )
        # At the default precision TPUs would round both operands to bfloat16.
        logits_BSE = jnp.einsum("BSD,DE->BSE", x_BSD.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
        bias_E = parameter(self, cfg, "bias", "E", "zero").astype(jnp.float32) if cfg.router_bias else None
        routing = route(logits_BSE, cfg.top_k, cfg.normalized_gate, cfg.gate_scale, bias_E)
        y_BSD, kept_BSk = _apply_experts(cfg, x_BSD, routing, valid_BS, matrices)
        return y_BSD, router_stats(logits_BSE, routing, kept_BSk, valid_BS)


def _apply_experts(
    cfg: config.ModelConfig, x_BSD: jax.Array, routing: Routing, valid_BS: jax.Array, matrices: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """Each device dispatches its own tokens, to experts that are gathered or, over `expert`, to where the experts are.

    Weights are gathered over the axes that only their storage is split over, and their gradients scattered back; with F
    split over `tensor` the devices' partial sums are added up.  With a capacity an expert takes a share of each device's own
    tokens, in which padding does not count.
    """
    sharded = parallel.batch_is_sharded(x_BSD.shape[0])
    # Rows that do not divide over the mesh (a few prompts): XLA can split the padded products itself, but no kernel.
    impl = cfg.compute.expert_impl if sharded or parallel.axis_size(*parallel.MESH_AXES) == 1 else "padded"
    axis = "expert" if sharded and parallel.axis_size("expert") > 1 else ""

    def ffn(
        x_BSD: jax.Array,
        weights_BSk: jax.Array,
        experts_BSk: jax.Array,
        valid_BS: jax.Array,
        matrices: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, jax.Array]:
        x_TD, weights_Tk, experts_Tk = (a.reshape(-1, a.shape[-1]) for a in (x_BSD, weights_BSk, experts_BSk))
        y_TD, kept_Tk = ops.expert_ffn(
            *(x_TD, weights_Tk, experts_Tk, *matrices),
            impl=impl,
            capacity_factor=cfg.capacity_factor,
            valid_T=valid_BS.reshape(-1),
            axis=axis,
        )
        return y_TD.reshape(x_BSD.shape), kept_Tk.reshape(experts_BSk.shape)

    arguments = (x_BSD, routing.weights_BSk, routing.experts_BSk, valid_BS, matrices)
    if not sharded:
        return ffn(*arguments)
    mesh = jax.sharding.get_abstract_mesh()
    stored, used = (
        tuple(parallel.spec(m.axes, layout, mesh, w.shape) for m, w in zip(EXPERT_MATRICES, matrices, strict=True))
        for layout in ("stored", "used")
    )
    _, _, f_axis = used[0]

    def ffn_local(
        x_BSD: jax.Array,
        weights_BSk: jax.Array,
        experts_BSk: jax.Array,
        valid_BS: jax.Array,
        matrices: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, jax.Array]:
        whole = tuple(parallel.unshard_local(*arguments) for arguments in zip(matrices, stored, used, strict=True))
        y_BSD, kept_BSk = ffn(x_BSD, weights_BSk, experts_BSk, valid_BS, whole)
        return (jax.lax.psum(y_BSD, "tensor") if f_axis else y_BSD), kept_BSk

    tokens = parallel.spec("BS", "activation", mesh, x_BSD.shape[:2])  # a single token is not split over `context`
    specs = (tokens, tokens, tokens, tokens, stored)
    return jax.shard_map(ffn_local, in_specs=specs, out_specs=(tokens, tokens), check_vma=False)(*arguments)
