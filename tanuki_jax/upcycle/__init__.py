"""From a dense model to a mixture of experts: on a parameter tree, or from file to file."""

from tanuki_jax.upcycle.convert import (
    MOE_KEYS,
    RANDOM_STRATEGIES,
    carry_moments,
    check,
    dense_layers,
    expert,
    granularity,
    mean,
    moe_config,
    router,
    strategy_stats,
    upcycle,
)

__all__ = [
    "MOE_KEYS",
    "RANDOM_STRATEGIES",
    "carry_moments",
    "check",
    "dense_layers",
    "expert",
    "granularity",
    "mean",
    "moe_config",
    "router",
    "strategy_stats",
    "upcycle",
]
