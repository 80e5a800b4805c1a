"""Preference losses of one pair, by the names that TRL's users know.

All see how much likelier the policy makes an answer than the reference does: c of the chosen and r of the rejected one, sums of
log-ratios over the answer's tokens, whose numbers are n_c and n_r.  b is beta, e the label smoothing; float32, [B, P] each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_log_sigmoid, _sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid


def sigmoid(c: Any, r: Any, n_c: Any, n_r: Any, b: float, e: float) -> jax.Array:
    """Rafailov et al. 2023, eq. 7, the DPO loss.  Without label smoothing, as in TRL; with it the loss is `cdpo`."""
    return -_log_sigmoid(b * (c - r))


def cdpo(c: Any, r: Any, n_c: Any, n_r: Any, b: float, e: float) -> jax.Array:
    """Mitchell 2023, conservative DPO: a preference is wrong with probability e."""
    margin = b * (c - r)
    return -(1 - e) * _log_sigmoid(margin) - e * _log_sigmoid(-margin)


def robust(c: Any, r: Any, n_c: Any, n_r: Any, b: float, e: float) -> jax.Array:
    """Chowdhury et al. 2024: unbiased where a share e of the preferences is flipped."""
    margin = b * (c - r)
    return (-(1 - e) * _log_sigmoid(margin) + e * _log_sigmoid(-margin)) / (1 - 2 * e)


def hinge(c: Any, r: Any, n_c: Any, n_r: Any, b: float, e: float) -> jax.Array:
    """Zhao et al. 2023 (SLiC), with the normalisation of RSO."""
    return jax.nn.relu(1 - b * (c - r))


def ipo(c: Any, r: Any, n_c: Any, n_r: Any, b: float, e: float) -> jax.Array:
    """Azar et al. 2023, eq. 17, on mean log-ratios of tokens, as in TRL."""
    return (c / n_c - r / n_r - 1 / (2 * b)) ** 2


def sigmoid_norm(c: Any, r: Any, n_c: Any, n_r: Any, b: float, e: float) -> jax.Array:
    """The DPO loss on mean log-ratios of tokens (Tulu 3)."""
    return -_log_sigmoid(b * (c / n_c - r / n_r))


def apo_zero(c: Any, r: Any, n_c: Any, n_r: Any, b: float, e: float) -> jax.Array:
    """D'Oosterlinck et al. 2024: chosen answers up, rejected ones down."""
    return 1 - _sigmoid(b * c) + _sigmoid(b * r)


def apo_down(c: Any, r: Any, n_c: Any, n_r: Any, b: float, e: float) -> jax.Array:
    """D'Oosterlinck et al. 2024: both down, rejected ones further."""
    return _sigmoid(b * c) + 1 - _sigmoid(b * (c - r))


def nca_pair(c: Any, r: Any, n_c: Any, n_r: Any, b: float, e: float) -> jax.Array:
    """Chen et al. 2024, noise contrastive alignment of pairs."""
    return -_log_sigmoid(b * c) - 0.5 * _log_sigmoid(-b * c) - 0.5 * _log_sigmoid(-b * r)


def bco_pair(c: Any, r: Any, n_c: Any, n_r: Any, b: float, e: float) -> jax.Array:
    """Jung et al. 2024, binary classifier optimisation of pairs, without its running mean, as in TRL's DPO trainer."""
    return -_log_sigmoid(b * c) - _log_sigmoid(-b * r)


def sppo_hard(c: Any, r: Any, n_c: Any, n_r: Any, b: float, e: float) -> jax.Array:
    """Wu et al. 2024, self-play preference optimisation with hard labels."""
    return (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2


PREFERENCE_LOSSES: dict[str, Callable[..., jax.Array]] = {
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


def pair_loss(
    weights: dict[str, float],
    ratios_BP2: jax.Array,
    logps_BP2: jax.Array,
    lengths_BP2: jax.Array,
    beta: float,
    smoothing: float,
) -> jax.Array:
    """The weighted sum of losses of each pair, [B, P].

    Args:
      weights: name in LOSSES, or `sft`, -> its weight.
      ratios_BP2: log(policy / reference) of the chosen and the rejected answer.
      logps_BP2: the policy's log-probabilities of both, for `sft`.
      lengths_BP2: tokens of both.
    """
    n_c, n_r = (jnp.maximum(lengths_BP2[..., i], 1.0) for i in (0, 1))
    c, r = ratios_BP2[..., 0], ratios_BP2[..., 1]
    total = jnp.zeros_like(c)
    for name, weight in weights.items():
        value = -logps_BP2[..., 0] / n_c if name == SFT else PREFERENCE_LOSSES[name](c, r, n_c, n_r, beta, smoothing)
        total += weight * value
    return total
