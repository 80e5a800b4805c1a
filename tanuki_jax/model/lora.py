"""Low-rank adapters (LoRA, Hu et al. 2021): W + scale * A B for any matrix of the layers.

They are two more branches of the parameter tree: `lora/layers/attn/q/{a [L,D,r], b [L,r,N,H]}`, which is trained while all
else is frozen, and `lora_scale/layers/attn/q [L]`, alpha / r or alpha / sqrt(r).  So whatever takes parameters takes these too,
and without the two branches the model is the base, bit by bit.  Attention and the dense FFN add scale * (x A) B to their
product; experts and router, whose products are not plain ones, use W + scale * A B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias, cast

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config
from tanuki_jax.model.layer_groups import Params
from tanuki_jax.model.layers import compute_dtype, is_vector
from tanuki_jax.model.transformer import named_parameters

Array: TypeAlias = jax.Array | np.ndarray


class Split(NamedTuple):
    """The axes of a layer's matrix: those that stack matrices, those of its inputs, those of its outputs."""

    stack: str
    inputs: str
    outputs: str


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
    """A matrix with an adapter: axis letters, with r for the rank, and shapes of A and B."""

    path: str  # "layers/attn/q"
    rank: int
    a: tuple[str, tuple[int, ...]]
    b: tuple[str, tuple[int, ...]]


def ranks(cfg: config.ModelConfig, options: config.Lora) -> dict[str, int]:
    """Path and rank of the adapters in a stage's options; of several matching patterns the most specific one counts."""
    names = [path.removeprefix("layers/") for path, _, _ in named_parameters(cfg)]
    by_name = config.lora_ranks(options, [name for name in names if name in SPLITS])
    return {f"layers/{name}": rank for name, rank in by_name.items()}


def targets(cfg: config.ModelConfig, ranks: Mapping[str, int]) -> Iterator[Target]:
    """The adapters of these ranks, in the order of the parameters."""
    for path, axes, shape in named_parameters(cfg):
        if path in ranks:
            sizes = {**dict(zip(axes, shape, strict=True)), "r": ranks[path]}
            stack, inputs, outputs = SPLITS[path.removeprefix("layers/")]
            sides = ("L" + stack + inputs + "r", "L" + stack + "r" + outputs)
            a, b = ((letters, tuple(sizes[x] for x in letters)) for letters in sides)
            yield Target(path, ranks[path], a, b)


def init_adapters(cfg: config.ModelConfig, options: config.Lora, key: jax.Array) -> tuple[Params, Params]:
    """New adapters and their scales, which are frozen; float32.  A is uniform within 1 / sqrt(inputs), B 0, as in PEFT."""
    trained = {}
    for number, target in enumerate(targets(cfg, ranks(cfg, options))):
        input_axes = SPLITS[target.path.removeprefix("layers/")].inputs
        inputs = math.prod(size for letter, size in zip(*target.a, strict=True) if letter in input_axes)
        target_key = jax.random.fold_in(key, number)
        a = jax.random.uniform(target_key, target.a[1], jnp.float32, -(inputs**-0.5), inputs**-0.5)
        trained[target.path] = {"a": a, "b": jnp.zeros(target.b[1], jnp.float32)}
    return {"lora": to_tree(trained)}, scale_tree(scales(cfg, options))


def scales(cfg: config.ModelConfig, options: config.Lora) -> dict[str, list[float]]:
    """The factor of each path's adapter, by layer."""
    return {
        target.path: [options.alpha / (target.rank**0.5 if options.rslora else target.rank)] * target.a[1][0]
        for target in targets(cfg, ranks(cfg, options))
    }


def scale_tree(scales: Mapping[str, list[float]]) -> Params:
    """The scales as a branch of the parameters."""
    return {"lora_scale": to_tree({path: jnp.array(values, jnp.float32) for path, values in scales.items()})}


def adapter_axes(cfg: config.ModelConfig, ranks: Mapping[str, int]) -> tuple[Params, Params]:
    """The trees of axis letters of adapters and of their scales."""
    adapted = list(targets(cfg, ranks))
    letters = {target.path: {"a": tuple(target.a[0]), "b": tuple(target.b[0])} for target in adapted}
    return {"lora": to_tree(letters)}, {"lora_scale": to_tree({target.path: ("L",) for target in adapted})}


def adapter_shapes(cfg: config.ModelConfig, ranks: Mapping[str, int]) -> Params:
    """The tree of ShapeDtypeStructs of adapters."""
    shapes = {
        target.path: {name: jax.ShapeDtypeStruct(side[1], jnp.float32) for name, side in (("a", target.a), ("b", target.b))}
        for target in targets(cfg, ranks)
    }
    return {"lora": to_tree(shapes)}


def frozen_params(cfg: config.ModelConfig, params: Params) -> Params:
    """The base below adapters: what is cast to the compute dtype at every use is cast once."""

    def cast_matrix(path: tuple[jax.tree_util.DictKey, ...], w: jax.Array) -> jax.Array:
        exact = path[-1].key == "router" or is_vector(path[-1].key)
        return w if exact else w.astype(compute_dtype(cfg))

    return jax.tree_util.tree_map_with_path(cast_matrix, params)


def merge(params: Params) -> Params:
    """Plain parameters that compute the same: every adapter added to its matrix, in float32, and cast back."""
    return merge_and_loss(params)[0]


def merge_and_loss(params: Params) -> tuple[Params, jax.Array]:
    """The same, and the sum of `merge_loss` over all adapters, [4]."""
    base = {name: part for name, part in params.items() if name not in ("lora", "lora_scale")}
    flat, losses = flax.traverse_util.flatten_dict(base, sep="/"), jnp.zeros(4)
    for path, adapter, scale_L in adapters(params) if "lora" in params else ():
        exact, change = delta(path, flat[path], adapter["a"], adapter["b"], scale_L)
        merged = exact.astype(flat[path].dtype)
        losses += merge_loss(flat[path], change, exact, merged)
        flat[path] = merged
    return flax.traverse_util.unflatten_dict(flat, sep="/"), losses


def merge_loss(w: Array, change: jax.Array, exact: jax.Array, merged: jax.Array) -> jax.Array:
    """What a rounded sum `merged` lost of `exact` = w + change: sums of squares of the error and of the change, entries that
    were to change and did not, entries; [4] float32, to be added up.
    """
    error, unchanged = merged.astype(jnp.float32) - exact, (change != 0) & (merged == w)
    return jnp.stack([(error**2).sum(), (change**2).sum(), unchanged.sum(dtype=jnp.float32), jnp.float32(change.size)])


LOSS_WARNING_RATIO = 0.01  # share of the adapters' change (root mean square) that may be lost without a warning


def describe_merge_loss(losses: Array | int, dtype: str) -> str:
    """A sentence on what merging adapters lost, from the sum of `merge_loss`; empty where it is next to nothing."""
    error, change, same, count = (float(x) for x in np.asarray(losses))
    if not change or (error / change) ** 0.5 <= LOSS_WARNING_RATIO:
        return ""
    share = min(1.0, (error / change) ** 0.5)
    return (
        f"merged into {dtype} weights, the adapters lose {share:.0%} of what they change (root mean square), and "
        f"{same / count:.0%} of the weights stay as they were"
    )


def delta(path: str, w: Array, a: Array, b: Array, scale: Array | np.floating | float) -> tuple[jax.Array, jax.Array]:
    """W + scale * A B and scale * A B, float32; stacked over layers, or of one layer, or of one expert of it."""
    split, r = SPLITS[path.removeprefix("layers/")], a.shape[-1]
    leading = w.shape[: w.ndim - len(split.inputs) - len(split.outputs)]
    product = jnp.einsum("...ir,...ro->...io", a.reshape(*leading, -1, r), b.reshape(*leading, r, -1), precision="highest")
    scale = jnp.reshape(scale, jnp.shape(scale) + (1,) * (w.ndim - jnp.ndim(scale)))
    change = scale * product.reshape(w.shape)
    return cast(jax.Array, w.astype(jnp.float32) + change), change


def adapters(params: Params) -> Iterator[tuple[str, dict[str, jax.Array], jax.Array]]:
    """Path, {a, b} and scale [L] of every adapter."""
    flat = flax.traverse_util.flatten_dict({"lora": params["lora"], "scale": params["lora_scale"]}, sep="/")
    for name, scale_L in flat.items():
        if name.startswith("scale/"):
            path = name.removeprefix("scale/")
            yield path, {side: flat[f"lora/{path}/{side}"] for side in "ab"}, scale_L


def to_tree(flat: Mapping[str, object]) -> Params:
    """The tree of leaves by path."""
    return flax.traverse_util.unflatten_dict({tuple(path.split("/")): leaf for path, leaf in flat.items()})
