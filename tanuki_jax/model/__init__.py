"""The transformer behind pure functions over plain parameter trees; the only room that imports Flax."""

from tanuki_jax.model import layerwise
from tanuki_jax.model.generate import Sampling, generate
from tanuki_jax.model.health import expert_health, expert_similarity
from tanuki_jax.model.transformer import (
    Outputs,
    apply,
    count_parameters,
    decode,
    empty_cache,
    flops_per_token,
    init,
    logical_axes,
    named_parameters,
    parameter_shapes,
    token_scores,
)

__all__ = [
    "Outputs",
    "Sampling",
    "apply",
    "count_parameters",
    "decode",
    "empty_cache",
    "expert_health",
    "expert_similarity",
    "flops_per_token",
    "generate",
    "init",
    "layerwise",
    "logical_axes",
    "named_parameters",
    "parameter_shapes",
    "token_scores",
]
