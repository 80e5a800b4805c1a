"""The contract of the losses with the train step and the loop.

A loss is (params, batch, balance, key) -> (sum, weight, metrics); the step divides once, by the weight of the whole batch.  A
metric is a pair (sum, weight) too, so that accumulation, packing, padding and devices never change what is reported.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import jax

from tanuki_jax.train.balance import Balance

Params: TypeAlias = Any  # a tree of arrays: nested dictionaries named as model/transformer.py says
Batch: TypeAlias = dict[str, jax.Array]
Mean: TypeAlias = tuple[jax.Array, jax.Array]  # a sum, and the weight that it is divided by
Metrics: TypeAlias = dict[str, Mean]


class LossFn(Protocol):
    """A loss; every argument is always passed."""

    def __call__(
        self, params: Params, batch: Batch, balance: Balance, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """The sum over the batch, its weight, and metrics.

        Args:
          balance: what balances the experts beside the losses; empty where nothing does.
          key: of this step's random draws; None where nothing is drawn.
        """
        ...
