"""The train step: the whole of pretraining, upcycled continuation, SFT and DPO is this function with another loss.

How a 47B mixture trains on 256 chips: the state is sharded over the mesh by parallel/sharding.py, the batch over its rows;
the loss is a sum over rows and a weight; XLA inserts the collectives.  Nothing here depends on devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from tanuki_jax import model
from tanuki_jax.train.balance import Balance, Rebalance
from tanuki_jax.train.contract import Batch, LossFn, Metrics, Params
from tanuki_jax.train.optimizer import round_to_dtypes

ROUNDING = 2**32 - 1  # what the keys of rounding are folded from; those of the losses' draws are folded from steps
StepMetrics: TypeAlias = dict[str, jax.Array]
Schedule: TypeAlias = Callable[[jax.Array], jax.Array]  # step -> learning rate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a stage carries from step to step."""

    step: jax.Array  # int32, optimizer steps done in this stage
    params: Params
    opt_state: optax.OptState
    key: jax.Array  # root of the stage's random draws; step n uses fold_in(key, n)
    balance: Balance = field(default_factory=dict)  # what balances the experts beside the losses
    frozen: Params = field(default_factory=dict)  # parameters that are not trained: all below adapters (model/lora.py)
    lr_scale: jax.Array = field(default_factory=lambda: jnp.float32(1))  # factor of the learning rate, less after a rollback

    @property
    def all_params(self) -> Params:
        """All parameters, trained or not."""
        return {**self.frozen, **self.params} if self.frozen else self.params


class Update(Protocol):
    """What a step does once it has its gradients."""

    def __call__(self, state: State, grads: Params, metrics: StepMetrics) -> tuple[State, StepMetrics]: ...


TrainStep: TypeAlias = Callable[[State, Batch], tuple[State, StepMetrics]]


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    balance: Balance | None = None,
    frozen: Params | None = None,
) -> State:
    """The state before the first step; norms and biases, if given in less, are float32 from here on."""

    def widen(path: tuple[jax.tree_util.DictKey, ...], w: jax.Array) -> jax.Array:
        return w.astype(jnp.float32) if model.is_vector(path[-1].key) else w

    params = jax.tree_util.tree_map_with_path(widen, params)
    return State(jnp.int32(0), params, optimizer.init(params), key, balance or {}, frozen or {})


def gradients(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    gradient_accumulation_steps: int = 1,
    balance: Balance | None = None,
    frozen: Params | None = None,
    key: jax.Array | None = None,
) -> tuple[Params, StepMetrics]:  # Seven arguments: what a loss sees, apart from and together with the state.
    """Gradients and metrics of the mean loss over the global batch; the metric `weight` is what the loss was divided by.

    With a `key` the loss gets one of its own for each microbatch.

    Microbatches are computed one after another inside jit; sums are added up in float32 and divided once.  Row r belongs
    to microbatch r mod M, so that each device's rows stay on it.
    """

    def total_loss(params: Params, part: Batch, number: jax.Array | int) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        part_key = None if key is None else jax.random.fold_in(key, number)
        total, weight, metrics = loss_fn({**frozen, **params} if frozen else params, part, balance or {}, part_key)
        return total, (weight, metrics)

    grad_fn = jax.grad(total_loss, has_aux=True)
    if gradient_accumulation_steps == 1:
        grads, (weight, metrics) = grad_fn(params, batch, 0)
    else:
        parts = jax.tree.map(lambda a: a.reshape(-1, gradient_accumulation_steps, *a.shape[1:]).swapaxes(0, 1), batch)
        first = jax.tree.map(lambda a: a[0], parts)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), jax.eval_shape(grad_fn, params, first, 0))

        def add(sums: Params, part: tuple[Batch, jax.Array]) -> tuple[Params, None]:
            return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), sums, grad_fn(params, *part)), None

        (grads, (weight, metrics)), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(gradient_accumulation_steps)))
    inverse = 1.0 / jnp.maximum(weight, 1.0)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) * inverse, grads)
    means = {name: total / jnp.maximum(count, 1.0) for name, (total, count) in metrics.items()}
    for name in (n for n in means if n.startswith("loss/")):  # a source without a token in this batch has no loss
        means[name] = jnp.where(metrics[name][1] > 0, means[name], jnp.nan)
    return grads, means | {"weight": weight}


def make_update(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    clip_norm: float = 0.0,
    rebalance: Rebalance | None = None,
) -> Update:
    """`update(state, gradients, metrics) -> (state, metrics)`: what a step does once it has its gradients.

    The update is computed in float32; parameters in bfloat16 are rounded stochastically, by draws that the state's key (of the
    recipe's seed and the stage), the step and the parameter's path decide.
    `rebalance` (train/balance.py) then looks at the load of the experts.
    Gradients that are not finite change nothing but the step number; the metrics show it, and the loop counts them.
    """

    def update(state: State, grads: Params, metrics: StepMetrics) -> tuple[State, StepMetrics]:
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        if clip_norm:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        params = optax.tree.cast(state.params, jnp.float32)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        learning_rate = state.lr_scale * schedule(state.step)
        key = jax.random.fold_in(jax.random.fold_in(state.key, ROUNDING), state.step)
        params = round_to_dtypes(state.params, jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), key)
        balance = state.balance
        if rebalance:
            params, balance, metrics = rebalance(params, balance, metrics)
        params, opt_state, balance = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, balance),
            (state.params, state.opt_state, state.balance),
        )
        new = replace(state, step=state.step + 1, params=params, opt_state=opt_state, balance=balance)
        return new, metrics | {"grad_norm": norm, "learning_rate": learning_rate}

    return update


def make_train_step(
    loss_fn: LossFn,
    update: Update,
    gradient_accumulation_steps: int = 1,
    weight_name: str = "target_tokens",
    stochastic: bool = False,
    state_shardings: State | None = None,
    compiler_options: Mapping[str, bool | int | str] | None = None,
) -> TrainStep:  # Seven arguments: the two halves of a step, how it is cut, and how it is compiled.
    """`train_step(state, batch) -> (state, metrics)`, jitted, the state donated: gradients, then `update` (of `make_update`).

    Args:
      weight_name: the metric that says what the loss was divided by, tokens or pairs.
      stochastic: whether the loss draws something (dropout), and so gets a key.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, StepMetrics]:
        key = jax.random.fold_in(state.key, state.step) if stochastic else None
        grads, metrics = gradients(loss_fn, state.params, batch, gradient_accumulation_steps, state.balance, state.frozen, key)
        metrics[weight_name] = metrics.pop("weight")
        return update(state, grads, metrics)

    options = None if compiler_options is None else dict(compiler_options)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, None), compiler_options=options)
