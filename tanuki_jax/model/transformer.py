"""Tanuki's transformer (Llama-like: RMSNorm, rotary positions, grouped-query attention, SwiGLU), dense or mixture.

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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tanuki_jax import config, ops, parallel
from tanuki_jax.model.attention import Attention, Batch, Cache
from tanuki_jax.model.layers import compute_dtype, parameter, project, rms_norm
from tanuki_jax.model.moe import MoE, RouterStats

Params = Any
# What a block keeps for its backward pass, by name of the remat option; what is not kept is computed again.
ATTENTION, FFN = ("q", "k", "v", "attention", "norm"), ("gate", "up")
_offload = jax.checkpoint_policies.save_and_offload_only_these_names


def _save(*names: str) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(policies.save_only_these_names(*names), ops.residuals)


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _save(*ATTENTION),
    "ffn": _save(*FFN, "attention", "norm"),
    "dots": _save(*ATTENTION, *FFN, "middle"),
    "offload": _offload(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[*ATTENTION, "middle"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Dropout(NamedTuple):
    """Of the inputs of adapters, while they are trained."""

    rate: float
    key: jax.Array


class Outputs(NamedTuple):
    """hidden [B, S, D] after the last norm, in the compute dtype; router: statistics stacked over L, None if dense."""

    hidden: jax.Array
    router: RouterStats | None


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), no bias."""

    cfg: config.ModelConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        gate_BSF, up_BSF = (checkpoint_name(project(self, self.cfg, x_BSD, name, "DF"), name) for name in ("gate", "up"))
        return project(self, self.cfg, jax.nn.silu(gate_BSF) * up_BSF, "down", "FD", "outer")


class Block(nn.Module):
    """Attention, then the dense or the mixture FFN, each on the normed stream and added to it."""

    cfg: config.ModelConfig
    mixture: bool

    @nn.compact
    def __call__(self, x_BSD: jax.Array, batch: Batch, cache: Cache) -> tuple[jax.Array, tuple[Cache, RouterStats | None]]:
        cfg = self.cfg
        norm_attn_D = parameter(self, cfg, "norm_attn", "D", "scale")
        norm_mlp_D = parameter(self, cfg, "norm_mlp", "D", "scale")
        y_BSD, cache = Attention(cfg, name="attn")(rms_norm(x_BSD, norm_attn_D, cfg.norm_eps), batch, cache)
        x_BSD = checkpoint_name(parallel.constrain(x_BSD + y_BSD, "BSD"), "middle")
        h_BSD = rms_norm(x_BSD, norm_mlp_D, cfg.norm_eps)
        stats = None
        if self.mixture:
            y_BSD, stats = MoE(cfg, name="moe")(h_BSD, batch["segment_ids"] > 0)
        else:
            y_BSD = MLP(cfg, name="mlp")(h_BSD)
        return parallel.constrain(x_BSD + y_BSD, "BSD"), (cache, stats)


class Embedding(nn.Module):
    """The table of token vectors."""

    cfg: config.ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        return parameter(self, self.cfg, "table", "VD")


class Transformer(nn.Module):
    """Embedding, scanned blocks, final norm; the head is a parameter that losses and decoding apply themselves."""

    cfg: config.ModelConfig

    @nn.compact
    def __call__(self, batch: Batch, cache: Cache = None) -> tuple[jax.Array, Cache, RouterStats | None]:
        cfg = self.cfg
        table_VD = Embedding(cfg, name="embed")()
        parameter(self, cfg, "head", "DV")
        norm_final_D = parameter(self, cfg, "norm_final", "D", "scale")
        x_BSD = parallel.embedding_lookup(table_VD.astype(compute_dtype(cfg)), batch["tokens"])
        # Inside a loop XLA can't merge what is computed twice; several blocks in one pass of it can be.
        block = (
            Block
            if cfg.compute.remat == "none"
            else nn.remat(Block, policy=REMAT[cfg.compute.remat], prevent_cse=cfg.compute.scan_unroll > 1)
        )
        parts = layer_groups(cfg)
        caches, stats = [], []
        for number, (mixture, first, end) in enumerate(parts):
            layers = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0),
                length=end - first,
                unroll=min(cfg.compute.scan_unroll, end - first),
                metadata_params={nn.PARTITION_NAME: "L"},
            )
            name = "layers" if len(parts) == 1 else f"run_{number}"
            mine = jax.tree.map(lambda c, a=first, b=end: c[a:b], cache) if len(parts) > 1 else cache
            x_BSD, (written, found) = layers(cfg, mixture, name=name)(x_BSD, batch, mine)
            caches.append(written)
            stats += [found] if found else []
        return rms_norm(x_BSD, norm_final_D, cfg.norm_eps), _concatenate(caches), _concatenate(stats) if stats else None


# --- layers of two kinds --------------------------------------------------------------------------------------------


def layer_groups(cfg: config.ModelConfig) -> list[tuple[bool, int, int]]:
    """Neighbouring layers of one kind, which one loop computes: whether they are mixtures, the first, one past the last."""
    chosen = set(config.moe_layers(cfg))
    cuts = [i for i in range(1, cfg.n_layers) if (i in chosen) != (i - 1 in chosen)]
    return [(a in chosen, a, b) for a, b in zip([0, *cuts], [*cuts, cfg.n_layers], strict=True)]


def _concatenate(parts: list[Any]) -> Any:
    """Trees of the runs as one tree, along L."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def split_groups(cfg: config.ModelConfig, params: Params) -> Params:
    """The parameters as the module holds them: one stack of layers for each run."""
    parts = layer_groups(cfg)
    if len(parts) == 1:
        return params
    layers, done = params["layers"], {"mlp": 0, "moe": 0}
    tree = {name: part for name, part in params.items() if name != "layers"}
    for number, (mixture, first, end) in enumerate(parts):
        kind = "moe" if mixture else "mlp"
        at, done[kind] = done[kind], done[kind] + end - first
        shared = {name: part for name, part in layers.items() if name not in done}
        tree[f"run_{number}"] = jax.tree.map(lambda w, a=first, b=end: w[a:b], shared) | {
            kind: jax.tree.map(lambda w, a=at, b=done[kind]: w[a:b], layers.get(kind, {}))
        }
    return tree


def merge_groups(tree: Params, join: Callable[..., Any]) -> Params:
    """The other way round; `join` takes the leaves of all runs that have a parameter."""
    stacks = [tree[name] for name in sorted(tree, key=lambda n: int(n.partition("run_")[2] or -1)) if name.startswith("run_")]
    if not stacks:
        return tree
    flat: dict[Any, list[Any]] = {}
    for stack in stacks:
        for path, leaf in flax.traverse_util.flatten_dict(stack).items():
            flat.setdefault(path, []).append(leaf)
    layers = flax.traverse_util.unflatten_dict({path: join(*leaves) for path, leaves in flat.items()})
    return {name: part for name, part in tree.items() if not name.startswith("run_")} | {"layers": layers}


# --- the contract ---------------------------------------------------------------------------------------------------


def _boxed_init(cfg: config.ModelConfig, key: jax.Array) -> Any:
    nothing = jnp.zeros((1, 1), jnp.int32)
    return Transformer(cfg).init(key, {"tokens": nothing, "segment_ids": nothing, "positions": nothing})["params"]


def init(cfg: config.ModelConfig, key: jax.Array) -> Params:
    """Random parameters: N(0, init_std), residual outputs divided by sqrt(2L), norms 1; in `param_dtype`."""
    return merge_groups(nn.unbox(_boxed_init(cfg, key)), lambda *leaves: jnp.concatenate(leaves))


@functools.lru_cache(maxsize=32)
def _boxed_shapes(cfg: config.ModelConfig) -> Any:
    return jax.eval_shape(lambda: _boxed_init(cfg, jax.random.key(0)))


@functools.lru_cache(maxsize=32)
def parameter_shapes(cfg: config.ModelConfig) -> Params:
    """The tree of `jax.ShapeDtypeStruct`s of the parameters; nothing is allocated."""

    def stacked(*runs: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sum(run.shape[0] for run in runs), *runs[0].shape[1:]), runs[0].dtype)

    shapes = jax.tree.map(lambda b: b.value, _boxed_shapes(cfg), is_leaf=lambda b: isinstance(b, nn.Partitioned))
    return merge_groups(shapes, stacked)


@functools.lru_cache(maxsize=32)
def logical_axes(cfg: config.ModelConfig) -> Any:
    """The tree of axis letters of the parameters, ("L", "D", "N", "H") say."""
    names = jax.tree.map(lambda b: b.names, _boxed_shapes(cfg), is_leaf=lambda b: isinstance(b, nn.Partitioned))
    return merge_groups(names, lambda *leaves: leaves[0])


def named_parameters(cfg: config.ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, axis letters and shape of every parameter: ("layers/attn/q", "LDNH", (32, 4096, 32, 128)) say."""
    shapes = jax.tree_util.tree_flatten_with_path(parameter_shapes(cfg))[0]
    letters = jax.tree.leaves(logical_axes(cfg), is_leaf=lambda a: isinstance(a, tuple))
    for (path, shape), axes in zip(shapes, letters, strict=True):
        yield "/".join(str(k.key) for k in path), "".join(axes), shape.shape


def apply(cfg: config.ModelConfig, params: Params, batch: Batch, dropout: Dropout | None = None) -> Outputs:
    """The forward pass.

    Args:
      params: with `lora` and `lora_scale` where there are adapters.
      batch: `tokens`, `segment_ids` (0 = padding) and `positions`, int32 [B, S].
    """
    rngs = {"dropout": dropout.key} if dropout else {}
    variables = _variables(cfg, params, dropout.rate if dropout else 0.0)
    hidden_BSD, _, stats = cast(Any, Transformer(cfg).apply(variables, batch, rngs=rngs))
    return Outputs(hidden_BSD, stats)


def _variables(cfg: config.ModelConfig, params: Params, rate: float = 0.0) -> dict[str, Params]:
    """Parameters and adapters as the modules look for them; an adapter brings its scale and the rate of its dropout."""
    base = {name: part for name, part in params.items() if name not in ("lora", "lora_scale")}
    if "lora" not in params:
        return {"params": split_groups(cfg, base)}
    found = jax.tree.map(
        lambda scale_L, adapter: adapter | {"scale": scale_L, "dropout": jnp.full_like(scale_L, rate)},
        params["lora_scale"],
        params["lora"],
    )
    return {"params": split_groups(cfg, base), "lora": split_groups(cfg, found)}


def token_scores(
    cfg: config.ModelConfig, params: Params, outputs: Outputs, targets_BS: jax.Array, entropy: bool = False
) -> ops.TokenScores:
    """Log-probabilities of the targets, [B, S] each; see `ops.token_logprobs`."""
    # Backwards, the barrier has the head's gradient made before those of the blocks, which need the room of the logits.
    hidden_BSD, head_DV = jax.lax.optimization_barrier((outputs.hidden, params["head"].astype(compute_dtype(cfg))))
    head_DV, parts = parallel.unshard(head_DV, "DV"), parallel.axis_size("context")
    return ops.token_logprobs(hidden_BSD, head_DV, targets_BS, parts=parts, chunk=cfg.compute.logits_chunk, entropy=entropy)


def mean_logits(cfg: config.ModelConfig, params: Params, outputs: Outputs) -> jax.Array:
    """The mean over the vocabulary of each position's logits, [B, S] float32: the product with the mean of the head."""
    mean_D = params["head"].astype(jnp.float32).mean(axis=1)
    return jnp.einsum("BSD,D->BS", outputs.hidden.astype(jnp.float32), mean_D, precision="highest")


def dropless(cfg: config.ModelConfig) -> config.ModelConfig:
    """The model without limits of its experts' room, which are for train steps: no text's result depends on those beside it."""
    return dataclasses.replace(cfg, capacity_factor=0.0)


def empty_cache(cfg: config.ModelConfig, batch_size: int, length: int) -> Cache:
    """Keys and values [L, B, M, K, H] of M = `length` positions, in the compute dtype."""
    shape = (cfg.n_layers, batch_size, length, cfg.n_kv_heads, cfg.head_dim)
    return {"k": jnp.zeros(shape, compute_dtype(cfg)), "v": jnp.zeros(shape, compute_dtype(cfg))}


def decode(
    cfg: config.ModelConfig, params: Params, cache: Cache, tokens_BS: jax.Array, positions_BS: jax.Array
) -> tuple[jax.Array, Cache]:
    """Hidden states of new tokens after those in the cache, and the cache with them in it.

    Rows may be at different positions; a token sees the slots 0 to its position, so tokens written past a row's true
    end are never seen before they are overwritten.  Returns [B, S, D] in the compute dtype.
    """
    cfg = dropless(cfg)  # else an answer would depend on the other rows
    batch = {"tokens": tokens_BS, "positions": positions_BS, "segment_ids": jnp.ones_like(tokens_BS)}
    hidden_BSD, cache, _ = cast(Any, Transformer(cfg).apply(_variables(cfg, params), batch, cache))
    return hidden_BSD, cache


def count_parameters(cfg: config.ModelConfig) -> tuple[int, int]:
    """Parameters in all, and those active for one token (top_k of the experts)."""
    total = sum(math.prod(s.shape) for s in jax.tree.leaves(parameter_shapes(cfg)))
    idle = len(config.moe_layers(cfg)) * (cfg.n_experts - cfg.top_k) * 3 * cfg.d_model * (cfg.expert_d_ff or cfg.d_ff)
    return total, total - idle


def flops_per_token(cfg: config.ModelConfig, seq_len: int, frozen: bool = False) -> float:
    """Model FLOPs of one training token: 6 x active parameters without the embedding, plus causal attention (halved).

    4 x where the parameters are frozen below adapters: they have no gradients of their own.
    """
    _, active = count_parameters(cfg)
    attention = 6 * cfg.n_layers * cfg.n_heads * cfg.head_dim * seq_len
    return (4.0 if frozen else 6.0) * (active - cfg.vocab_size * cfg.d_model) + attention
