"""Next-token prediction: the loss of pretraining and SFT."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tanuki_jax import config, model, parallel
from tanuki_jax.train.balance import Balance
from tanuki_jax.train.contract import Batch, LossFn, Metrics, Params
from tanuki_jax.train.router_loss import router_loss


def by_source(batch: Batch, sources: Sequence[str], value_B: jax.Array, weight_B: jax.Array) -> Metrics:
    """`loss/NAME` of each source, where there are several."""
    metrics = {}
    for number, name in enumerate(sources if len(sources) > 1 else ()):
        of_source_B = batch["sources"] == number
        metrics[f"loss/{name}"] = (value_B * of_source_B).sum(), (weight_B * of_source_B).sum()
    return metrics


def make_dropout(rate: float, key: jax.Array | None) -> model.Dropout | None:
    """Dropout with the step's key; none where nothing is drawn."""
    return None if key is None else model.Dropout(rate, key)


def next_token(
    cfg: config.ModelConfig,
    options: config.Loss,
    sources: Sequence[str] = (),
    dropout: float = 0.0,
    entropy: bool = False,
) -> LossFn:
    """Cross entropy of the labelled tokens, plus z_loss * (log Z)^2 and the router's losses.

    Pretraining and SFT differ only in the batch's `loss_weights`.  z-loss: PaLM section 5; Tanuki used 1e-4.
    """

    def loss(params: Params, batch: Batch, balance: Balance, key: jax.Array | None) -> tuple[jax.Array, jax.Array, Metrics]:
        batch, zigzag = parallel.zigzag(batch)
        outputs = model.apply(cfg, params, batch, make_dropout(dropout, key), zigzag)
        scores = model.token_scores(cfg, params, outputs, batch["targets"], entropy)
        weights_BS = batch["loss_weights"].astype(jnp.float32)
        weight_B = weights_BS.sum(axis=1)
        weight = weight_B.sum()
        nll_B, z = -(scores.logprob * weights_BS).sum(axis=1), (scores.log_z**2 * weights_BS).sum()
        metrics = {
            "loss": (nll_B.sum(), weight),
            "mean_token_accuracy": ((scores.correct * weights_BS).sum(), weight),
            "z_loss": (z, weight),
            **by_source(batch, sources, nll_B, weight_B),
        }
        if scores.entropy is not None:
            metrics["entropy"] = (scores.entropy * weights_BS).sum(), weight
        router, router_metrics = router_loss(cfg, outputs, options, weight_B, balance)
        return nll_B.sum() + options.z_loss * z + router, weight, metrics | router_metrics

    return loss


def sft(cfg: config.ModelConfig, options: config.Loss, sources: Sequence[str] = (), dropout: float = 0.0) -> LossFn:
    """`next_token`, which also reports the entropy of the predictions, as TRL does."""
    return next_token(cfg, options, sources, dropout, entropy=True)
