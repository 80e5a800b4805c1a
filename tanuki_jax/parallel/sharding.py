"""The one table of the mesh axes that an array axis is split over, and the functions that apply it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tanuki_jax import ops

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


Layout: TypeAlias = Literal["stored", "used", "activation"]  # of the fields of Rule
Tree = TypeVar("Tree")


class Rule(NamedTuple):
    """Mesh axes of an array axis: of a parameter between steps, of a parameter in use, and of an activation."""

    stored: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    activation: tuple[str, ...] = ()


TENSOR = Rule(("tensor",), ("tensor",), ("tensor",))
REPLICATED = ("fsdp", "context", "expert")
# The letters are those of every docstring; a letter that is missing is never split.  Each axis of the mesh splits one letter
# of an array, the first that has it: D, or F where it comes before D, gets the axes that are left, so that everything is
# stored in as many parts as there are devices in a replica, and is gathered where it is used (fully sharded data
# parallelism).  An array gathered over its last axis would have to be copied into another layout.
RULES = {
    "B": Rule(activation=BATCH_AXES),
    "S": Rule(activation=("context",)),
    "E": Rule(("expert",), ("expert",)),
    "N": TENSOR,
    "K": TENSOR,
    "F": Rule(("tensor", *REPLICATED), ("tensor",), ("tensor",)),
    "V": TENSOR,
    "D": Rule(stored=REPLICATED),
}


def spec(axes: Sequence[str], layout: Layout, mesh: Mesh | AbstractMesh, shape: Sequence[int] | None = None) -> PartitionSpec:
    """How an array with these axis letters is split.

    An axis whose length (of `shape`) does not divide is not split over the mesh axes that do not fit.
    """
    splits: list[tuple[str, ...]] = []
    unused = set(mesh.shape)
    for position, letter in enumerate(axes):
        over: tuple[str, ...] = ()
        for name in getattr(RULES.get(letter, Rule()), layout):
            shards = math.prod(mesh.shape[n] for n in (*over, name))
            if name in unused and (shape is None or shape[position] % shards == 0):
                over += (name,)
        unused -= set(over)
        splits.append(over)
    return PartitionSpec(*(_shorten(over, mesh) for over in splits))


def _shorten(over: tuple[str, ...], mesh: Mesh | AbstractMesh) -> str | tuple[str, ...] | None:
    """A PartitionSpec's entry without mesh axes of size 1."""
    long = tuple(name for name in over if mesh.shape[name] > 1)
    return long[0] if len(long) == 1 else long or None


def tree_shardings(mesh: Mesh, logical_axes: Tree, shapes: Tree) -> Tree:
    """NamedShardings of stored parameters from the trees of their axis letters and shapes."""

    def shard(axes: tuple[str, ...], shape: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, spec(axes, "stored", mesh, shape.shape))

    return jax.tree.map(shard, logical_axes, shapes, is_leaf=lambda a: isinstance(a, tuple))


def sharding(mesh: Mesh, axes: str) -> NamedSharding:
    """The sharding of a batch or activation whose axes are the letters of `axes`, "BS" say."""
    return NamedSharding(mesh, spec(axes, "activation", mesh))


# --- inside a traced function: the mesh is the one in context -------------------------------------------------------


def axis_size(*names: str) -> int:
    """Product of the sizes of these axes of the mesh in context; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in names)


def batch_is_sharded(rows: int) -> bool:
    """Whether there is a mesh in context over whose batch axes this many rows divide."""
    return not jax.sharding.get_abstract_mesh().empty and rows % axis_size(*BATCH_AXES) == 0


def activation_spec(axes: str) -> PartitionSpec:
    """How an activation with these axis letters is split over the mesh in context."""
    return spec(axes, "activation", jax.sharding.get_abstract_mesh())


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Tells the compiler how an activation with these axis letters is split.

    Does nothing without a mesh, or where the batch does not divide (a few rows while decoding).
    """
    if not batch_is_sharded(x.shape[axes.index("B")]):
        return x
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, spec(axes, "activation", mesh, x.shape))


def unshard(w: jax.Array, axes: str, whole: bool = False) -> jax.Array:
    """A parameter as it is used: gathered over the axes that only its storage is split over (or, with `whole`, over all).

    Its gradient is scattered back.  Cast it to the compute dtype first, so that half the bytes travel.  Does nothing without
    a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return w
    used = PartitionSpec() if whole else spec(axes, "used", mesh, w.shape)
    return _reshard(w, used, spec(axes, "stored", mesh, w.shape))


def constrain_as_stored(w: jax.Array, axes: str) -> jax.Array:
    """A parameter that was just computed, split as it is stored."""
    mesh = jax.sharding.get_abstract_mesh()
    return w if mesh.empty else jax.lax.with_sharding_constraint(w, spec(axes, "stored", mesh, w.shape))


def embedding_lookup(w_VD: jax.Array, index_BS: jax.Array) -> jax.Array:
    """w[index], [B, S, D]: every device gathers the table and looks up its own tokens; the gradient is scattered back.

    Left to itself, the compiler makes every device look up its part of D for all tokens: some 16 columns at a time, and, for
    the gradient, a sort of all the tokens.
    """
    if not batch_is_sharded(index_BS.shape[0]):
        return ops.embedding_lookup(unshard(w_VD, "VD"), index_BS)
    mesh = jax.sharding.get_abstract_mesh()
    stored, tokens = spec("VD", "stored", mesh, w_VD.shape), activation_spec("BS")

    def lookup_local(w_VD: jax.Array, index_BS: jax.Array) -> jax.Array:
        return ops.embedding_lookup(unshard_local(w_VD, stored, PartitionSpec(None, None)), index_BS)

    # The barrier keeps the compiler from gathering first and casting after.  Its gradient's barrier keeps it from adding up the
    # parts of several microbatches before they are summed over the devices.
    w_VD = jax.lax.optimization_barrier(w_VD)
    return jax.shard_map(lookup_local, in_specs=(stored, tokens), out_specs=tokens, check_vma=False)(w_VD, index_BS)


def unshard_local(w: jax.Array, stored: PartitionSpec, used: PartitionSpec) -> jax.Array:
    """`unshard` inside shard_map: the device's part of a parameter, gathered over what only `stored` is split over."""
    for axis, (stored_over, used_over) in enumerate(zip(stored, used, strict=True)):
        gather_over = tuple(name for name in _names(stored_over) if name not in _names(used_over))
        if gather_over:
            w = jax.lax.all_gather(w, gather_over, axis=axis, tiled=True)
    return w


def _names(over: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (over,) if isinstance(over, str) else over or ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reshard(w: jax.Array, used: PartitionSpec, stored: PartitionSpec) -> jax.Array:
    # The barrier keeps the compiler from gathering first and casting to the compute dtype after.
    return jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(w), used)


def _reshard_forward(w: jax.Array, used: PartitionSpec, stored: PartitionSpec) -> tuple[jax.Array, None]:
    return _reshard(w, used, stored), None


def _reshard_backward(used: PartitionSpec, stored: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_reshard.defvjp(_reshard_forward, _reshard_backward)


# --- context parallelism --------------------------------------------------------------------------------------------


def zigzag_order(length: int, num_shards: int) -> np.ndarray:
    """The order in which `num_shards` devices hold a row of `length` tokens, so that causal attention costs each the same.

    The row is cut into 2 x num_shards chunks, and device i gets the i-th from the front and the i-th from the back.
    """
    chunks = np.arange(length).reshape(2 * num_shards, -1)
    pairs = [np.concatenate([chunks[i], chunks[-1 - i]]) for i in range(num_shards)]
    return np.concatenate(pairs)


def zigzag(batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], bool]:
    """The batch with its tokens in `zigzag_order` where the mesh in context has a context axis, and whether they are.

    A loss is a sum over tokens, so only the model needs to know the order: `model.apply(..., zigzag=)`.
    """
    shards, (rows, length) = axis_size("context"), batch["tokens"].shape
    if shards == 1 or not batch_is_sharded(rows):  # attention is not split over context
        return batch, False
    order = zigzag_order(length, shards)
    by_token = {name for name, value in batch.items() if value.ndim == 2 and value.shape[1] == length}
    reordered = {name: constrain(value[:, order], "BS") if name in by_token else value for name, value in batch.items()}
    return reordered, True


# --- for the command line -------------------------------------------------------------------------------------------


def explain(mesh: Mesh, parameters: Iterator[tuple[str, str, tuple[int, ...]]]) -> list[str]:
    """Lines that say how each parameter (name, letters, shape) and each kind of activation is split over the mesh."""

    def describe(axes: str, layout: Layout, shape: Sequence[int] | None = None) -> str:
        split = zip(axes, spec(axes, layout, mesh, shape), strict=True)
        return ", ".join(f"{letter} over {'+'.join(_names(over))}" for letter, over in split if over) or "whole"

    sizes = ", ".join(f"{name} {count}" for name, count in mesh.shape.items())
    lines = [f"mesh: {sizes}", f"{'parameter':22s} {'axes':6s} {'shape':26s} {'stored':40s} in use"]
    for name, axes, shape in parameters:
        stored, used = describe(axes, "stored", shape), describe(axes, "used", shape)
        lines.append(f"{name:22s} {axes:6s} {str(shape):26s} {stored:40s} {used}")
    lines.append(f"{'activation':22s} {'axes':6s} {'':26s} split")
    activations = {
        "batch": "BS",
        "residual stream": "BSD",
        "queries": "BSNH",
        "keys, values": "BSKH",
        "FFN": "BSF",
        "logits": "BSV",
    }
    for name, axes in activations.items():
        lines.append(f"{name:22s} {axes:6s} {'':26s} {describe(axes, 'activation')}")
    return lines
