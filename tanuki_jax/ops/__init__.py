"""The expensive operations, one call each; `impl=` chooses a reference, an XLA or a Pallas version."""

from tanuki_jax.ops.attention import attention, cached_attention, query_shards, splash_kernel
from tanuki_jax.ops.cross_entropy import TokenScores, token_logprobs
from tanuki_jax.ops.cudnn import residuals
from tanuki_jax.ops.device import on_tpu, platform
from tanuki_jax.ops.expert_ffn import expert_ffn
from tanuki_jax.ops.grouped_matmul import grouped_matmul
from tanuki_jax.ops.linear import embedding_lookup, linear
from tanuki_jax.ops.random_normal import normal_pairs, random_normal
from tanuki_jax.ops.rounding import round_stochastically

__all__ = [
    "TokenScores",
    "attention",
    "cached_attention",
    "embedding_lookup",
    "expert_ffn",
    "grouped_matmul",
    "linear",
    "normal_pairs",
    "on_tpu",
    "platform",
    "query_shards",
    "random_normal",
    "residuals",
    "round_stochastically",
    "splash_kernel",
    "token_logprobs",
]
