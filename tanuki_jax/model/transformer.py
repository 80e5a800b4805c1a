"""Tanuki's transformer (Llama-like: RMSNorm, rotary positions, grouped-query attention, SwiGLU), dense or a mixture of experts.

The parameter tree is stacked over layers, leading axis L:

    embed/table [V,D]   layers/attn/{q [L,D,N,H], k, v [L,D,K,H], o [L,N,H,D]}   layers/{norm_attn, norm_mlp} [L,D]
    layers/mlp/{gate, up [L,D,F], down [L,F,D]}   or   layers/moe/{router [L,D,E], gate, up [L,E,D,F], down [L,E,F,D]}
    norm_final [D]   head [D,V]   and, with qk_norm, layers/attn/{norm_q, norm_k} [L,H]

Where only some layers are mixtures, `mlp` is stacked over the dense layers and `moe` over the others, each in order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tanuki_jax import config, ops, parallel
from tanuki_jax.model.attention import Attention, Batch
from tanuki_jax.model.layer_groups import Params, concatenate, layer_groups, merge_groups, split_groups
from tanuki_jax.model.layers import Matrix, axis_sizes, compute_dtype, parameter, project, rms_norm
from tanuki_jax.model.moe import MoE, RouterStats
from tanuki_jax.model.remat import POLICIES

MLP_INPUTS, MLP_OUTPUT = (Matrix("gate", "DF"), Matrix("up", "DF")), Matrix("down", "FD", "residual_out")


class Dropout(NamedTuple):
    """Dropout of the inputs of adapters, while they are trained."""

    rate: float | jax.Array
    key: jax.Array


class Outputs(NamedTuple):
    """hidden [B, S, D] after the last norm, in the compute dtype; router: statistics stacked over L, None if dense."""

    hidden: jax.Array
    router: RouterStats | None


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), no bias."""

    cfg: config.ModelConfig
    zigzag: bool = False

    @nn.compact
    def __call__(self, x_BSD: jax.Array, dropout_rate: jax.Array | None = None) -> jax.Array:
        cfg, zigzag = self.cfg, self.zigzag
        gate_BSF, up_BSF = (
            checkpoint_name(project(self, cfg, x_BSD, matrix, dropout_rate, zigzag), matrix.name) for matrix in MLP_INPUTS
        )
        return project(self, cfg, jax.nn.silu(gate_BSF) * up_BSF, MLP_OUTPUT, dropout_rate, zigzag)


class Block(nn.Module):
    """Attention, then the dense FFN or the mixture, each on the normed stream and added to it."""

    cfg: config.ModelConfig
    is_moe: bool
    zigzag: bool = False

    @nn.compact
    def __call__(self, x_BSD: jax.Array, batch: Batch, dropout_rate: jax.Array | None) -> tuple[jax.Array, RouterStats | None]:
        cfg, zigzag = self.cfg, self.zigzag
        norm_attn_D = parameter(self, cfg, "norm_attn", "D", "scale")
        norm_mlp_D = parameter(self, cfg, "norm_mlp", "D", "scale")
        h_BSD = rms_norm(x_BSD, norm_attn_D, cfg.norm_eps)
        y_BSD = Attention(cfg, zigzag, name="attn")(h_BSD, batch, dropout_rate)
        x_BSD = checkpoint_name(parallel.constrain(x_BSD + y_BSD, "BSD"), "middle")
        h_BSD = rms_norm(x_BSD, norm_mlp_D, cfg.norm_eps)
        stats = None
        if self.is_moe:
            y_BSD, stats = MoE(cfg, name="moe")(h_BSD, batch["segment_ids"] > 0)
        else:
            y_BSD = MLP(cfg, zigzag, name="mlp")(h_BSD, dropout_rate)
        return parallel.constrain(x_BSD + y_BSD, "BSD"), stats


class Embedding(nn.Module):
    """The table of token vectors."""

    cfg: config.ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        return parameter(self, self.cfg, "table", "VD")


class Transformer(nn.Module):
    """Embedding, scanned blocks, final norm; the head is a parameter that losses and decoding apply themselves.

    zigzag: whether the tokens lie in `parallel.zigzag_order`.
    """

    cfg: config.ModelConfig
    zigzag: bool = False

    @nn.compact
    def __call__(self, batch: Batch, dropout_rate: jax.Array | None = None) -> tuple[jax.Array, RouterStats | None]:
        cfg = self.cfg
        table_VD = Embedding(cfg, name="embed")()
        parameter(self, cfg, "head", "DV")
        norm_final_D = parameter(self, cfg, "norm_final", "D", "scale")
        x_BSD = parallel.embedding_lookup(table_VD.astype(compute_dtype(cfg)), batch["tokens"])
        # CSE prevention is needed only when one scan iteration unrolls several blocks.
        block = (
            Block
            if cfg.compute.remat == "none"
            else nn.remat(Block, policy=POLICIES[cfg.compute.remat], prevent_cse=cfg.compute.scan_unroll > 1)
        )
        groups = layer_groups(cfg)
        stats = []
        for number, (is_moe, first, end) in enumerate(groups):
            layers = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=end - first,
                unroll=min(cfg.compute.scan_unroll, end - first),
                metadata_params={nn.PARTITION_NAME: "L"},
            )
            name = "layers" if len(groups) == 1 else f"run_{number}"
            x_BSD, group_stats = layers(cfg, is_moe, self.zigzag, name=name)(x_BSD, batch, dropout_rate)
            stats += [group_stats] if group_stats else []
        return rms_norm(x_BSD, norm_final_D, cfg.norm_eps), concatenate(stats) if stats else None


# --- the contract ---------------------------------------------------------------------------------------------------


def _boxed_init(cfg: config.ModelConfig, key: jax.Array) -> Params:
    zero_11 = jnp.zeros((1, 1), jnp.int32)
    return cast(Params, Transformer(cfg).init(key, {"tokens": zero_11, "segment_ids": zero_11, "positions": zero_11})["params"])


def init(cfg: config.ModelConfig, key: jax.Array) -> Params:
    """Random parameters: N(0, init_std), residual outputs divided by sqrt(2L), norms 1; in `param_dtype`."""
    return merge_groups(nn.unbox(_boxed_init(cfg, key)), lambda *leaves: jnp.concatenate(leaves))


@functools.lru_cache(maxsize=32)
def _boxed_shapes(cfg: config.ModelConfig) -> Params:
    return jax.eval_shape(lambda: _boxed_init(cfg, jax.random.key(0)))


@functools.lru_cache(maxsize=32)
def parameter_shapes(cfg: config.ModelConfig) -> Params:
    """The tree of `jax.ShapeDtypeStruct`s of the parameters; nothing is allocated."""

    def stack(*groups: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sum(group.shape[0] for group in groups), *groups[0].shape[1:]), groups[0].dtype)

    shapes = jax.tree.map(lambda b: b.value, _boxed_shapes(cfg), is_leaf=lambda b: isinstance(b, nn.Partitioned))
    return merge_groups(shapes, stack)


@functools.lru_cache(maxsize=32)
def logical_axes(cfg: config.ModelConfig) -> Params:
    """The tree of axis letters of the parameters, ("L", "D", "N", "H") say."""
    names = jax.tree.map(lambda b: b.names, _boxed_shapes(cfg), is_leaf=lambda b: isinstance(b, nn.Partitioned))
    return merge_groups(names, lambda *leaves: leaves[0])


def named_parameters(cfg: config.ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, axis letters and shape of every parameter: ("layers/attn/q", "LDNH", (32, 4096, 32, 128)) say."""
    shapes = jax.tree_util.tree_flatten_with_path(parameter_shapes(cfg))[0]
    letters = jax.tree.leaves(logical_axes(cfg), is_leaf=lambda a: isinstance(a, tuple))
    for (path, shape), axes in zip(shapes, letters, strict=True):
        yield "/".join(str(k.key) for k in path), "".join(axes), shape.shape


def apply(
    cfg: config.ModelConfig, params: Params, batch: Batch, dropout: Dropout | None = None, zigzag: bool = False
) -> Outputs:
    """The forward pass.

    Args:
      params: with `lora` and `lora_scale` where there are adapters.
      batch: `tokens`, `segment_ids` (0 = padding) and `positions`, int32 [B, S].
      dropout: of the inputs of the adapters.
      zigzag: whether the tokens lie in `parallel.zigzag_order`.
    """
    rngs = {"dropout": dropout.key} if dropout else {}
    rate = jnp.asarray(dropout.rate, jnp.float32) if dropout else None
    outputs = Transformer(cfg, zigzag).apply(_variables(cfg, params), batch, dropout_rate=rate, rngs=rngs)
    return Outputs(*cast(tuple[jax.Array, RouterStats | None], outputs))


def _variables(cfg: config.ModelConfig, params: Params) -> dict[str, Params]:
    """Parameters and adapters as the modules look for them; each adapter with its scale."""
    base = {name: part for name, part in params.items() if name not in ("lora", "lora_scale")}
    if "lora" not in params:
        return {"params": split_groups(cfg, base)}
    adapters = jax.tree.map(lambda scale_L, adapter: adapter | {"scale": scale_L}, params["lora_scale"], params["lora"])
    return {"params": split_groups(cfg, base), "lora": split_groups(cfg, adapters)}


def token_scores(
    cfg: config.ModelConfig, params: Params, outputs: Outputs, targets_BS: jax.Array, entropy: bool = False
) -> ops.TokenScores:
    """Log-probabilities of the targets, [B, S] each; see `ops.token_logprobs`."""
    # In the backward pass the barrier puts the head's gradient before those of the blocks, which need the logits' memory.
    hidden_BSD, head_DV = jax.lax.optimization_barrier((outputs.hidden, params["head"].astype(compute_dtype(cfg))))
    head_DV, num_shards, chunk = parallel.unshard(head_DV, "DV"), parallel.axis_size("context"), cfg.compute.logits_chunk
    return ops.token_logprobs(hidden_BSD, head_DV, targets_BS, num_shards=num_shards, chunk=chunk, entropy=entropy)


def mean_logits(cfg: config.ModelConfig, params: Params, outputs: Outputs) -> jax.Array:
    """The mean over the vocabulary of each position's logits, [B, S] float32: the product with the mean of the head."""
    mean_D = params["head"].astype(jnp.float32).mean(axis=1)
    return jnp.einsum("BSD,D->BS", outputs.hidden.astype(jnp.float32), mean_D, precision="highest")


def dropless(cfg: config.ModelConfig) -> config.ModelConfig:
    """The model without a capacity of its experts, which is for train steps: with it a text's result depends on the others."""
    return dataclasses.replace(cfg, capacity_factor=0.0)


def count_parameters(cfg: config.ModelConfig) -> tuple[int, int]:
    """Parameters in all, and those active for one token (top_k of the experts)."""
    total = sum(math.prod(s.shape) for s in jax.tree.leaves(parameter_shapes(cfg)))
    expert = 3 * cfg.d_model * axis_sizes(cfg, expert=True)["F"]
    inactive = len(config.moe_layers(cfg)) * (cfg.n_experts - cfg.top_k) * expert
    return total, total - inactive


def flops_per_token(cfg: config.ModelConfig, seq_len: int, frozen: bool = False) -> float:
    """Model FLOPs per training token: 6 x active parameters without the embedding, plus causal attention (halved).

    4 x where the parameters are frozen below adapters, since they have no gradients of their own.
    """
    _, active = count_parameters(cfg)
    attention = 6 * cfg.n_layers * cfg.n_heads * cfg.head_dim * seq_len
    return (4.0 if frozen else 6.0) * (active - cfg.vocab_size * cfg.d_model) + attention
