"""The train step: the whole of pretraining, upcycled continuation, SFT and DPO is this function with another loss.

How a 47B mixture trains on 256 chips: the state is sharded over the mesh by parallel/sharding.py, the batch over its rows;
the loss is a sum over rows and a weight; XLA inserts the collectives.  Nothing here knows of devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tanuki_jax import model
from tanuki_jax.train.balance import Balance
from tanuki_jax.train.losses import Batch, LossFn
from tanuki_jax.train.optimizer import round_to_dtypes

ROUNDING = 2**32 - 1  # what the keys of rounding are folded from; those of the losses' draws are folded from steps


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a stage carries from step to step."""

    step: jax.Array  # int32, optimizer steps done in this stage
    params: Any
    opt_state: Any
    key: jax.Array  # root of the stage's random draws; step n uses fold_in(key, n)
    balance: Balance = field(default_factory=dict)  # what balances the experts beside the losses
    frozen: Any = field(default_factory=dict)  # parameters that are not trained: all below adapters (model/lora.py)
    rate: jax.Array = field(default_factory=lambda: jnp.float32(1))  # factor of the learning rate, less after going back

    @property
    def model(self) -> Any:
        """All parameters, trained or not."""
        return {**self.frozen, **self.params} if self.frozen else self.params


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    balance: Balance | None = None,
    frozen: Any = None,
) -> State:
    """The state before the first step; norms and biases, if given in less, are float32 from here on."""

    def wide(path: Any, w: jax.Array) -> jax.Array:
        return w.astype(jnp.float32) if model.is_vector(path[-1].key) else w

    params = jax.tree_util.tree_map_with_path(wide, params)
    return State(jnp.int32(0), params, optimizer.init(params), key, balance or {}, frozen or {})


def gradients(
    loss_fn: LossFn,
    params: Any,
    batch: Batch,
    gradient_accumulation_steps: int = 1,
    balance: Balance | None = None,
    frozen: Any = None,
    key: jax.Array | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients and metrics of the mean loss over the global batch.

    With a `key` the loss gets one of its own for each microbatch.

    Microbatches are computed one after another inside jit; sums are added up in float32 and divided once.  Row r belongs
    to microbatch r mod M, so that each device's rows stay on it.
    """

    def scaled(params: Any, part: Batch, number: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        drawn = {} if key is None else {"key": jax.random.fold_in(key, number)}
        everything = {**frozen, **params} if frozen else params
        total, weight, metrics = loss_fn(everything, part, *([balance] if balance else []), **drawn)
        return total, (weight, metrics)

    grad_fn = jax.grad(scaled, has_aux=True)
    if gradient_accumulation_steps == 1:
        grads, (weight, metrics) = grad_fn(params, batch, 0)
    else:
        parts = jax.tree.map(lambda a: a.reshape(-1, gradient_accumulation_steps, *a.shape[1:]).swapaxes(0, 1), batch)
        zero = jax.tree.map(
            lambda s: jnp.zeros(s.shape, jnp.float32),
            jax.eval_shape(grad_fn, params, jax.tree.map(lambda a: a[0], parts), 0),
        )

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grad_fn(params, *part)), None

        (grads, (weight, metrics)), _ = jax.lax.scan(add, zero, (parts, jnp.arange(gradient_accumulation_steps)))
    inverse = 1.0 / jnp.maximum(weight, 1.0)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) * inverse, grads)
    means = {name: total / jnp.maximum(count, 1.0) for name, (total, count) in metrics.items()}
    for name in (n for n in means if n.startswith("loss/")):  # a source without a token in this batch has no loss
        means[name] = jnp.where(metrics[name][1] > 0, means[name], jnp.nan)
    return grads, means | {"weight": weight}


def make_update(
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    clip_norm: float = 0.0,
    rebalance: Callable[[Any, Balance, dict[str, jax.Array]], tuple[Any, Balance, dict[str, jax.Array]]] | None = None,
) -> Callable[[State, Any, dict[str, jax.Array]], tuple[State, dict[str, jax.Array]]]:
    """`update(state, gradients, metrics) -> (state, metrics)`: what a step does once it has its gradients.

    The update is computed in float32; parameters in bfloat16 are rounded stochastically, by draws that the state's key (of the
    recipe's seed and the stage), the step and the parameter's path decide.
    `rebalance` (train/balance.py) then looks at the load of the experts.
    Gradients that are not finite change nothing but the step number; the metrics show it, and the loop counts them.
    """

    def update(state: State, grads: Any, metrics: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        if clip_norm:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        params = optax.tree.cast(state.params, jnp.float32)
        directions, opt_state = optimizer.update(grads, state.opt_state, params)
        rate = state.rate * learning_rate(state.step)
        key = jax.random.fold_in(jax.random.fold_in(state.key, ROUNDING), state.step)
        params = round_to_dtypes(state.params, jax.tree.map(lambda p, d: p - rate * d, params, directions), key)
        balance = state.balance
        if rebalance:
            params, balance, metrics = rebalance(params, balance, metrics)
        params, opt_state, balance = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, balance),
            (state.params, state.opt_state, state.balance),
        )
        new = replace(state, step=state.step + 1, params=params, opt_state=opt_state, balance=balance)
        return new, metrics | {"grad_norm": norm, "learning_rate": rate}

    return update


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    clip_norm: float = 0.0,
    gradient_accumulation_steps: int = 1,
    state_shardings: Any = None,
    rebalance: Any = None,
    compiler_options: dict[str, Any] | None = None,
    draws: bool = False,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """`train_step(state, batch) -> (state, metrics)`, jitted, the state donated; gradients, then `make_update`.

    draws: whether the loss draws something (dropout), and so gets a key.
    """

    update = make_update(optimizer, learning_rate, clip_norm, rebalance)

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step) if draws else None
        return update(
            state, *gradients(loss_fn, state.params, batch, gradient_accumulation_steps, state.balance, state.frozen, key)
        )

    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, None), compiler_options=compiler_options)
