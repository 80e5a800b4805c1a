"""The identity check: a few random tokens go through the dense model and the mixture while their weights pass by."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, model

TOKENS = 16
LAYER = ("attn", "norm_attn", "norm_mlp")
BEHIND = 2  # sets of weights that waiting calls hold, at most


class Identity(NamedTuple):
    """What the mixture computes against the dense model, on a few random tokens, in float32."""

    difference: float  # largest difference of two logits
    spread: float  # standard deviation of the dense model's logits


class IdentityCheck:
    """Takes a few random tokens through both models as their weights pass by; the model's own modules, in float32.

    It works in a thread of its own, a few calls behind: an error comes with a later call, at the latest with `result`.
    """

    def __init__(self, dense: config.ModelConfig, mixture: config.ModelConfig, key: jax.Array) -> None:
        self._key, self._mixture = (
            key,
            dataclasses.replace(mixture, compute=dataclasses.replace(mixture.compute, dtype="float32")),
        )
        compute = dataclasses.replace(dense.compute, dtype="float32", attention_impl="reference")
        plain = dataclasses.replace(dense, compute=compute, param_dtype=mixture.param_dtype)
        self._dense = plain
        self._entered = jax.jit(functools.partial(_layer_forward, plain, self._mixture))
        self._ffn = jax.jit(model.layerwise.ffn)
        self._added = jax.jit(_add_ffn)
        self._thread = ThreadPoolExecutor(1)
        self._waiting: collections.deque[tuple[Future[None], Any]] = collections.deque()
        self._later(self._compile)

    def begin(self, table: np.ndarray) -> None:
        """The embedding of both."""
        self._later(self._begin, table)

    def enter(self, layer: dict[str, np.ndarray], dense: dict[str, np.ndarray], router: np.ndarray | None = None) -> None:
        """A layer's attention in both, and the dense FFN; without a router the layer stays dense."""
        self._later(self._enter, layer, dense, router, holds=dense)

    def expert(self, number: int, weights: Any) -> None:
        """Adds what one expert says."""
        self._later(self._add, number, weights, holds=weights)

    def end(self, norm: np.ndarray, head: np.ndarray) -> None:
        """The logits of both."""
        self._later(self._end, norm, head)

    def result(self) -> Identity:
        """What came of it, after `end`."""
        while self._waiting:
            self._waiting.popleft()[0].result()
        dense, mixture = self._logits_2SV
        return Identity(float(np.abs(dense - mixture).max()), float(dense.std()))

    def close(self) -> None:
        """Ends the thread, after the call it is at."""
        self._thread.shutdown(cancel_futures=True)

    def _later(self, call: Callable[..., None], *arguments: Any, holds: Any = None) -> None:
        self._waiting.append((self._thread.submit(call, *arguments), holds))
        while len({id(weights) for _, weights in self._waiting}) > BEHIND:
            self._waiting.popleft()[0].result()

    def _compile(self) -> None:
        """What the first layer needs, while its weights are read; the calls find it."""
        layers = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), model.parameter_shapes(self._dense)["layers"]
        )
        router_DE = jax.ShapeDtypeStruct((self._dense.d_model, self._mixture.n_experts), layers["mlp"]["gate"].dtype)
        x_2SD = jax.ShapeDtypeStruct((2, TOKENS, self._dense.d_model), jnp.float32)
        self._entered.lower({n: layers[n] for n in LAYER}, layers["mlp"], router_DE, x_2SD).compile()

    def _begin(self, table_VD: np.ndarray) -> None:
        draw = jax.jit(lambda key: jax.random.randint(jax.random.fold_in(key, 2), (1, TOKENS), 0, self._dense.vocab_size))
        x_1SD = model.layerwise.embed(self._dense, table_VD, np.asarray(draw(self._key)))
        self._x_2SD = jnp.tile(x_1SD, (2, 1, 1))

    def _enter(self, layer: dict[str, np.ndarray], dense: dict[str, np.ndarray], router_DE: np.ndarray | None) -> None:
        attn = {name.removeprefix("attn/"): array for name, array in layer.items() if name.startswith("attn/")}
        tree = {**{name: layer[name] for name in LAYER if name != "attn"}, "attn": attn}
        self._x_2SD, self._h_1SD, said_1SD, self._gate_1SE = self._entered(tree, dense, router_DE, self._x_2SD)
        self._said = (dense, said_1SD)  # an expert that is the dense FFN says the same

    def _add(self, number: int, weights: Any) -> None:
        if self._said[0] is not weights:
            self._said = (weights, self._ffn(weights, self._h_1SD))
        self._x_2SD = self._added(self._x_2SD, self._said[1], self._gate_1SE, number)

    def _end(self, norm: np.ndarray, head: np.ndarray) -> None:
        logits = jax.jit(functools.partial(model.layerwise.logits, self._dense))
        self._logits_2SV = np.asarray(logits(norm, head, self._x_2SD))


def _layer_forward(
    dense: config.ModelConfig, mixture: config.ModelConfig, layer: Any, weights: Any, router_DE: Any, x_2SD: jax.Array
) -> Any:
    """One layer of both, the dense model first, but for the experts of the mixture.

    Returns:
      the stream, and of the mixture what its experts see, what the dense FFN makes of it, and the gate (None: it is dense).
    """
    batch = {"segment_ids": jnp.ones((2, TOKENS), jnp.int32), "positions": jnp.tile(jnp.arange(TOKENS), (2, 1))}
    x_2SD, h_2SD = model.layerwise.attend(dense, layer, x_2SD, batch)
    said_2SD = model.layerwise.ffn(weights, h_2SD)
    if router_DE is None:
        return x_2SD + said_2SD, h_2SD[1:], said_2SD[1:], None
    return x_2SD.at[0].add(said_2SD[0]), h_2SD[1:], said_2SD[1:], model.layerwise.gates(mixture, router_DE, h_2SD[1:])


def _add_ffn(x_2SD: jax.Array, said_1SD: jax.Array, gate_1SE: jax.Array, number: jax.Array) -> jax.Array:
    """With what one expert of the mixture says."""
    return x_2SD.at[1].add(said_1SD[0] * gate_1SE[0, :, number, None])
