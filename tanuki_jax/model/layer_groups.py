"""Models whose layers are of two kinds, dense and mixture: which layers one loop computes, and the parameters in that order.

Outside of the modules the parameters are stacked by kind (`Params`, see model/transformer.py).  The modules have one stack for
each group, `run_0`, `run_1` and so on, where there are several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import flax.traverse_util
import jax
import jax.numpy as jnp

from tanuki_jax import config

Params: TypeAlias = dict[str, Any]  # a tree of arrays, or of something for each array: shapes, axis letters, shardings
Tree = TypeVar("Tree")


class LayerGroup(NamedTuple):
    """Neighbouring layers of one kind, which one loop computes."""

    is_moe: bool
    first: int
    end: int  # one past the last


def layer_groups(cfg: config.ModelConfig) -> list[LayerGroup]:
    """The groups of the model's layers, in order."""
    moe = set(config.moe_layers(cfg))
    cuts = [i for i in range(1, cfg.n_layers) if (i in moe) != (i - 1 in moe)]
    return [LayerGroup(a in moe, a, b) for a, b in zip([0, *cuts], [*cuts, cfg.n_layers], strict=True)]


def concatenate(parts: Sequence[Tree]) -> Tree:
    """Trees of the groups as one tree, along L."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def split_groups(cfg: config.ModelConfig, params: Params) -> Params:
    """The parameters as the modules have them: one stack of layers for each group."""
    groups = layer_groups(cfg)
    if len(groups) == 1:
        return params
    layers, done = params["layers"], {"mlp": 0, "moe": 0}
    tree = {name: part for name, part in params.items() if name != "layers"}
    for number, (is_moe, first, end) in enumerate(groups):
        kind = "moe" if is_moe else "mlp"
        start, done[kind] = done[kind], done[kind] + end - first
        shared = {name: part for name, part in layers.items() if name not in done}
        tree[f"run_{number}"] = jax.tree.map(lambda w, a=first, b=end: w[a:b], shared) | {
            kind: jax.tree.map(lambda w, a=start, b=done[kind]: w[a:b], layers.get(kind, {}))
        }
    return tree


def split_layers(cfg: config.ModelConfig, layers: Params) -> list[Params]:
    """The stacked parameters of the layers, or adapters of some of them, as one tree for each layer."""
    moe, counts, trees = set(config.moe_layers(cfg)), {"mlp": 0, "moe": 0}, []
    for number in range(cfg.n_layers):
        kind = "moe" if number in moe else "mlp"
        places = dict.fromkeys(layers.keys() - counts, number) | ({kind: counts[kind]} if kind in layers else {})
        trees.append({name: jax.tree.map(lambda w, i=place: w[i], layers[name]) for name, place in places.items()})
        counts[kind] += 1
    return trees


def merge_groups(tree: Params, join: Callable[..., object]) -> Params:
    """The inverse of `split_groups`; `join` takes the leaves of all groups that have a parameter."""
    stacks = [tree[name] for name in sorted(tree, key=lambda n: int(n.partition("run_")[2] or -1)) if name.startswith("run_")]
    if not stacks:
        return tree
    flat: dict[tuple[str, ...], list[object]] = {}
    for stack in stacks:
        for path, leaf in flax.traverse_util.flatten_dict(stack).items():
            flat.setdefault(path, []).append(leaf)
    layers = flax.traverse_util.unflatten_dict({path: join(*leaves) for path, leaves in flat.items()})
    return {name: part for name, part in tree.items() if not name.startswith("run_")} | {"layers": layers}
