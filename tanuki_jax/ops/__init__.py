"""The expensive operations, one call each; `impl=` chooses a reference, an XLA or (later) a Pallas version."""

from tanuki_jax.ops.attention import attention, cached_attention
from tanuki_jax.ops.cross_entropy import token_logprobs
from tanuki_jax.ops.expert_ffn import expert_ffn
from tanuki_jax.ops.grouped_matmul import grouped_matmul

__all__ = ["attention", "cached_attention", "expert_ffn", "grouped_matmul", "token_logprobs"]
