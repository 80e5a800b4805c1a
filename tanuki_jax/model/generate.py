"""Sampling from the model: prefill, then one token at a time, all rows of a batch together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, multihost
from tanuki_jax.errors import UserError
from tanuki_jax.model import slots
from tanuki_jax.model.layer_groups import Params
from tanuki_jax.model.sampling import Choices, Sampling, int32_seed, row_keys, row_numbers, stack

MIN_WIDTH = 16  # of a batch of prompts, padding included
STOP_IDS = 8  # with fewer than this many stop ids their number changes no program


def generate(
    cfg: config.ModelConfig,
    params: Params | slots.Weights,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int = 0,
) -> list[list[int]]:
    """Continues each prompt; returns the new token ids without the stop token.

    A program is compiled for each number of prompts and each power of two of the longest prompt and the longest row, and one
    more for other choices than the likeliest token; their values change none.  A prompt's random numbers depend only on the
    seed and on the prompt, not on the other rows; of equal prompts in one batch each has its own (`sampling.request_key`).
    """
    if not prompts:
        return []
    check_prompts(cfg, prompts)
    if sampling.max_new_tokens < 1:
        return [[] for _ in prompts]
    weights = slots.unstack(cfg, params) if isinstance(params, dict) else params
    longest = max(map(len, prompts))
    tokens, lengths = pad_prompts(prompts, power_of_two(max(MIN_WIDTH, longest)))
    length = power_of_two(max(tokens.shape[1], longest + sampling.max_new_tokens))
    stop = np.full(power_of_two(max(STOP_IDS, len(sampling.stop))), -1, np.int32)
    stop[: len(sampling.stop)] = sampling.stop
    out_TB = multihost.to_host(
        _generate(
            *(cfg, length, sampling.greedy, weights, tokens, lengths, stack([sampling] * len(prompts))),
            *(int32_seed(seed), row_numbers(prompts), np.int32(sampling.max_new_tokens), stop),
        )
    )
    ends = set(sampling.stop)
    rows = out_TB[: sampling.max_new_tokens].T
    return [[int(t) for t in row[: next((i for i, t in enumerate(row) if int(t) in ends), len(row))]] for row in rows]


def check_prompts(cfg: config.ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Raises a UserError where a prompt is empty, or of another vocabulary."""
    if not all(len(p) for p in prompts):
        raise UserError("generate: a prompt is empty; give at least one token")
    if (largest := max(map(max, prompts))) >= cfg.vocab_size:
        raise UserError(
            f"generate: the prompt holds id {largest}, the model has {cfg.vocab_size} rows; its tokenizer is of another model"
        )


def pad_prompts(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompts as rows [R, width], padded at the end, and their lengths [R]; int32."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


class _State(NamedTuple):
    """Between two tokens: how many there are, the slots, the tokens, and which rows have stopped."""

    step: jax.Array
    slots: slots.Slots
    out_TB: jax.Array
    done_B: jax.Array


# Eleven arguments: each is a separate argument of the compiled program.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    cfg: config.ModelConfig,
    length: int,
    greedy: bool,
    weights: slots.Weights,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
    choices: Choices,
    seed: jax.Array,
    numbers_B2: jax.Array,
    limit: jax.Array,
    stop: jax.Array,
) -> jax.Array:
    """New tokens [length, B], up to `limit` of each row; what follows a row's stop token is meaningless."""
    rows = len(tokens_BP)
    keys_B = row_keys(seed, numbers_B2)
    start = slots.empty(cfg, rows, length)
    start = slots.admit(cfg, weights, start, slots.Prompts(tokens_BP, lengths_B, jnp.arange(rows), choices, keys_B))

    def is_running(state: _State) -> jax.Array:
        return (state.step < limit) & ~state.done_B.all()

    def add_token(state: _State) -> _State:
        new_slots, tokens = slots.next_token(cfg, weights, state.slots, greedy=greedy)
        done_B = state.done_B | (tokens.ids[:, None] == stop).any(axis=1)
        return _State(state.step + 1, new_slots, state.out_TB.at[state.step].set(tokens.ids), done_B)

    state = _State(jnp.int32(0), start, jnp.zeros((length, rows), jnp.int32), jnp.zeros(rows, bool))
    return jax.lax.while_loop(is_running, add_token, state).out_TB
