"""The transformer behind pure functions over plain parameter trees; the only package that imports Flax."""

from tanuki_jax.model import layerwise, lora, slots
from tanuki_jax.model.attention import Batch
from tanuki_jax.model.expert_diagnostics import expert_diagnostics, expert_similarity
from tanuki_jax.model.generate import generate
from tanuki_jax.model.layer_groups import Params
from tanuki_jax.model.layers import FFN_MATRICES, axis_sizes, is_vector, parameter_dtype
from tanuki_jax.model.sampling import Sampling
from tanuki_jax.model.streaming import stream
from tanuki_jax.model.transformer import (
    Dropout,
    Outputs,
    apply,
    count_parameters,
    dropless,
    flops_per_token,
    init,
    logical_axes,
    mean_logits,
    named_parameters,
    parameter_shapes,
    token_scores,
)

__all__ = [
    "FFN_MATRICES",
    "Batch",
    "Dropout",
    "Outputs",
    "Params",
    "Sampling",
    "apply",
    "axis_sizes",
    "count_parameters",
    "dropless",
    "expert_diagnostics",
    "expert_similarity",
    "flops_per_token",
    "generate",
    "init",
    "is_vector",
    "layerwise",
    "logical_axes",
    "lora",
    "mean_logits",
    "named_parameters",
    "parameter_dtype",
    "parameter_shapes",
    "slots",
    "stream",
    "token_scores",
]
