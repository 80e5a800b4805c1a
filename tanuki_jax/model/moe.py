"""The mixture of experts: Tanuki's normalised gate, Mixtral's plain one, and what balance losses need to know."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tanuki_jax import config, ops, parallel
from tanuki_jax.model.layers import parameter


class RouterStats(NamedTuple):
    """What one layer's router did with the tokens that are not padding; float32."""

    aux_B: jax.Array  # Switch load-balancing loss of each row, 1 at perfect balance
    z_B: jax.Array  # mean over the row of logsumexp(logits)^2
    load_E: jax.Array  # assignments that each expert received, summed over the batch


def route(logits_BSE: jax.Array, top_k: int, normalized: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gate weights, chosen experts and all probabilities, in float32.

    With `normalized`, logits become z-scores over the experts, (x - mean) / (std + 1e-5) with the unbiased std, as in
    Tanuki-8x8B (Skywork-MoE, eq. 5, lambda 1).  The top-k are softmaxed among themselves.

    Returns:
      weights [B, S, k] that sum to 1, experts [B, S, k] int32, probabilities [B, S, E] over all experts.
    """
    logits_BSE = logits_BSE.astype(jnp.float32)
    if normalized:
        centred = logits_BSE - logits_BSE.mean(axis=-1, keepdims=True)
        # sqrt has no finite gradient at 0, where all logits are equal
        variance = (centred**2).sum(axis=-1, keepdims=True) / (logits_BSE.shape[-1] - 1)
        std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
        logits_BSE = centred / (std + 1e-5)
    top_BSk, experts_BSk = jax.lax.top_k(logits_BSE, top_k)
    return jax.nn.softmax(top_BSk, axis=-1), experts_BSk, jax.nn.softmax(logits_BSE, axis=-1)


def router_stats(logits_BSE: jax.Array, probs_BSE: jax.Array, experts_BSk: jax.Array, valid_BS: jax.Array) -> RouterStats:
    """Balance of one layer, per row, so that neither accumulation nor the number of devices changes it.

    The Switch loss (Fedus et al. 2021, eq. 4-6; top-k as in Megatron-LM) is E * sum_e P_e * f_e with P_e the mean
    probability of expert e and f_e its share of the assignments.  The original computed it per micro-batch of 1-2 rows.
    """
    E = probs_BSE.shape[-1]
    valid_BS = valid_BS.astype(jnp.float32)
    tokens_B = jnp.maximum(valid_BS.sum(axis=1), 1.0)
    counts_BE = jnp.einsum("BSkE,BS->BE", jax.nn.one_hot(experts_BSk, E), valid_BS)
    share_BE = counts_BE / (tokens_B[:, None] * experts_BSk.shape[-1])
    mean_probs_BE = jnp.einsum("BSE,BS->BE", probs_BSE, valid_BS) / tokens_B[:, None]
    z_BS = jax.nn.logsumexp(logits_BSE.astype(jnp.float32), axis=-1) ** 2
    return RouterStats(
        aux_B=E * (jax.lax.stop_gradient(share_BE) * mean_probs_BE).sum(axis=-1),
        z_B=(z_BS * valid_BS).sum(axis=1) / tokens_B,
        load_E=jax.lax.stop_gradient(counts_BE.sum(axis=0)),
    )


class MoE(nn.Module):
    """Router and experts in place of the dense SwiGLU block."""

    cfg: config.Model

    @nn.compact
    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array) -> tuple[jax.Array, RouterStats]:
        cfg = self.cfg
        router_DE = parameter(self, cfg, "router", "DE")
        gate_EDF, up_EDF = parameter(self, cfg, "gate", "EDF"), parameter(self, cfg, "up", "EDF")
        down_EFD = parameter(self, cfg, "down", "EFD", "outer")
        logits_BSE = jnp.einsum("BSD,DE->BSE", x_BSD.astype(jnp.float32), router_DE.astype(jnp.float32))
        weights_BSk, experts_BSk, probs_BSE = route(logits_BSE, cfg.top_k, cfg.normalized_gate)
        experts = (w.astype(x_BSD.dtype) for w in (gate_EDF, up_EDF, down_EFD))
        y_BSD = _local_ffn(x_BSD, weights_BSk, experts_BSk, *experts)
        return y_BSD, router_stats(logits_BSE, probs_BSE, experts_BSk, valid_BS)


def _local_ffn(*arguments: jax.Array) -> jax.Array:
    """Each device dispatches its own tokens; the experts' weights come to it whole."""

    def ffn(x_BSD: jax.Array, weights_BSk: jax.Array, experts_BSk: jax.Array, *matrices: jax.Array) -> jax.Array:
        x_TD, weights_Tk, experts_Tk = (a.reshape(-1, a.shape[-1]) for a in (x_BSD, weights_BSk, experts_BSk))
        return ops.expert_ffn(x_TD, weights_Tk, experts_Tk, *matrices).reshape(x_BSD.shape)

    if not parallel.splits_batch(arguments[0].shape[0]):
        return ffn(*arguments)
    rows, whole = PartitionSpec(parallel.BATCH_AXES), PartitionSpec()
    return jax.shard_map(ffn, in_specs=(rows, rows, rows, whole, whole, whole), out_specs=rows)(*arguments)
