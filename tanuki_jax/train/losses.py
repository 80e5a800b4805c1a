"""The losses.  Each is (params, batch) -> (sum, weight, metrics); the step divides once, by the weight of the whole batch.

A metric is a pair (sum, weight) too, so that accumulation, packing, padding and devices never change what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tanuki_jax import config, model, parallel
from tanuki_jax.train.balance import Balance
from tanuki_jax.train.preference import pair_loss

Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
# (params, batch), the balance where there is one, and a key where something is drawn
LossFn = Callable[..., tuple[jax.Array, jax.Array, Metrics]]


def make_loss(
    kind: str, cfg: config.ModelConfig, options: config.Loss, sources: Sequence[str] = (), dropout: float = 0.0
) -> LossFn:
    """The loss of a stage kind: next-token prediction for pretrain and sft, preference for dpo.

    Args:
      sources: names of what `batch["sources"]` [B] numbers; the loss of each is reported where there are several.
      dropout: rate on the inputs of adapters, for calls with a key.
    """
    made = preference(cfg, options, sources) if kind == "dpo" else next_token(cfg, options, sources, entropy=kind == "sft")

    def loss(
        params: Any, batch: Batch, balance: Balance | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        batch, zigzag = parallel.zigzag(batch)
        return made(params, batch, balance, None if key is None else model.Dropout(dropout, key), zigzag)

    return loss


def _by_source(
    batch: Batch, sources: Sequence[str], value_B: jax.Array, weight_B: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """`loss/NAME` of each source, where there are several."""
    found = {}
    for number, name in enumerate(sources if len(sources) > 1 else ()):
        mine_B = batch["sources"] == number
        found[f"loss/{name}"] = (value_B * mine_B).sum(), (weight_B * mine_B).sum()
    return found


def next_token(cfg: config.ModelConfig, options: config.Loss, sources: Sequence[str] = (), entropy: bool = False) -> LossFn:
    """Cross entropy of the labelled tokens, plus z_loss * (log Z)^2 and the router's losses.

    Pretraining and SFT differ only in the batch's `loss_weights`.  z-loss: PaLM section 5; Tanuki used 1e-4.
    """

    def loss(
        params: Any,
        batch: Batch,
        balance: Balance | None = None,
        dropout: model.Dropout | None = None,
        zigzag: bool = False,
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        outputs = model.apply(cfg, params, batch, dropout, zigzag)
        scores = model.token_scores(cfg, params, outputs, batch["targets"], entropy)
        weights_BS = batch["loss_weights"].astype(jnp.float32)
        weight_B = weights_BS.sum(axis=1)
        weight = weight_B.sum()
        nll_B, z = -(scores.logprob * weights_BS).sum(axis=1), (scores.log_z**2 * weights_BS).sum()
        metrics = {
            "loss": (nll_B.sum(), weight),
            "mean_token_accuracy": ((scores.correct * weights_BS).sum(), weight),
            "z_loss": (z, weight),
            **_by_source(batch, sources, nll_B, weight_B),
        }
        if scores.entropy is not None:
            metrics["entropy"] = (scores.entropy * weights_BS).sum(), weight
        router, router_metrics = _router_loss(cfg, outputs, options, weight_B, balance)
        return nll_B.sum() + options.z_loss * z + router, weight, metrics | router_metrics

    return loss


class PairScores(NamedTuple):
    """Of the answers of each pair, chosen and rejected; 0 where there is no pair."""

    logprobs: jax.Array  # [B, P, 2] summed over the labelled tokens, float32
    lengths: jax.Array  # [B, P, 2] labelled tokens, float32
    correct: jax.Array  # [B, P, 2] of these, those that are the likeliest, float32
    logits: jax.Array  # [B, P, 2] sum over these of the mean logit of the vocabulary, float32
    entropy: jax.Array  # [B, P, 2] sum over these, float32


def pair_scores(
    cfg: config.ModelConfig, params: Any, batch: Batch, dropout: model.Dropout | None = None, zigzag: bool = False
) -> tuple[PairScores, model.Outputs]:
    """Scores of the answers of a batch of pairs.

    `pair_segments` [B, P, 2] names the segment of each answer in its row, so pairs are packed like any other text.
    """
    outputs = model.apply(cfg, params, batch, dropout, zigzag)
    scores = model.token_scores(cfg, params, outputs, batch["targets"], entropy=True)
    assert scores.entropy is not None
    logits_BS = jax.lax.stop_gradient(model.mean_logits(cfg, params, outputs))
    weights_BS = batch["loss_weights"].astype(jnp.float32)
    segments = 2 * batch["pair_segments"].shape[1] + 1

    def of_answers(values_BS: jax.Array) -> jax.Array:
        add = lambda v, s: jax.ops.segment_sum(v, s, num_segments=segments)  # noqa: E731
        per_segment_BM = jax.vmap(add)(values_BS, batch["segment_ids"])
        found_BP2 = jax.vmap(lambda row, index: row[index])(per_segment_BM, batch["pair_segments"])
        return jnp.where(batch["pair_segments"] > 0, found_BP2, 0.0)

    values = (scores.logprob, jnp.ones_like(weights_BS), scores.correct, logits_BS, scores.entropy)
    return PairScores(*(of_answers(value_BS * weights_BS) for value_BS in values)), outputs


def preference(cfg: config.ModelConfig, options: config.Loss, sources: Sequence[str] = ()) -> LossFn:
    """Direct preference optimisation: the weighted sum of losses that `options.preference` names (train/preference.py).

    The batch carries `ref_logprobs` [B, P, 2] of the reference model.  Metrics have TRL's names; weight counts pairs.
    """

    def loss(
        params: Any,
        batch: Batch,
        balance: Balance | None = None,
        dropout: model.Dropout | None = None,
        zigzag: bool = False,
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        scores, outputs = pair_scores(cfg, params, batch, dropout, zigzag)
        logp_BP2, lengths_BP2, correct_BP2, logits_BP2, entropy_BP2 = scores
        valid_BP = (batch["pair_segments"][..., 0] > 0).astype(jnp.float32)
        ratios_BP2 = logp_BP2 - batch["ref_logprobs"]
        rewards_BP2 = options.beta * ratios_BP2
        margin_BP = rewards_BP2[..., 0] - rewards_BP2[..., 1]
        per_pair_BP = pair_loss(
            options.preference or {"sigmoid": 1.0}, ratios_BP2, logp_BP2, lengths_BP2, options.beta, options.label_smoothing
        )
        weight = valid_BP.sum()

        def mean(value_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
            return (value_BP * valid_BP).sum(), weight

        metrics = {
            "loss": mean(per_pair_BP),
            "rewards/chosen": mean(rewards_BP2[..., 0]),
            "rewards/rejected": mean(rewards_BP2[..., 1]),
            "rewards/margins": mean(margin_BP),
            "rewards/accuracies": mean((margin_BP > 0).astype(jnp.float32)),
            "logps/chosen": mean(logp_BP2[..., 0]),
            "logps/rejected": mean(logp_BP2[..., 1]),
            "logits/chosen": (logits_BP2[..., 0].sum(), lengths_BP2[..., 0].sum()),
            "logits/rejected": (logits_BP2[..., 1].sum(), lengths_BP2[..., 1].sum()),
            "mean_token_accuracy": (correct_BP2[..., 0].sum(), lengths_BP2[..., 0].sum()),
            "entropy": (entropy_BP2.sum(), lengths_BP2.sum()),
            **_by_source(batch, sources, (per_pair_BP * valid_BP).sum(axis=1), valid_BP.sum(axis=1)),
        }
        router, router_metrics = _router_loss(cfg, outputs, options, valid_BP.sum(axis=1), balance)
        return metrics["loss"][0] + router, weight, metrics | router_metrics

    return loss


def _router_loss(
    cfg: config.ModelConfig, outputs: model.Outputs, options: config.Loss, weights_B: jax.Array, balance: Balance | None
) -> tuple[jax.Array, Metrics]:
    """The router's losses, summed over layers; each row counts as much as its labelled tokens (or pairs) do."""
    if outputs.router is None:
        return jnp.float32(0), {}
    aux_LB, z_LB, load_LE, dropped_L, gate_Ln = outputs.router
    L, weight = aux_LB.shape[0], weights_B.sum()
    aux_L, z = (aux_LB * weights_B).sum(axis=1), (z_LB * weights_B).sum()
    coefficient = balance["coefficient"] if balance else options.router_aux_loss
    metrics = {
        "moe/aux_loss": (aux_L.sum() / L, weight),
        "moe/z_loss": (z / L, weight),
        "moe/load": (load_LE, load_LE.sum(axis=1, keepdims=True)),
        "moe/dropped": (dropped_L.sum(), load_LE.sum()),
        "moe/gate": (gate_Ln, gate_Ln.sum(axis=1, keepdims=True)),
    }
    if cfg.capacity_factor:
        metrics["moe/overflow"] = (dropped_L, load_LE.sum(axis=1))
    return (coefficient * aux_L).sum() + options.router_z_loss * z, metrics
