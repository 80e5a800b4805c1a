"""The identity check: a few random tokens go through the dense model and the mixture while their weights pass by."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, model
from tanuki_jax.model.transformer import Params

TOKENS = 16
LAYER = ("attn", "norm_attn", "norm_mlp")
BEHIND = 2  # sets of weights that waiting calls hold, at most

Arrays: TypeAlias = dict[str, np.ndarray]  # by name


class Identity(NamedTuple):
    """What the mixture computes against the dense model, on a few random tokens, in float32."""

    difference: float  # largest difference of two logits
    spread: float  # standard deviation of the dense model's logits


class IdentityCheck:
    """Takes a few random tokens through both models as their weights pass by; the model's own modules, in float32.

    It works in a thread of its own, a few calls behind: an error comes with a later call, at the latest with `result`.
    """

    def __init__(self, dense: config.ModelConfig, mixture: config.ModelConfig, key: jax.Array) -> None:
        compute = dataclasses.replace(dense.compute, dtype="float32", attention_impl="reference")
        self._dense = dataclasses.replace(dense, compute=compute, param_dtype=mixture.param_dtype)
        self._mixture = dataclasses.replace(mixture, compute=dataclasses.replace(mixture.compute, dtype="float32"))
        self._key = key
        self._layer_forward = jax.jit(functools.partial(_layer_forward, self._dense, self._mixture))
        self._ffn = jax.jit(model.layerwise.ffn)
        self._add_ffn = jax.jit(_add_ffn)
        self._thread = ThreadPoolExecutor(1)
        self._waiting: collections.deque[tuple[Future[None], Arrays | None]] = collections.deque()
        self._later(self._compile)

    def begin(self, table: np.ndarray) -> None:
        """The embedding of both."""
        self._later(self._begin, table)

    def enter(self, layer: Arrays, dense: Arrays, router: np.ndarray | None = None) -> None:
        """A layer's attention in both, and the dense FFN; without a router the layer stays dense."""
        self._later(self._enter, layer, dense, router, holds=dense)

    def expert(self, number: int, weights: Arrays) -> None:
        """Adds the output of one expert."""
        self._later(self._add, number, weights, holds=weights)

    def end(self, norm: np.ndarray, head: np.ndarray) -> None:
        """The logits of both."""
        self._later(self._end, norm, head)

    def result(self) -> Identity:
        """How far the two are apart, after `end`."""
        while self._waiting:
            self._waiting.popleft()[0].result()
        dense, mixture = self._logits_2SV
        return Identity(float(np.abs(dense - mixture).max()), float(dense.std()))

    def close(self) -> None:
        """Ends the thread after the call that it is working on."""
        self._thread.shutdown(cancel_futures=True)

    def _later(self, call: Callable[..., None], *arguments: object, holds: Arrays | None = None) -> None:
        self._waiting.append((self._thread.submit(call, *arguments), holds))
        while len({id(weights) for _, weights in self._waiting}) > BEHIND:
            self._waiting.popleft()[0].result()

    def _compile(self) -> None:
        """Compiles what the first layer needs while its weights are read; the calls find it in the cache."""
        layers = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), model.parameter_shapes(self._dense)["layers"]
        )
        router_DE = jax.ShapeDtypeStruct((self._dense.d_model, self._mixture.n_experts), layers["mlp"]["gate"].dtype)
        x_2SD = jax.ShapeDtypeStruct((2, TOKENS, self._dense.d_model), jnp.float32)
        self._layer_forward.lower({n: layers[n] for n in LAYER}, layers["mlp"], router_DE, x_2SD).compile()

    def _begin(self, table_VD: np.ndarray) -> None:
        draw = jax.jit(lambda key: jax.random.randint(jax.random.fold_in(key, 2), (1, TOKENS), 0, self._dense.vocab_size))
        x_1SD = model.layerwise.embed(self._dense, table_VD, np.asarray(draw(self._key)))
        self._x_2SD = jnp.tile(x_1SD, (2, 1, 1))

    def _enter(self, layer: Arrays, dense: Arrays, router_DE: np.ndarray | None) -> None:
        attn = {name.removeprefix("attn/"): array for name, array in layer.items() if name.startswith("attn/")}
        tree = {**{name: layer[name] for name in LAYER if name != "attn"}, "attn": attn}
        output = self._layer_forward(tree, dense, router_DE, self._x_2SD)
        self._x_2SD, self._h_1SD, self._gate_1SE = output.x_2SD, output.h_1SD, output.gate_1SE
        self._ffn_out = (dense, output.ffn_out_1SD)  # an expert that is the dense FFN has the same output

    def _add(self, number: int, weights: Arrays) -> None:
        if self._ffn_out[0] is not weights:
            self._ffn_out = (weights, self._ffn(weights, self._h_1SD))
        self._x_2SD = self._add_ffn(self._x_2SD, self._ffn_out[1], self._gate_1SE, number)

    def _end(self, norm: np.ndarray, head: np.ndarray) -> None:
        logits = jax.jit(functools.partial(model.layerwise.logits, self._dense))
        self._logits_2SV = np.asarray(logits(norm, head, self._x_2SD))


class _LayerOutput(NamedTuple):
    """One layer of both models, the dense one first, but for the experts of the mixture."""

    x_2SD: jax.Array  # the residual stream
    h_1SD: jax.Array  # what the mixture's experts see
    ffn_out_1SD: jax.Array  # what the dense FFN makes of that
    gate_1SE: jax.Array | None  # of the mixture; None where the layer is dense


def _layer_forward(
    dense: config.ModelConfig,
    mixture: config.ModelConfig,
    layer: Params,
    weights: dict[str, jax.Array],
    router_DE: jax.Array | None,
    x_2SD: jax.Array,
) -> _LayerOutput:
    batch = {"segment_ids": jnp.ones((2, TOKENS), jnp.int32), "positions": jnp.tile(jnp.arange(TOKENS), (2, 1))}
    x_2SD, h_2SD = model.layerwise.attend(dense, layer, x_2SD, batch)
    ffn_out_2SD = model.layerwise.ffn(weights, h_2SD)
    if router_DE is None:
        return _LayerOutput(x_2SD + ffn_out_2SD, h_2SD[1:], ffn_out_2SD[1:], None)
    gate_1SE = model.layerwise.gates(mixture, router_DE, h_2SD[1:])
    return _LayerOutput(x_2SD.at[0].add(ffn_out_2SD[0]), h_2SD[1:], ffn_out_2SD[1:], gate_1SE)


def _add_ffn(x_2SD: jax.Array, ffn_out_1SD: jax.Array, gate_1SE: jax.Array, number: jax.Array) -> jax.Array:
    """Adds the output of one expert of the mixture."""
    return x_2SD.at[1].add(ffn_out_1SD[0] * gate_1SE[0, :, number, None])
