"""Direct preference optimisation: the loss of a batch of pairs, which are packed like any other text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tanuki_jax import config, model, parallel
from tanuki_jax.train.balance import Balance
from tanuki_jax.train.contract import Batch, LossFn, Mean, Metrics, Params
from tanuki_jax.train.next_token import by_source, make_dropout
from tanuki_jax.train.pair_losses import pair_loss
from tanuki_jax.train.router_loss import router_loss


class PairScores(NamedTuple):
    """Of the answers of each pair, chosen and rejected; 0 where there is no pair."""

    logprobs: jax.Array  # [B, P, 2] summed over the labelled tokens, float32
    lengths: jax.Array  # [B, P, 2] labelled tokens, float32
    correct: jax.Array  # [B, P, 2] of these, those that are the likeliest, float32
    logits: jax.Array  # [B, P, 2] sum over these of the mean logit of the vocabulary, float32
    entropy: jax.Array  # [B, P, 2] sum over these, float32


def pair_scores(
    cfg: config.ModelConfig, params: Params, batch: Batch, dropout: model.Dropout | None = None, zigzag: bool = False
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
        sums_BP2 = jax.vmap(lambda row, index: row[index])(per_segment_BM, batch["pair_segments"])
        return jnp.where(batch["pair_segments"] > 0, sums_BP2, 0.0)

    values = (scores.logprob, jnp.ones_like(weights_BS), scores.correct, logits_BS, scores.entropy)
    return PairScores(*(of_answers(value_BS * weights_BS) for value_BS in values)), outputs


def preference(cfg: config.ModelConfig, options: config.Loss, sources: Sequence[str] = (), dropout: float = 0.0) -> LossFn:
    """Direct preference optimisation: the weighted sum of losses that `options.preference` names (train/pair_losses.py).

    The batch carries `ref_logprobs` [B, P, 2] of the reference model.  Metrics have TRL's names; weight counts pairs.
    """

    def loss(params: Params, batch: Batch, balance: Balance, key: jax.Array | None) -> tuple[jax.Array, jax.Array, Metrics]:
        batch, zigzag = parallel.zigzag(batch)
        scores, outputs = pair_scores(cfg, params, batch, make_dropout(dropout, key), zigzag)
        logp_BP2, lengths_BP2, correct_BP2, logits_BP2, entropy_BP2 = scores
        valid_BP = (batch["pair_segments"][..., 0] > 0).astype(jnp.float32)
        ratios_BP2 = logp_BP2 - batch["ref_logprobs"]
        rewards_BP2 = options.beta * ratios_BP2
        margin_BP = rewards_BP2[..., 0] - rewards_BP2[..., 1]
        per_pair_BP = pair_loss(options, ratios_BP2, logp_BP2, lengths_BP2)
        weight = valid_BP.sum()

        def mean(value_BP: jax.Array) -> Mean:
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
            **by_source(batch, sources, (per_pair_BP * valid_BP).sum(axis=1), valid_BP.sum(axis=1)),
        }
        router, router_metrics = router_loss(cfg, outputs, options, valid_BP.sum(axis=1), balance)
        return metrics["loss"][0] + router, weight, metrics | router_metrics

    return loss
