"""Names, axes and layouts of published tensors beside ours.

A published matrix is [out, in], ours [*in, *out].  The experts of a mixture are one tensor per matrix of each expert (as
transformers writes Mixtral), or fused into one for all experts of a layer (as newer modules hold them).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np

from tanuki_jax import config, model

VECTOR = "D"  # the axes of a norm's scale, which is float32 in all of our models


class Name(NamedTuple):
    """Where a parameter of ours lies in a published checkpoint, and its axes."""

    theirs: str
    axes: str
    transposed: bool = True

    @property
    def stem(self) -> str:
        """The name of the module, as adapters have it."""
        return self.theirs.removesuffix(".weight")


class Fused(NamedTuple):
    """A published tensor [E, rows, in] that holds all experts of a layer, and our matrices among its rows, in order."""

    theirs: str
    parts: tuple[str, ...]


# Of one layer, under model.layers.N.
LAYER = {
    "attn/q": Name("self_attn.q_proj.weight", "DNH"),
    "attn/k": Name("self_attn.k_proj.weight", "DKH"),
    "attn/v": Name("self_attn.v_proj.weight", "DKH"),
    "attn/o": Name("self_attn.o_proj.weight", "NHD"),
    "norm_attn": Name("input_layernorm.weight", "D", False),
    "norm_mlp": Name("post_attention_layernorm.weight", "D", False),
    "mlp/gate": Name("mlp.gate_proj.weight", "DF"),
    "mlp/up": Name("mlp.up_proj.weight", "DF"),
    "mlp/down": Name("mlp.down_proj.weight", "FD"),
}
# Of one layer of a mixture: the router, beside single experts and beside fused ones, and the matrices of expert {}.
ROUTER, ROUTER_FUSED = Name("block_sparse_moe.gate.weight", "DE"), Name("mlp.gate.weight", "DE")
EXPERT = {
    "moe/gate": Name("block_sparse_moe.experts.{}.w1.weight", "DF"),
    "moe/up": Name("block_sparse_moe.experts.{}.w3.weight", "DF"),
    "moe/down": Name("block_sparse_moe.experts.{}.w2.weight", "FD"),
}
GATE_UP = Fused("mlp.experts.gate_up_proj", ("moe/gate", "moe/up"))  # [E, 2F, D]
DOWN = Fused("mlp.experts.down_proj", ("moe/down",))  # [E, D, F]
FUSED = (GATE_UP, DOWN)
OUTER = {
    "embed/table": Name("model.embed_tokens.weight", "VD", False),
    "norm_final": Name("model.norm.weight", "D", False),
    "head": Name("lm_head.weight", "DV"),
}
TIED_HEAD = Name("model.embed_tokens.weight", "DV")


def axis_sizes(cfg: config.ModelConfig) -> dict[str, int]:
    """Length per axis letter; F is the experts' where there are any."""
    named = sorted(model.named_parameters(cfg), key=lambda parameter: "/moe/" in parameter[0])
    return {letter: size for _, axes, shape in named for letter, size in zip(axes, shape, strict=True)}


def our_shape(name: Name, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of a parameter of ours: of one layer, of one expert."""
    return tuple(sizes[axis] for axis in name.axes)


def published_shape(name: Name, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of the published tensor: [out, in] for a matrix."""
    shape = our_shape(name, sizes)
    if not name.transposed:
        return shape
    inputs = _input_axes(name)
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def fused_shape(fused: Fused, sizes: dict[str, int]) -> tuple[int, int, int]:
    """The shape of a published tensor of all experts."""
    rows, columns = published_shape(EXPERT[fused.parts[0]], sizes)
    return sizes["E"], len(fused.parts) * rows, columns


def to_ours(name: Name, array: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
    """A published array in our layout."""
    array = (transpose(array) if name.transposed else np.ascontiguousarray(array)).reshape(our_shape(name, sizes))
    return array.astype(np.float32, copy=False) if name.axes == VECTOR else array


def to_published(name: Name, array: np.ndarray, rows: slice) -> np.ndarray:
    """Rows of an array of ours in the published layout."""
    if not name.transposed:
        return np.ascontiguousarray(array[rows])
    inputs = math.prod(array.shape[: _input_axes(name)])
    return transpose(array.reshape(inputs, -1)[:, rows])


def transpose(matrix: np.ndarray) -> np.ndarray:
    """The transposed matrix, in memory of its own; by XLA's CPU client, several times as fast as numpy."""
    bits = matrix.view(np.uint16) if matrix.dtype.itemsize == 2 else matrix
    return np.asarray(jax.device_put(bits.T, jax.devices("cpu")[0])).view(matrix.dtype)


def _input_axes(name: Name) -> int:
    """How many of the first axes of our matrix are its input."""
    return 1 if name.axes[0] == "D" else len(name.axes) - 1
