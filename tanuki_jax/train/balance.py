"""What keeps the experts evenly used besides the losses: a coefficient that adapts, and a bias that needs no loss.

Both look at the load of the whole global batch, after the gradients of a step, and change what the next step sees.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from tanuki_jax import config

Balance: TypeAlias = dict[str, jax.Array]  # `coefficient` [L] of the auxiliary loss where it adapts, float32; else nothing
Metrics: TypeAlias = dict[str, jax.Array]
EMA_DECAY = 0.99  # beta of Skywork-MoE
VIRTUAL_CAPACITY = 1.25  # capacity of an expert relative to an even load, beyond which a dropless router's load is overflow


class Rebalance(Protocol):
    """What follows a step's update of the parameters: (params, balance, metrics) with what the load of the experts changes."""

    def __call__(self, params: Any, balance: Balance, metrics: Metrics) -> tuple[Any, Balance, Metrics]: ...


def init_balance(cfg: config.ModelConfig, options: config.Loss) -> Balance:
    """The balance before the first step: an adaptive coefficient begins at its largest, the load being worst then."""
    layers = len(config.moe_layers(cfg))
    if not (layers and options.router_aux_adaptive):
        return {}
    return {"coefficient": jnp.full(layers, options.router_aux_loss, jnp.float32)}


def overflow(load_LE: jax.Array) -> jax.Array:
    """Share of each layer's assignments that experts with VIRTUAL_CAPACITY would have dropped, [L].

    Skywork-MoE steers by the share of tokens that are dropped, which is 0 without a capacity; this is what it would be.
    """
    share_LE = load_LE / jnp.maximum(load_LE.sum(axis=1, keepdims=True), 1e-9)
    return jnp.maximum(share_LE - VIRTUAL_CAPACITY / load_LE.shape[1], 0.0).sum(axis=1)


def adapt_coefficients(coefficient_L: jax.Array, overflow_L: jax.Array, xi: float, largest: float) -> jax.Array:
    """The coefficient after a step: a moving average of min(xi * overflow, largest) (Skywork-MoE, eq. 7 and 8)."""
    return EMA_DECAY * coefficient_L + (1 - EMA_DECAY) * jnp.minimum(xi * overflow_L, largest)


def update_bias(bias_LE: jax.Array, load_LE: jax.Array, rate: float) -> jax.Array:
    """The bias after a step: down by `rate` for an expert with more than the mean load, up for one with less, mean 0.

    Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", algorithm 1; made free of its mean as in torchtitan, since a
    common part of the bias chooses nothing.
    """
    step_LE = jnp.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)
    return bias_LE + rate * (step_LE - step_LE.mean(axis=1, keepdims=True))


def make_rebalance(cfg: config.ModelConfig, options: config.Loss) -> Rebalance | None:
    """`rebalance(params, balance, metrics)`, after a step's update of the parameters; None for a dense model.

    It adds how the routers do to the metrics, a value per layer: `moe/load_max` (largest load relative to the
    mean), `moe/load_entropy` (1 = even), `moe/overflow` and, where it adapts, `moe/coefficient` as the step used it.
    """
    if not cfg.n_experts:
        return None

    def rebalance(params: Any, balance: Balance, metrics: Metrics) -> tuple[Any, Balance, Metrics]:
        load_LE = metrics["moe/load"]
        router_metrics = {
            "moe/load_max": load_LE.max(axis=1) * cfg.n_experts,
            "moe/load_entropy": jax.scipy.special.entr(load_LE).sum(axis=1) / jnp.log(max(cfg.n_experts, 2)),
            "moe/overflow": metrics["moe/overflow"] if "moe/overflow" in metrics else overflow(load_LE),
        }
        if balance:
            router_metrics["moe/coefficient"] = balance["coefficient"]
            largest, xi = options.router_aux_loss, options.router_aux_adaptive
            balance = {"coefficient": adapt_coefficients(balance["coefficient"], router_metrics["moe/overflow"], xi, largest)}
        if cfg.router_bias and "layers" in params:  # else it is frozen below adapters
            moe = params["layers"]["moe"]
            bias_LE = update_bias(moe["bias"], load_LE, options.router_bias_rate)
            params = {**params, "layers": {**params["layers"], "moe": {**moe, "bias": bias_LE}}}
        return params, balance, metrics | router_metrics

    return rebalance
