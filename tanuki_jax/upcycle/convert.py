"""Upcycling: a dense parameter tree becomes a mixture of experts.

copy    every expert is the dense FFN (Komatsuzaki et al. 2022, "Sparse Upcycling").
noise   plus N(0, noise_std) on every weight of every expert, absolute; Tanuki-8x8B used 1e-3 (its mergekit fork).
drop    in each expert, a share of the inner dimensions is redrawn, the same ones in gate, up and down, each matrix from the
        mean and deviation of what it loses (Nakamura et al. 2025, "Drop-Upcycling", section 3).  The released script
        (conversions/drop_upcycling.py) differs: it draws other dimensions for each of the three matrices, so that most
        dimensions keep a part, and it permutes all of them first.  A permutation that the three share computes the same, and
        would only make experts harder to compare, so it is left out.
groups  virtual groups (He et al. 2024; Megatron-LM's upcycling_utils): the FFN is split into G parts, part e mod G for
        expert e, and every G neighbours share their router column, so that a group is chosen together.  With the softmax
        after the top-k each part weighs 1/G of its group, which the factor s = G makes up for.  The published scaling puts
        s^(1/3) on all three matrices, which is exact for a squared ReLU, but silu(c x) is not c silu(x): here it is on up
        and down alone, as evenly as a power of two on up allows.  Powers of two round nothing in any dtype, so with G one
        the mixture begins as the dense model, bit by bit but for the order of sums; with another G down is rounded once.

The router is always new.  With `experts_from`, expert e starts from the e-th dense model in turn, and what is not FFN is the
mean of them (Sukhbaatar et al. 2024, "Branch-Train-MiX").
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, model, ops
from tanuki_jax.errors import UserError
from tanuki_jax.model.transformer import Params
from tanuki_jax.upcycle import packed_bf16

Array: TypeAlias = jax.Array | np.ndarray
Weights: TypeAlias = dict[str, jax.Array]  # of one FFN: gate, up [D, F], down [F, D]
# Per matrix what `drop` needs: its mean, and per inner dimension [F] two sums.  None for the other strategies.
Stats: TypeAlias = dict[str, tuple[jax.Array, jax.Array, jax.Array]] | None
Index: TypeAlias = int | jax.Array
# Keys of a model that only a mixture has.
MOE_KEYS = ("n_experts", *config.MOE_KEYS)


def upcycle(
    params: Params, cfg: config.ModelConfig, options: config.Upcycle, key: jax.Array, others: Sequence[Params] = ()
) -> Params:
    """The mixture's parameters; attention, norms, embedding and head stay as they are.

    Args:
      params: dense tree; `layers/mlp/{gate, up [L,D,F], down [L,F,D]}`.
      cfg: the mixture's shape (`moe_config`).
      options: strategy and router.
      key: the only source of randomness; equal on any mesh.
      others: the trees of `experts_from`, of the same shapes.

    Returns:
      The tree with `layers/moe/{router [L,D,E], gate, up [L,E,D,F], down [L,E,F,D]}` in place of `mlp`; where only some layers
      become mixtures, these in `moe`, the others in `mlp`.  With `copy` and `groups` (top_k a multiple of G) the function
      computed is that of the dense model, whatever the router says; but for rounding of `down` where G is no power of two.
    """
    check(cfg, options)
    trees = (params, *others)
    if any("mlp" not in tree["layers"] or "moe" in tree["layers"] for tree in trees):
        raise UserError("upcycle: the checkpoint is a mixture already; give a dense one")
    if len({str(jax.tree.map(jnp.shape, tree)) for tree in trees}) > 1:
        raise UserError("upcycle: experts_from has checkpoints of other shapes; all must be of one architecture")
    merged = jax.tree.map(mean, *trees) if others else params
    moe_layers = jnp.array(config.moe_layers(cfg))
    dtype = params["layers"]["mlp"]["gate"].dtype
    dense = [jax.tree.map(lambda w: w[moe_layers].astype(dtype), dict(tree["layers"]["mlp"])) for tree in trees]
    layers = {name: part for name, part in merged["layers"].items() if name != "mlp"}
    stats = [jax.vmap(functools.partial(strategy_stats, options=options))(weights) for weights in dense]

    def experts(number: int) -> Weights:
        make = functools.partial(expert, number=number, cfg=cfg, options=options, key=key)
        source = number % len(dense)
        return jax.vmap(lambda layer, *inputs: make(*inputs, layer=layer))(moe_layers, dense[source], stats[source])

    by_expert = [experts(number) for number in range(cfg.n_experts)]
    layers["moe"] = {"router": jax.vmap(lambda layer: router(layer, cfg, options, key, dtype))(moe_layers)}
    layers["moe"] |= {name: jnp.stack([weights[name] for weights in by_expert], axis=1) for name in model.FFN_MATRICES}
    if cfg.router_bias:
        layers["moe"]["bias"] = jnp.zeros((len(moe_layers), cfg.n_experts), jnp.float32)
    if still_dense := dense_layers(cfg):
        layers["mlp"] = jax.tree.map(lambda w: w[jnp.array(still_dense)], merged["layers"]["mlp"])
    return {**merged, "layers": layers}


# Seven arguments: the call is jitted with static configs, and vmapped over layers.
def expert(
    weights: Weights, stats: Stats, number: int, layer: Index, cfg: config.ModelConfig, options: config.Upcycle, key: jax.Array
) -> Weights:
    """Weights of one expert of one layer from a dense FFN; random draws belong to the layer's and the expert's number.

    weights: may be packed (upcycle/packed_bf16.py); stats: `strategy_stats(weights, options)`, the same for all experts of a
    layer.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 1), layer), number)
    return STRATEGIES[options.strategy](weights, stats, number, cfg, options, key)


def strategy_stats(weights: Mapping[str, Array], options: config.Upcycle) -> Stats:
    """Statistics of a dense FFN that a strategy needs before it makes experts of it; only `drop` does.

    For `drop` of each matrix its mean, and of each inner dimension [F] the sums of its weights less the mean and of their
    squares: the moments of any choice of dimensions follow from them.
    """
    if options.strategy != "drop":
        return None

    def of(name: str) -> tuple[jax.Array, jax.Array, jax.Array]:
        w, axis = weights[name], 1 if name == "down" else 0
        sums_F = _sums(w, 0.0, 1, axis)
        mean = sums_F.sum() / w.size
        return mean, sums_F - mean * w.shape[axis], _sums(w, mean, 2, axis)

    return {name: of(name) for name in model.FFN_MATRICES}


@functools.partial(jax.jit, static_argnames=("power", "axis"))
def _sums(w: jax.Array, mean: float | jax.Array, power: int, axis: int) -> jax.Array:
    """Sums of powers, in float32; compiled by itself: code that shares the numbers takes five times as long on CPUs."""
    return ((w.astype(jnp.float32) - mean) ** power).sum(axis)


def router(layer: Index, cfg: config.ModelConfig, options: config.Upcycle, key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The router [D, E] of one layer: N(0, router_std) or uniform around 0 with that deviation; one draw per group."""
    parts = granularity(cfg)
    key = jax.random.fold_in(jax.random.fold_in(key, 0), layer)
    shape = (cfg.d_model, cfg.n_experts // parts)
    if options.router_init == "uniform":
        drawn = jax.random.uniform(key, shape, jnp.float32, -(3**0.5), 3**0.5)
    else:
        drawn = ops.random_normal(key, shape)
    return jnp.repeat(drawn * options.router_std, parts, axis=1).astype(dtype)


# --- strategies ---------------------------------------------------------------------------------------------------------------


class Strategy(Protocol):
    """Makes the weights of one expert; its arguments are those of `expert`, the key being the expert's own."""

    # Seven arguments: what the strategies use between them, so that all are called alike.
    def __call__(
        self,
        weights: Weights,
        stats: Stats,
        number: int,
        cfg: config.ModelConfig,
        options: config.Upcycle,
        key: jax.Array,
        /,
    ) -> Weights: ...


def _copy(weights: Weights, *_: object) -> Weights:
    return weights


def _noise(
    weights: Weights, _: Stats, number: int, cfg: config.ModelConfig, options: config.Upcycle, key: jax.Array
) -> Weights:
    def noisy(w: jax.Array, key: jax.Array) -> jax.Array:
        noise = packed_bf16.normals(key, w)
        return packed_bf16.unpack(
            [part + options.noise_std * n for part, n in zip(packed_bf16.planes(w), noise, strict=True)], w
        )

    return {name: noisy(weights[name], k) for name, k in zip(model.FFN_MATRICES, jax.random.split(key, 3), strict=True)}


def _drop(
    weights: Weights, stats: Stats, number: int, cfg: config.ModelConfig, options: config.Upcycle, key: jax.Array
) -> Weights:
    assert stats is not None  # as `strategy_stats` has it
    F = cfg.d_ff
    count = math.floor(options.drop_ratio * F + 1e-6)  # 0.29 of 100 is 29
    if not count:
        return weights
    which, *keys = jax.random.split(key, 4)
    drawn_F = jnp.zeros(F, bool).at[jax.random.permutation(which, F)[:count]].set(True)

    def redraw(name: str, key: jax.Array) -> jax.Array:
        w, (mean, sums_F, squares_F) = weights[name], stats[name]
        n = count * cfg.d_model
        shift = jnp.where(drawn_F, sums_F, 0).sum() / n  # small, so that nothing is lost below
        std = jnp.sqrt(jnp.maximum(jnp.where(drawn_F, squares_F, 0).sum() - n * shift**2, 0) / max(n - 1, 1))
        masks = packed_bf16.down(drawn_F, w) if name == "down" else packed_bf16.across(drawn_F, w)
        planes = zip(masks, packed_bf16.planes(w), packed_bf16.normals(key, w), strict=True)
        return packed_bf16.unpack([jnp.where(mask, mean + shift + std * x, old) for mask, old, x in planes], w)

    return {name: redraw(name, k) for name, k in zip(model.FFN_MATRICES, keys, strict=True)}


def _groups(
    weights: Weights, _: Stats, number: int, cfg: config.ModelConfig, options: config.Upcycle, key: jax.Array
) -> Weights:
    parts = granularity(cfg)
    width = cfg.d_ff // parts
    start = number % parts * width

    def part(name: str, axis: int, scale: float) -> jax.Array:
        piece = jax.lax.dynamic_slice_in_dim(weights[name], start, width, axis=axis)
        return (piece.astype(jnp.float32) * scale).astype(piece.dtype)

    up_scale = 2.0 ** round(math.log2(parts) / 2)
    return {"gate": part("gate", 1, 1.0), "up": part("up", 1, up_scale), "down": part("down", 0, parts / up_scale)}


RANDOM_STRATEGIES = ("noise", "drop")  # those that draw normal numbers
STRATEGIES: dict[str, Strategy] = {"copy": _copy, "noise": _noise, "drop": _drop, "groups": _groups}


# --- shapes and checks --------------------------------------------------------------------------------------------------------


def moe_config(cfg: config.ModelConfig, **shape: object) -> config.ModelConfig:
    """The mixture's config for a dense one; `shape` has keys of MOE_KEYS."""
    if cfg.n_experts:
        raise UserError("upcycle: the checkpoint is a mixture already; give a dense one")
    changes: dict[str, Any] = shape  # of several types
    moe_cfg = dataclasses.replace(cfg, **changes)
    if not moe_cfg.n_experts:
        raise UserError(f"upcycle: top_k {moe_cfg.top_k} must lie between 1 and n_experts 0; give it experts")
    config.check_moe(moe_cfg, "upcycle: ", trained=False)
    return moe_cfg


def check(cfg: config.ModelConfig, options: config.Upcycle) -> None:
    """An error that names the setting which is not valid."""
    config.check_moe(cfg, "upcycle: ", trained=False)
    config.check_upcycle(cfg, options, "upcycle: ")


def granularity(cfg: config.ModelConfig) -> int:
    """G: into how many parts the dense FFN is split."""
    return cfg.d_ff // cfg.expert_d_ff if cfg.expert_d_ff else 1


def dense_layers(cfg: config.ModelConfig) -> list[int]:
    """The layers that stay dense."""
    return sorted(set(range(cfg.n_layers)) - set(config.moe_layers(cfg)))


def mean(*weights: Array) -> jax.Array:
    """The mean of arrays of one shape, computed in float32."""
    total = functools.reduce(jnp.add, (jnp.asarray(w, jnp.float32) for w in weights))
    return (total / len(weights)).astype(weights[0].dtype)


# --- the optimizer's state ----------------------------------------------------------------------------------------------------


def carry_moments(state: Params, dense: Params, cfg: config.ModelConfig) -> Params:
    """A new optimizer state of the mixture with what survives of the dense model's: all but the experts and the router.

    Adam's count is carried too: moments that start from 0 then grow without bias correction, which acts as a warm-up.
    """
    old = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(dense)[0]}
    still_dense = jnp.array(dense_layers(cfg), jnp.int32)

    def carry(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if name not in old:
            return leaf
        return old[name][still_dense] if "'mlp'" in name else old[name]

    return jax.tree_util.tree_map_with_path(carry, state)
