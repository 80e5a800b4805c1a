"""The identity check: a few random tokens go through the dense model and the mixture while their weights pass by."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, model

TOKENS = 16


class Identity(NamedTuple):
    """What the mixture computes against the dense model, on a few random tokens, in float32."""

    difference: float  # largest difference of two logits
    spread: float  # standard deviation of the dense model's logits


class Probe:
    """Takes a few random tokens through both models as their weights pass by; the model's own modules, in float32."""

    def __init__(self, dense: config.Model, mixture: config.Model, key: jax.Array) -> None:
        self._dense, self._mixture = _float32(dense), _float32(mixture)
        self._expert = dataclasses.replace(self._dense, d_ff=mixture.expert_d_ff or mixture.d_ff)
        positions = jnp.arange(TOKENS)[None]
        self._batch = {"segment_ids": jnp.ones((1, TOKENS), jnp.int32), "positions": positions}
        draw = jax.jit(lambda key: jax.random.randint(jax.random.fold_in(key, 2), (1, TOKENS), 0, dense.vocab_size))
        self._tokens = draw(key)
        self._attend = jax.jit(functools.partial(model.layerwise.attend, self._dense))
        self._ffn = jax.jit(model.layerwise.ffn, static_argnums=0)
        self._gates = jax.jit(functools.partial(model.layerwise.gates, self._mixture))

    def begin(self, table: np.ndarray) -> None:
        rows, places = np.unique(np.asarray(self._tokens), return_inverse=True)  # the table is large
        embedded = model.layerwise.embed(self._dense, jnp.asarray(table[rows]), jnp.asarray(places.reshape(self._tokens.shape)))
        self._of_dense = self._of_mixture = embedded

    def enter(self, layer: dict[str, np.ndarray], dense: dict[str, np.ndarray], router: np.ndarray | None = None) -> None:
        """A layer's attention in both, and the dense FFN; without a router the layer stays dense."""
        attn = {name.removeprefix("attn/"): array for name, array in layer.items() if name.startswith("attn/")}
        tree = {"attn": attn, **{name: layer[name] for name in ("norm_attn", "norm_mlp")}}
        x, h = self._attend(tree, self._of_dense, self._batch)
        self._of_mixture, self._h = self._attend(tree, self._of_mixture, self._batch)
        said, of_mixture = self._ffn(self._dense, dense, jnp.stack([h[0], self._h[0]]))
        self._of_dense = x + said
        self._said = (dense, of_mixture[None])  # an expert that is the dense FFN says the same
        self._gate = None if router is None else self._gates(router, self._h)

    def expert(self, number: int, weights: Any) -> None:
        """Adds what one expert (or the only FFN of the layer) says."""
        if self._said[0] is not weights:
            cfg = self._dense if self._gate is None else self._expert
            self._said = (weights, self._ffn(cfg, weights, self._h))
        said = self._said[1]
        self._of_mixture += said if self._gate is None else said * self._gate[..., number : number + 1]

    def end(self, norm: np.ndarray, head: np.ndarray) -> None:
        logits = jax.jit(functools.partial(model.layerwise.logits, self._dense))
        self._logits = [np.asarray(logits(norm, head, x)) for x in (self._of_dense, self._of_mixture)]

    def result(self) -> Identity:
        dense, mixture = self._logits
        return Identity(float(np.abs(dense - mixture).max()), float(dense.std()))


def _float32(cfg: config.Model) -> config.Model:
    return dataclasses.replace(cfg, dtype="float32", attention="reference")
