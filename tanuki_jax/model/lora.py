"""Low-rank adapters (LoRA, Hu et al. 2021): W + scale * A B beside any matrix of the layers.

Two more branches of the parameter tree hold them: `lora/layers/attn/q/{a [L,D,r], b [L,r,N,H]}`, which is trained while all
else is frozen, and `lora_scale/layers/attn/q [L]`, alpha / r or alpha / sqrt(r).  So whatever takes parameters takes these too,
and without the two branches the model is the base, bit by bit.  Attention and the dense FFN add (x A) B to their product;
experts and router, whose products are no plain ones, use W + scale * A B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp

from tanuki_jax import config
from tanuki_jax.model.layers import compute_dtype, is_vector
from tanuki_jax.model.transformer import Params, named_parameters


class Split(NamedTuple):
    """The axes of a layer's matrix: those that number matrices, those of its input, those of its output."""

    many: str
    inner: str
    outer: str


SPLITS = {
    "attn/q": Split("", "D", "NH"),
    "attn/k": Split("", "D", "KH"),
    "attn/v": Split("", "D", "KH"),
    "attn/o": Split("", "NH", "D"),
    "mlp/gate": Split("", "D", "F"),
    "mlp/up": Split("", "D", "F"),
    "mlp/down": Split("", "F", "D"),
    "moe/gate": Split("E", "D", "F"),
    "moe/up": Split("E", "D", "F"),
    "moe/down": Split("E", "F", "D"),
    "moe/router": Split("", "D", "E"),
}


class Target(NamedTuple):
    """A matrix with an adapter: axis letters, r for the rank, and shapes of its two sides."""

    path: str  # "layers/attn/q"
    rank: int
    a: tuple[str, tuple[int, ...]]
    b: tuple[str, tuple[int, ...]]


def ranks(cfg: config.ModelConfig, options: config.Lora) -> dict[str, int]:
    """Path and rank of the adapters that a stage's options ask for; of several patterns the one that fits the fewest counts."""
    names = [path.removeprefix("layers/") for path, _, _ in named_parameters(cfg)]
    found = config.lora_ranks(options, [name for name in names if name in SPLITS])
    return {f"layers/{name}": rank for name, rank in found.items()}


def targets(cfg: config.ModelConfig, ranks: Mapping[str, int]) -> Iterator[Target]:
    """The adapters of these ranks, in the order of the parameters."""
    for path, axes, shape in named_parameters(cfg):
        if path in ranks:
            sizes = {**dict(zip(axes, shape, strict=True)), "r": ranks[path]}
            many, inner, outer = SPLITS[path.removeprefix("layers/")]
            sides = ("L" + many + inner + "r", "L" + many + "r" + outer)
            a, b = ((letters, tuple(sizes[x] for x in letters)) for letters in sides)
            yield Target(path, ranks[path], a, b)


def init_adapters(cfg: config.ModelConfig, options: config.Lora, key: jax.Array) -> tuple[Params, Params]:
    """Fresh adapters and their scales, which are frozen; float32.  A is uniform within 1 / sqrt(inputs), B 0, as in PEFT."""
    trained = {}
    for number, one in enumerate(targets(cfg, ranks(cfg, options))):
        inner = SPLITS[one.path.removeprefix("layers/")].inner
        inputs = math.prod(size for letter, size in zip(*one.a, strict=True) if letter in inner)
        draw = jax.random.fold_in(key, number)
        a = jax.random.uniform(draw, one.a[1], jnp.float32, -(inputs**-0.5), inputs**-0.5)
        trained[one.path] = {"a": a, "b": jnp.zeros(one.b[1], jnp.float32)}
    return {"lora": to_tree(trained)}, scale_tree(scales(cfg, options))


def scales(cfg: config.ModelConfig, options: config.Lora) -> dict[str, list[float]]:
    """By what each layer's adapter of each path is multiplied."""
    return {
        one.path: [options.alpha / (one.rank**0.5 if options.rslora else one.rank)] * one.a[1][0]
        for one in targets(cfg, ranks(cfg, options))
    }


def scale_tree(scales: Mapping[str, list[float]]) -> Params:
    """The branch of the parameters that holds them."""
    return {"lora_scale": to_tree({path: jnp.array(values, jnp.float32) for path, values in scales.items()})}


def adapter_axes(cfg: config.ModelConfig, ranks: Mapping[str, int]) -> tuple[Params, Params]:
    """The trees of axis letters of adapters and of their scales."""
    found = list(targets(cfg, ranks))
    letters = {one.path: {"a": tuple(one.a[0]), "b": tuple(one.b[0])} for one in found}
    return {"lora": to_tree(letters)}, {"lora_scale": to_tree({one.path: ("L",) for one in found})}


def adapter_shapes(cfg: config.ModelConfig, ranks: Mapping[str, int]) -> Params:
    """The tree of ShapeDtypeStructs of adapters."""
    shape = lambda side: jax.ShapeDtypeStruct(side[1], jnp.float32)  # noqa: E731
    return {"lora": to_tree({one.path: {"a": shape(one.a), "b": shape(one.b)} for one in targets(cfg, ranks)})}


def frozen_params(cfg: config.ModelConfig, params: Params) -> Params:
    """A base as it lies below adapters: what is cast to the compute dtype whenever it is used, is cast once."""

    def cast(path: Any, w: jax.Array) -> jax.Array:
        exact = path[-1].key == "router" or is_vector(path[-1].key)
        return w if exact else w.astype(compute_dtype(cfg))

    return jax.tree_util.tree_map_with_path(cast, params)


def merge(params: Params) -> Params:
    """Plain parameters that compute the same: every adapter added to its matrix, in float32, and cast back."""
    return merge_and_loss(params)[0]


def merge_and_loss(params: Params) -> tuple[Params, jax.Array]:
    """The same, and what was lost of all adapters together (`lost`), [4]."""
    base = {name: part for name, part in params.items() if name not in ("lora", "lora_scale")}
    flat, losses = flax.traverse_util.flatten_dict(base, sep="/"), jnp.zeros(4)
    for path, adapter, scale_L in adapters(params) if "lora" in params else ():
        exact, change = delta(path, flat[path], adapter["a"], adapter["b"], scale_L)
        merged = exact.astype(flat[path].dtype)
        losses += merge_loss(flat[path], change, exact, merged)
        flat[path] = merged
    return flax.traverse_util.unflatten_dict(flat, sep="/"), losses


def merge_loss(w: Any, change: jax.Array, exact: jax.Array, merged: jax.Array) -> jax.Array:
    """What a rounded sum `merged` lost of `exact` = w + change: sums of squares of the error and of the change, entries that
    were to change and did not, entries; [4] float32, to be added up.
    """
    error, rest = merged.astype(jnp.float32) - exact, (change != 0) & (merged == w)
    return jnp.stack([(error**2).sum(), (change**2).sum(), rest.sum(dtype=jnp.float32), jnp.float32(change.size)])


LOSS_WARNING_RATIO = 0.01  # share of what adapters change (root of the mean square) that may be lost without a word


def describe_merge_loss(losses: Any, dtype: str) -> str:
    """A sentence on what merging adapters lost, from the sum of `lost`; empty where it is next to nothing."""
    error, change, same, count = (float(x) for x in losses)
    if not change or (error / change) ** 0.5 <= LOSS_WARNING_RATIO:
        return ""
    share = min(1.0, (error / change) ** 0.5)
    return (
        f"merged into {dtype} weights, the adapters lose {share:.0%} of what they change (root mean square), and "
        f"{same / count:.0%} of the weights stay as they were"
    )


def delta(path: str, w: Any, a: Any, b: Any, scale: Any) -> tuple[jax.Array, jax.Array]:
    """W + scale * A B and scale * A B, float32; stacked over layers, or of one layer, or of one expert of it."""
    split = SPLITS[path.removeprefix("layers/")]
    r, inner, outer = a.shape[-1], len(split.inner), len(split.outer)
    leading = w.shape[: w.ndim - inner - outer]
    product = jnp.einsum("...ir,...ro->...io", a.reshape(*leading, -1, r), b.reshape(*leading, r, -1), precision="highest")
    scale = jnp.reshape(scale, jnp.shape(scale) + (1,) * (w.ndim - jnp.ndim(scale)))
    change = scale * product.reshape(w.shape)
    return w.astype(jnp.float32) + change, change


def adapters(params: Params) -> Iterator[tuple[str, dict[str, jax.Array], jax.Array]]:
    """Path, {a, b} and scale [L] of every adapter."""
    flat = flax.traverse_util.flatten_dict({"lora": params["lora"], "scale": params["lora_scale"]}, sep="/")
    for name, scale_L in flat.items():
        if name.startswith("scale/"):
            path = name.removeprefix("scale/")
            yield path, {side: flat[f"lora/{path}/{side}"] for side in "ab"}, scale_L


def to_tree(flat: dict[str, Any]) -> Params:
    """The tree of arrays by path."""
    return flax.traverse_util.unflatten_dict({tuple(path.split("/")): leaf for path, leaf in flat.items()})
