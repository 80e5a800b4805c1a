"""AdamW and learning-rate schedules; the rate is a pure function of the stage's step, never part of the optimizer state."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tanuki_jax import config, model, ops

Tree: TypeAlias = Any  # of arrays: parameters, gradients or moments


def make_optimizer(options: config.Optimizer) -> optax.GradientTransformation:
    """Adam direction plus weight decay on matrices; the step multiplies it by minus the learning rate.

    Moments are computed in float32 and stored in `moment_dtype`, where that is bfloat16 by stochastic rounding.  Norm scales
    do not decay; embedding, head and router do, as in Megatron-LM.
    """
    adam = optax.scale_by_adam(b1=options.beta1, b2=options.beta2, eps=options.eps)
    return optax.chain(
        _store_as(adam, options.moment_dtype), optax.add_decayed_weights(options.weight_decay, mask=weight_decay_mask)
    )


def _store_as(adam: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Adam whose moments lie in `dtype` between steps, whatever the dtype of the parameters."""

    def init(params: Tree) -> optax.OptState:
        state: Any = adam.init(params)
        return state._replace(mu=optax.tree.cast(state.mu, dtype), nu=optax.tree.cast(state.nu, dtype))

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, optax.OptState]:
        stored = {"mu": state.mu, "nu": state.nu}
        updates, new = adam.update(grads, state._replace(**optax.tree.cast(stored, jnp.float32)), params)
        key = jax.random.fold_in(jax.random.key(0), new.count)
        return updates, new._replace(**round_to_dtypes(stored, {"mu": new.mu, "nu": new.nu}, key))

    return optax.GradientTransformation(init, update)


def round_to_dtypes(stored: Tree, values: Tree, key: jax.Array) -> Tree:
    """`values`, a tree of float32, in the dtypes of the tree `stored`; in bfloat16 by stochastic rounding.

    To the nearest, a change below half a step of bfloat16, 2^-9 of the number, would be lost, and lost again with every step.
    The draws depend on the key and on the path of each array.
    """
    first_word, second_word = jax.random.bits(key, (2,), jnp.uint32)

    def round_leaf(path: tuple[jax.tree_util.KeyEntry, ...], old: jax.Array, value: jax.Array) -> jax.Array:
        if old.dtype != jnp.bfloat16:
            return value.astype(old.dtype)
        number = np.uint32(zlib.crc32(jax.tree_util.keystr(path).encode()))
        return ops.round_stochastically(value, jnp.stack([first_word ^ number, second_word]))

    return jax.tree_util.tree_map_with_path(round_leaf, stored, values)


def weight_decay_mask(params: Tree) -> Tree:
    """True for each parameter that decays: all but norm scales (matrices here, stacked over layers) and biases of experts."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not model.is_vector(path[-1].key), params)


def make_schedule(options: config.Optimizer, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Step (from 0) -> learning rate, float32.

    Linear warm-up reaches the peak at its last step.  cosine falls to the floor at `decay_steps` (0: the stage's end);
    wsd stays at the peak and falls linearly over the last `decay_steps` (0: a tenth of the stage); lr_range_test rises
    exponentially from the floor to the peak (Smith 2017, section 3.3).  With `schedule_start`
    the stage is the last part of a longer schedule, whose steps the other options count.
    """
    total_steps += options.schedule_start
    warmup = options.warmup_steps or round(options.warmup_ratio * total_steps)
    peak, floor = options.learning_rate, options.learning_rate_floor

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32) + options.schedule_start
        if options.schedule == "cosine":
            length = (options.decay_steps or total_steps) - warmup
            done = jnp.clip((step - warmup) / max(length, 1), 0, 1)
            value = floor + (peak - floor) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        elif options.schedule == "wsd":
            length = options.decay_steps or max(total_steps // 10, 1)
            done = jnp.clip((step - (total_steps - length)) / length, 0, 1)
            value = peak - (peak - floor) * done
        elif options.schedule == "lr_range_test":
            value = floor * (peak / floor) ** (step / max(total_steps - 1, 1))
        else:
            value = jnp.full_like(step, peak)
        return value * jnp.minimum(1.0, (step + 1) / max(warmup, 1))

    return rate
