"""The losses of the router of a mixture of experts, which every loss adds."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tanuki_jax import config, model
from tanuki_jax.train.balance import Balance
from tanuki_jax.train.contract import Metrics


def router_loss(
    cfg: config.ModelConfig, outputs: model.Outputs, options: config.Loss, weights_B: jax.Array, balance: Balance
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
        "moe/top_gate_hist": (gate_Ln, gate_Ln.sum(axis=1, keepdims=True)),
    }
    if cfg.capacity_factor:
        metrics["moe/overflow"] = (dropped_L, load_LE.sum(axis=1))
    return (coefficient * aux_L).sum() + options.router_z_loss * z, metrics
