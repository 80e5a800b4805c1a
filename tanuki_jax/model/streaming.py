"""Sampling token by token: what `generate` gives for one prompt, each token as soon as it is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tanuki_jax import config
from tanuki_jax.model import slots
from tanuki_jax.model.generate import check_prompts, pad_prompts, power_of_two
from tanuki_jax.model.layer_groups import Params
from tanuki_jax.model.sampling import Sampling, request_key, stack

MIN_WIDTH = 64  # of a prompt, padding included


def stream(
    cfg: config.ModelConfig, params: Params | slots.Weights, prompt: Sequence[int], sampling: Sampling, seed: int = 0
) -> Iterator[int]:
    """Yields the new token ids of a prompt, without the stop token.

    One program is compiled for each power of two of the prompt's length and of the whole text's, one more for the latter.
    """
    check_prompts(cfg, [prompt])
    weights = slots.unstack(cfg, params) if isinstance(params, dict) else params
    tokens, lengths = pad_prompts([prompt], power_of_two(max(MIN_WIDTH, len(prompt))))
    state = slots.empty(cfg, 1, power_of_two(max(tokens.shape[1], len(prompt) + sampling.max_new_tokens)))
    admitted = slots.Prompts(tokens, lengths, np.zeros(1, np.int32), stack([sampling]), request_key(seed, prompt)[None])
    state = slots.admit(cfg, weights, state, admitted)
    for _ in range(sampling.max_new_tokens):
        state, chosen = slots.step(cfg, weights, state, 1)
        token = int(chosen.ids[0, 0])
        if token in sampling.stop:
            return
        yield token
