"""Preference losses of one pair, by the names that TRL's users know.

All see how much likelier the policy makes an answer than the reference does: c of the chosen and r of the rejected one, sums of
log-ratios over the answer's tokens, whose numbers are n_c and n_r; float32, [B, P] each.  A parameter of a loss is a key of
`config.Loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from tanuki_jax import config

_log_sigmoid, _sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid


def sigmoid(c: jax.Array, r: jax.Array, n_c: jax.Array, n_r: jax.Array, options: config.Loss) -> jax.Array:
    """Rafailov et al. 2023, eq. 7, the DPO loss.  Without label smoothing, as in TRL; with it the loss is `cdpo`."""
    return -_log_sigmoid(options.beta * (c - r))


def cdpo(c: jax.Array, r: jax.Array, n_c: jax.Array, n_r: jax.Array, options: config.Loss) -> jax.Array:
    """Mitchell 2023, conservative DPO: a preference is wrong with probability `label_smoothing`."""
    margin, e = options.beta * (c - r), options.label_smoothing
    return -(1 - e) * _log_sigmoid(margin) - e * _log_sigmoid(-margin)


def robust(c: jax.Array, r: jax.Array, n_c: jax.Array, n_r: jax.Array, options: config.Loss) -> jax.Array:
    """Chowdhury et al. 2024: unbiased where a share `label_smoothing` of the preferences is flipped."""
    margin, e = options.beta * (c - r), options.label_smoothing
    return (-(1 - e) * _log_sigmoid(margin) + e * _log_sigmoid(-margin)) / (1 - 2 * e)


def hinge(c: jax.Array, r: jax.Array, n_c: jax.Array, n_r: jax.Array, options: config.Loss) -> jax.Array:
    """Zhao et al. 2023 (SLiC), with the normalisation of RSO."""
    return jax.nn.relu(1 - options.beta * (c - r))


def ipo(c: jax.Array, r: jax.Array, n_c: jax.Array, n_r: jax.Array, options: config.Loss) -> jax.Array:
    """Azar et al. 2023, eq. 17, on mean log-ratios of tokens, as in TRL."""
    return (c / n_c - r / n_r - 1 / (2 * options.beta)) ** 2


def sigmoid_norm(c: jax.Array, r: jax.Array, n_c: jax.Array, n_r: jax.Array, options: config.Loss) -> jax.Array:
    """The DPO loss on mean log-ratios of tokens (Tulu 3)."""
    return -_log_sigmoid(options.beta * (c / n_c - r / n_r))


def apo_zero(c: jax.Array, r: jax.Array, n_c: jax.Array, n_r: jax.Array, options: config.Loss) -> jax.Array:
    """D'Oosterlinck et al. 2024: chosen answers up, rejected ones down."""
    return 1 - _sigmoid(options.beta * c) + _sigmoid(options.beta * r)


def apo_down(c: jax.Array, r: jax.Array, n_c: jax.Array, n_r: jax.Array, options: config.Loss) -> jax.Array:
    """D'Oosterlinck et al. 2024: both down, rejected ones further."""
    return _sigmoid(options.beta * c) + 1 - _sigmoid(options.beta * (c - r))


def nca_pair(c: jax.Array, r: jax.Array, n_c: jax.Array, n_r: jax.Array, options: config.Loss) -> jax.Array:
    """Chen et al. 2024, noise contrastive alignment of pairs."""
    return -_log_sigmoid(options.beta * c) - 0.5 * _log_sigmoid(-options.beta * c) - 0.5 * _log_sigmoid(-options.beta * r)


def bco_pair(c: jax.Array, r: jax.Array, n_c: jax.Array, n_r: jax.Array, options: config.Loss) -> jax.Array:
    """Jung et al. 2024, binary classifier optimisation of pairs, without its running mean, as in TRL's DPO trainer."""
    return -_log_sigmoid(options.beta * c) - _log_sigmoid(-options.beta * r)


def sppo_hard(c: jax.Array, r: jax.Array, n_c: jax.Array, n_r: jax.Array, options: config.Loss) -> jax.Array:
    """Wu et al. 2024, self-play preference optimisation with hard labels."""
    return (c - 1 / (2 * options.beta)) ** 2 + (r + 1 / (2 * options.beta)) ** 2


class PairLoss(Protocol):
    """A loss of each pair, [B, P]."""

    def __call__(self, c: jax.Array, r: jax.Array, n_c: jax.Array, n_r: jax.Array, options: config.Loss) -> jax.Array: ...


PREFERENCE_LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": sigmoid,
    "cdpo": cdpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid_norm": sigmoid_norm,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
}
SFT = "sft"  # in a weighted sum: minus the mean log-probability of the chosen answer's tokens


def pair_loss(options: config.Loss, ratios_BP2: jax.Array, logps_BP2: jax.Array, lengths_BP2: jax.Array) -> jax.Array:
    """The weighted sum of the losses of each pair that `options.preference` names, [B, P].

    Args:
      options: the weight of each loss by its name in PREFERENCE_LOSSES, or `sft`; and the losses' parameters.
      ratios_BP2: log(policy / reference) of the chosen and the rejected answer.
      logps_BP2: the policy's log-probabilities of both, for `sft`.
      lengths_BP2: tokens of both.
    """
    n_c, n_r = (jnp.maximum(lengths_BP2[..., i], 1.0) for i in (0, 1))
    c, r = ratios_BP2[..., 0], ratios_BP2[..., 1]
    total = jnp.zeros_like(c)
    for name, weight in (options.preference or {"sigmoid": 1.0}).items():
        value = -logps_BP2[..., 0] / n_c if name == SFT else PREFERENCE_LOSSES[name](c, r, n_c, n_r, options)
        total += weight * value
    return total
