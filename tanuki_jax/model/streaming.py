"""Sampling token by token: what `generate` gives for one prompt, each token as soon as it is chosen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config
from tanuki_jax.model.attention import Cache
from tanuki_jax.model.generate import Sampling, check_prompts, choose, row_keys, row_numbers
from tanuki_jax.model.layer_groups import Params
from tanuki_jax.model.transformer import decode, empty_cache

CHUNK = 64  # tokens of a prompt that are read together


def stream(cfg: config.ModelConfig, params: Params, prompt: Sequence[int], sampling: Sampling, seed: int = 0) -> Iterator[int]:
    """Yields the new token ids of a prompt, without the stop token.

    Two programs are compiled for each size of cache, a power of two; neither depends on the lengths of prompt and answer.
    """
    check_prompts(cfg, [prompt])
    length = len(prompt)
    key_1 = row_keys(jax.random.key(np.int64(seed).astype(np.int32)), jnp.asarray(row_numbers([prompt])))
    step_sampling = dataclasses.replace(sampling, max_new_tokens=0, stop=())  # what the compiled program depends on
    cache = empty_cache(cfg, 1, 1 << (max(CHUNK, length + sampling.max_new_tokens) - 1).bit_length())
    tokens = np.zeros(-(-length // CHUNK) * CHUNK, np.int32)
    tokens[:length] = prompt
    for start in range(0, len(tokens), CHUNK):
        hidden_1SD, cache = _prefill(cfg, params, cache, tokens[None, start : start + CHUNK], start)
    hidden_1D = hidden_1SD[:, (length - 1) % CHUNK]
    for step in range(sampling.max_new_tokens):
        token_1, hidden_1D, cache = _step(cfg, step_sampling, params, cache, hidden_1D, key_1, step, length)
        token = int(token_1[0])
        if token in sampling.stop:
            return
        yield token


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(
    cfg: config.ModelConfig, params: Params, cache: Cache, tokens_1S: jax.Array, start: jax.Array
) -> tuple[jax.Array, Cache]:
    """Hidden states [1, S, D] of the tokens at `start` and after it, and the cache with them in it."""
    return decode(cfg, params, cache, tokens_1S, start + jnp.arange(tokens_1S.shape[1])[None])


# Eight arguments: each is a separate argument of the compiled program.
@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def _step(
    cfg: config.ModelConfig,
    sampling: Sampling,
    params: Params,
    cache: Cache,
    hidden_1D: jax.Array,
    key_1: jax.Array,
    step: jax.Array,
    length: jax.Array,
) -> tuple[jax.Array, jax.Array, Cache]:
    """Chooses the new token number `step` after a prompt of `length`; its id [1], its hidden state [1, D], the cache."""
    token_1 = choose(sampling, params, key_1, hidden_1D, step)
    hidden_11D, cache = decode(cfg, params, cache, token_1[:, None], (length + step)[None, None])
    return token_1, hidden_11D[:, 0], cache
