"""Sampling from the model: prefill, then one token at a time, all rows of a batch together."""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, multihost
from tanuki_jax.errors import UserError
from tanuki_jax.model.attention import Cache
from tanuki_jax.model.layer_groups import Params
from tanuki_jax.model.transformer import decode, empty_cache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.  temperature 0 is greedy; top_p 1 keeps the whole distribution."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()  # token ids that end a row; not part of the result


def generate(
    cfg: config.ModelConfig, params: Params, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int = 0
) -> list[list[int]]:
    """Continues each prompt; returns the new token ids without the stop token.

    Prompts are padded to a power of two, so that few shapes are compiled.  A prompt's random numbers depend only on the seed
    and on the prompt, not on the other rows; of equal prompts in one batch each has its own.
    """
    if not prompts:
        return []
    check_prompts(cfg, prompts)
    lengths = np.array([len(p) for p in prompts], np.int32)
    width = 1 << max(4, int(lengths.max() - 1).bit_length())
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    out = multihost.to_host(
        _generate(cfg, sampling, params, tokens, lengths, np.int64(seed).astype(np.int32), row_numbers(prompts))
    )
    stop = set(sampling.stop)
    return [[int(t) for t in row[: next((i for i, t in enumerate(row) if int(t) in stop), len(row))]] for row in out]


def check_prompts(cfg: config.ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Raises a UserError where a prompt is empty, or of another vocabulary."""
    if not all(len(p) for p in prompts):
        raise UserError("generate: a prompt is empty; give at least one token")
    if (largest := max(map(max, prompts))) >= cfg.vocab_size:
        raise UserError(
            f"generate: the prompt holds id {largest}, the model has {cfg.vocab_size} rows; its tokenizer is of another model"
        )


def row_numbers(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """The checksum of each prompt, and how many equal ones come before it, [B, 2] uint32."""
    counts: Counter[bytes] = Counter()
    numbers = []
    for prompt in prompts:
        data = np.asarray(prompt, np.int64).tobytes()
        numbers.append((zlib.crc32(data), counts[data]))
        counts[data] += 1
    return np.array(numbers, np.uint32)


class _State(NamedTuple):
    """Between two tokens: how many there are, the hidden states that choose the next, and which rows have stopped."""

    step: jax.Array
    hidden_BD: jax.Array
    cache: Cache
    out_BT: jax.Array
    done_B: jax.Array


# Seven arguments: each is a separate argument of the compiled program.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    cfg: config.ModelConfig,
    sampling: Sampling,
    params: Params,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
    seed: jax.Array,
    numbers_B2: jax.Array,
) -> jax.Array:
    """New tokens [B, max_new_tokens]; what follows a row's stop token is meaningless."""
    B, P = tokens_BP.shape
    keys_B = row_keys(jax.random.key(seed), numbers_B2)
    limit = sampling.max_new_tokens
    cache = empty_cache(cfg, B, P + limit)
    positions_BP = jnp.broadcast_to(jnp.arange(P), (B, P))
    hidden_BPD, cache = decode(cfg, params, cache, tokens_BP, positions_BP)
    last_BD = hidden_BPD[jnp.arange(B), lengths_B - 1]
    stop = jnp.array(sampling.stop or (-1,))

    def is_running(state: _State) -> jax.Array:
        return (state.step < limit) & ~state.done_B.all()

    def add_token(state: _State) -> _State:
        step, hidden_BD, cache, out_BT, done_B = state
        token_B = choose(sampling, params, keys_B, hidden_BD, step)
        out_BT = out_BT.at[:, step].set(token_B)
        done_B = done_B | (token_B[:, None] == stop).any(axis=1)
        hidden_B1D, cache = decode(cfg, params, cache, token_B[:, None], (lengths_B + step)[:, None])
        return _State(step + 1, hidden_B1D[:, 0], cache, out_BT, done_B)

    state = _State(jnp.int32(0), last_BD, cache, jnp.zeros((B, limit), jnp.int32), jnp.zeros((B,), bool))
    return jax.lax.while_loop(is_running, add_token, state).out_BT


def row_keys(key: jax.Array, numbers_B2: jax.Array) -> jax.Array:
    """The random key of each row."""
    return jax.vmap(lambda numbers_2: jax.random.fold_in(jax.random.fold_in(key, numbers_2[0]), numbers_2[1]))(numbers_B2)


def choose(sampling: Sampling, params: Params, keys_B: jax.Array, hidden_BD: jax.Array, step: jax.Array) -> jax.Array:
    """The new token number `step` of each row, [B] int32, from the hidden states of the tokens before it."""
    head_DV = params["head"].astype(hidden_BD.dtype)
    logits_BV = jnp.einsum("BD,DV->BV", hidden_BD, head_DV, preferred_element_type=jnp.float32)
    if sampling.temperature == 0:
        return logits_BV.argmax(axis=-1).astype(jnp.int32)
    logits_BV = _nucleus(logits_BV / sampling.temperature, sampling.top_p)
    step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    return jax.vmap(jax.random.categorical)(step_keys_B, logits_BV).astype(jnp.int32)


def _nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Keeps the likeliest tokens whose probabilities reach top_p (Holtzman et al. 2020)."""
    if top_p >= 1:
        return logits_BV
    sorted_BV = jnp.sort(logits_BV, axis=-1)[:, ::-1]
    before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
    threshold_B1 = jnp.where(before_BV < top_p, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
