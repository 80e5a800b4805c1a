"""Hugging Face directories of Llama, Mistral and Mixtral models as checkpoints that are read tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tanuki_jax import config
from tanuki_jax.checkpoint import LazyArray, LazyCheckpoint, Meta
from tanuki_jax.errors import UserError
from tanuki_jax.interop import layout
from tanuki_jax.interop.config_json import (
    check_supported,
    longest_row,
    model_config,
    read_config,
    read_generation,
)
from tanuki_jax.interop.layout import DOWN, EXPERT, FUSED, LAYER, OUTER, ROUTER, ROUTER_FUSED, TIED_HEAD, VECTOR, Name
from tanuki_jax.interop.weights import Weights


def open_llama(path: Path) -> LazyCheckpoint:
    """A dense Llama directory as parameters that are read when asked for, in our names and layouts."""
    settings = read_config(Path(path))
    if settings.get("num_local_experts") or settings.get("model_type") == "mixtral":
        raise UserError(f"upcycle: {path} is a mixture already ({settings.get('model_type')}); give a dense model")
    return open_huggingface(path)


def open_huggingface(path: Path, param_dtype: str = "") -> LazyCheckpoint:
    """A Llama, Mistral, Mixtral or Tanuki directory as parameters that are read when asked for, in our names and layouts.

    Every tensor's name, shape and dtype is checked from the headers of the files before any weight is read.  The meta has what
    config.json and generation_config.json say, for the export.

    Args:
      param_dtype: what all weights are cast to as they are read; without it they must be of one dtype.
    """
    path = Path(path)
    settings = read_config(path)
    check_supported(path, settings)
    weights = Weights(path, param_dtype)
    outer = dict(OUTER)
    if settings.get("tie_word_embeddings") and not weights.has(OUTER["head"].theirs):
        outer["head"] = TIED_HEAD
    cfg = model_config(path, settings, param_dtype or weights.dtype(outer["embed/table"].theirs))
    weights.model_dtype = cfg.param_dtype
    tree = _Tensors(cfg, weights).tree(outer)
    weights.check_all_used()
    meta: Meta = {
        "huggingface": str(path),
        "longest": longest_row(path, settings),
        "published": {"config": settings, "generation": read_generation(path)},
    }
    if weights.dtypes != {cfg.param_dtype}:
        meta["cast"] = sorted(weights.dtypes)
    return LazyCheckpoint(cfg, tree, meta, path)


class _Tensors:
    """Published tensors as arrays of ours; each is checked when its array is made, and read when that is read."""

    def __init__(self, cfg: config.ModelConfig, weights: Weights) -> None:
        self._cfg, self._weights, self._sizes = cfg, weights, layout.axis_sizes(cfg)
        self._fused = weights.has(f"model.layers.0.{DOWN.theirs}")

    def tree(self, outer: dict[str, Name]) -> dict[str, LazyArray]:
        """All parameters by path; outer: those outside the layers."""
        tree = {path: self._whole(name) for path, name in outer.items()}
        for path, name in LAYER.items():
            if not (self._cfg.n_experts and path.startswith("mlp/")):
                tree[f"layers/{path}"] = self._stacked(name)
        if self._cfg.n_experts:
            tree["layers/moe/router"] = self._stacked(ROUTER_FUSED if self._fused else ROUTER)
            tree |= {f"layers/{path}": self._experts(path, name) for path, name in EXPERT.items()}
        return tree

    def _whole(self, name: Name) -> LazyArray:
        """A parameter outside the layers."""
        self._expect(name.theirs, name)
        return LazyArray(layout.our_shape(name, self._sizes), self._dtype(name), lambda: self._read(name.theirs, name))

    def _stacked(self, name: Name) -> LazyArray:
        """A parameter of all layers."""
        tensors = [f"model.layers.{layer}.{name.theirs}" for layer in range(self._cfg.n_layers)]
        for tensor in tensors:
            self._expect(tensor, name)

        def read(*layer: int) -> np.ndarray:
            return self._read(tensors[layer[0]], name) if layer else np.stack([read(i) for i in range(len(tensors))])

        return LazyArray((self._cfg.n_layers, *layout.our_shape(name, self._sizes)), self._dtype(name), read)

    def _experts(self, path: str, name: Name) -> LazyArray:
        """A matrix of all experts of all layers, each a tensor of its own or rows of a fused one."""
        counts = self._cfg.n_layers, self._cfg.n_experts
        fused = next(fused for fused in FUSED if path in fused.parts)
        rows, first = layout.published_shape(name, self._sizes)[0], fused.parts.index(path)
        part = slice(first * rows, (first + 1) * rows)
        for layer in range(self._cfg.n_layers):
            if self._fused:
                self._weights.expect(f"model.layers.{layer}.{fused.theirs}", layout.fused_shape(fused, self._sizes))
            else:
                for number in range(self._cfg.n_experts):
                    self._expect(f"model.layers.{layer}.{name.theirs.format(number)}", name)

        def read(*at: int) -> np.ndarray:
            """One expert of a layer, the layer's, or all."""
            if len(at) < 2:
                return np.stack([read(*at, i) for i in range(counts[len(at)])])
            layer, number = at
            if self._fused:
                return self._read(f"model.layers.{layer}.{fused.theirs}", name, (number, part))
            return self._read(f"model.layers.{layer}.{name.theirs.format(number)}", name)

        return LazyArray((*counts, *layout.our_shape(name, self._sizes)), self._dtype(name), read)

    def _expect(self, tensor: str, name: Name) -> None:
        self._weights.expect(tensor, layout.published_shape(name, self._sizes), name.axes == VECTOR)

    def _read(self, tensor: str, name: Name, part: tuple[int | slice, ...] = ()) -> np.ndarray:
        return layout.to_ours(name, self._weights.read(tensor, part), self._sizes)

    def _dtype(self, name: Name) -> str:
        return "float32" if name.axes == VECTOR else self._cfg.param_dtype
