"""From a dense model to a mixture of experts: on a parameter tree, or from file to file."""

from tanuki_jax.upcycle.convert import (
    DRAWN,
    FFN,
    SHAPE,
    about,
    carry_moments,
    check,
    dense_layers,
    expert,
    granularity,
    mean,
    mixture_of,
    router,
    upcycle,
)

__all__ = [
    "DRAWN",
    "FFN",
    "SHAPE",
    "about",
    "carry_moments",
    "check",
    "dense_layers",
    "expert",
    "granularity",
    "mean",
    "mixture_of",
    "router",
    "upcycle",
]
