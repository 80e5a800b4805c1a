"""Log-probabilities of texts under a model, and the scores that a recipe reports after every stage."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, model, multihost, ops
from tanuki_jax.data import chat
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.model import Sampling

BATCH = 64  # sequences scored together
CACHE_BYTES = 1 << 16  # tokens scored together, at most


@functools.partial(jax.jit, static_argnums=0)
def _sums(cfg: config.ModelConfig, params: Any, tokens_BS: jax.Array, weights_BS: jax.Array) -> jax.Array:
    """Sums of log-probabilities, and how many tokens are not the likeliest, [2, B]."""
    B, S = tokens_BS.shape
    batch = {
        "tokens": tokens_BS,
        "segment_ids": jnp.ones((B, S), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(S), (B, S)),
    }
    hidden = model.apply(model.dropless(cfg), params, batch).hidden
    scores = ops.token_logprobs(hidden[:, :-1], params["head"], tokens_BS[:, 1:])
    return jnp.stack([(value * weights_BS[:, 1:]).sum(axis=1) for value in (scores.logprob, 1 - scores.correct)])


def sequence_logprobs(
    cfg: config.ModelConfig, params: Any, sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]
) -> list[float]:
    """Sum of the natural log-probabilities of the tokens of each sequence where its mask is 1."""
    return [logprob for logprob, _ in sequence_scores(cfg, params, sequences, masks)]


def sequence_scores(
    cfg: config.ModelConfig, params: Any, sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """The same sum, and whether each of these tokens is the likeliest at its place.

    A first token has nothing before it and is never counted.  Sequences are scored in order of length, padded to a
    power of two; causal attention keeps padding out of the result.
    """
    for number, sequence in enumerate(sequences, 1):
        if sequence and max(sequence) >= cfg.vocab_size:
            raise UserError(
                f"score: text {number} holds id {max(sequence)}, the model has {cfg.vocab_size} rows; "
                "its tokenizer is of another model"
            )
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    result = [(0.0, True)] * len(sequences)
    while order:
        width = 1 << max(4, (len(sequences[order[0]]) - 1).bit_length())
        count = max(1, min(BATCH, CACHE_BYTES // width))
        batch = [i for i in order[:count] if len(sequences[i]) <= width]
        order = order[len(batch) :]
        tokens, weights = np.zeros((count, width), np.int32), np.zeros((count, width), np.float32)
        for row, i in enumerate(batch):
            tokens[row, : len(sequences[i])] = sequences[i]
            weights[row, : len(masks[i])] = masks[i]
        logprobs, missed = multihost.to_host(_sums(cfg, params, tokens, weights))
        for row, i in enumerate(batch):
            result[i] = float(logprobs[row]), bool(missed[row] == 0)
    return result


def score_rows(
    cfg: config.ModelConfig, params: Any, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """`logprob` and `tokens` of each row: over all tokens of `text` after the first, or over the `completion` of `prompt`.

    The text's own tokens alone are used; nothing is put before them.  A completion is encoded together with its prompt,
    and its tokens are those that start inside it.
    """
    sequences, masks = [], []
    for number, row in enumerate(rows, 1):
        if isinstance(row.get("text"), str):
            ids = tokenizer.encode(row["text"])
            mask = [0] + [1] * (len(ids) - 1)
        elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            ids, starts = tokenizer.encode_with_offsets(row["prompt"] + row["completion"])
            mask = [int(i > 0 and start >= len(row["prompt"])) for i, start in enumerate(starts)]
            if row["completion"] and max(starts) < len(row["prompt"]):
                raise UserError(
                    f"score: row {number} has no token that begins in its completion: one token spans the end of the "
                    "prompt and all of it; end the prompt elsewhere"
                )
        else:
            raise UserError(f"score: row {number} has neither text nor prompt and completion")
        sequences.append(ids or [tokenizer.eos])
        masks.append(mask[: len(ids)])
    logprobs = sequence_logprobs(cfg, params, sequences, masks)
    for number, logprob in enumerate(logprobs, 1):
        if not math.isfinite(logprob):
            raise UserError(f"score: the log-probability of row {number} is {logprob}; the model's weights are damaged")
    return [{"logprob": logprob, "tokens": int(sum(mask))} for logprob, mask in zip(logprobs, masks, strict=True)]


def answers(
    cfg: config.ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[dict[str, str]]],
    sampling: Sampling,
    batch_size: int,
) -> list[str]:
    """The model's greedy or sampled answer to each conversation that ends with the user, decoded in batches."""
    prompts = [chat.encode_chat(tokenizer, messages, add_generation_prompt=True)[0] for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    result = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # The last batch is filled up with repetitions, so that all have one shape.
        filled = (chosen * batch_size)[:batch_size] if start else chosen
        for i, ids in zip(chosen, model.generate(cfg, params, [prompts[j] for j in filled], sampling), strict=False):
            result[i] = tokenizer.decode(ids)
    return result


def exact_answers(
    rows: Sequence[dict[str, Any]], given: Sequence[str], correct: Callable[[dict[str, Any], str], bool]
) -> dict[str, Any]:
    """Share of right answers, overall and per family."""
    families: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, given, strict=True):
        families[row["family"]].append(correct(row, answer))
    everything = [right for group in families.values() for right in group]
    return {
        "exact_match": round(float(np.mean(everything)), 4),
        "prompts": len(everything),
        "families": {name: round(float(np.mean(group)), 4) for name, group in sorted(families.items())},
    }


def pair_margins(cfg: config.ModelConfig, params: Any, tokenizer: Tokenizer, pairs: Sequence[dict[str, Any]]) -> np.ndarray:
    """Log-probability of the chosen answer minus that of the rejected one, for each pair, float64."""
    encoded = [side for pair in pairs for side in chat.encode_pair(tokenizer, pair)]
    logprobs = sequence_logprobs(cfg, params, [ids for ids, _ in encoded], [mask for _, mask in encoded])
    return np.array(logprobs[::2]) - np.array(logprobs[1::2])
