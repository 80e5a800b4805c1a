"""The losses by the names of the stage kinds' table (config/kinds.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tanuki_jax import config
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.train.contract import LossFn
from tanuki_jax.train.next_token import next_token, sft
from tanuki_jax.train.preference import preference

LOSSES: Mapping[str, Callable[[config.ModelConfig, config.Loss, Sequence[str], float], LossFn]] = {
    "next_token": next_token,
    "sft": sft,
    "preference": preference,
}


def make_loss(
    kind: str, cfg: config.ModelConfig, options: config.Loss, sources: Sequence[str] = (), dropout: float = 0.0
) -> LossFn:
    """The loss of a stage kind (config/kinds.py).

    Args:
      sources: names of what `batch["sources"]` [B] numbers; the loss of each is reported where there are several.
      dropout: rate on the inputs of adapters, for calls with a key.
    """
    return LOSSES[STAGE_KINDS[kind].loss](cfg, options, sources, dropout)
