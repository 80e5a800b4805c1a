"""Log-probabilities of texts under a model, and the scores that a recipe reports after every stage."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, model, multihost, ops
from tanuki_jax.data import chat
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.model import Sampling
from tanuki_jax.model.transformer import Params

MAX_SEQUENCES = 64  # scored together
MAX_TOKENS = 1 << 16  # scored together, padding included

Row: TypeAlias = Mapping[str, Any]  # a held-out prompt or a pair, as synth makes them
Messages: TypeAlias = Sequence[dict[str, str]]  # a conversation


class ScoredRow(TypedDict):
    """The sum of the natural log-probabilities, and the number of tokens that count."""

    logprob: float
    tokens: int


@functools.partial(jax.jit, static_argnums=0)
def _score_batch(cfg: config.ModelConfig, params: Params, tokens_BS: jax.Array, weights_BS: jax.Array) -> jax.Array:
    """Sums of log-probabilities, and numbers of tokens that are not the likeliest, [2, B]."""
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
    cfg: config.ModelConfig, params: Params, sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]
) -> list[float]:
    """Sum of the natural log-probabilities of the tokens of each sequence where its mask is 1."""
    return [logprob for logprob, _ in sequence_scores(cfg, params, sequences, masks)]


def sequence_scores(
    cfg: config.ModelConfig, params: Params, sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """The same sum, and whether every one of these tokens is the likeliest at its position.

    The first token has no context and is never counted.  Sequences are scored in order of length, padded to a
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
        count = max(1, min(MAX_SEQUENCES, MAX_TOKENS // width))
        batch = [i for i in order[:count] if len(sequences[i]) <= width]
        order = order[len(batch) :]
        tokens, weights = np.zeros((count, width), np.int32), np.zeros((count, width), np.float32)
        for row, i in enumerate(batch):
            tokens[row, : len(sequences[i])] = sequences[i]
            weights[row, : len(masks[i])] = masks[i]
        logprobs, missed = multihost.to_host(_score_batch(cfg, params, tokens, weights))
        for row, i in enumerate(batch):
            result[i] = float(logprobs[row]), bool(missed[row] == 0)
    return result


def score_rows(
    cfg: config.ModelConfig, params: Params, tokenizer: Tokenizer, rows: Sequence[Mapping[str, object]]
) -> list[ScoredRow]:
    """`logprob` and `tokens` of each row: over all tokens of `text` after the first, or over the `completion` of `prompt`.

    The text's own tokens alone are used; nothing is put before them.  A completion is encoded together with its prompt,
    and its tokens are those that start inside it.
    """
    sequences, masks = [], []
    for number, row in enumerate(rows, 1):
        text, prompt, completion = row.get("text"), row.get("prompt"), row.get("completion")
        if isinstance(text, str):
            ids = tokenizer.encode(text)
            mask = [0] + [1] * (len(ids) - 1)
        elif isinstance(prompt, str) and isinstance(completion, str):
            ids, starts = tokenizer.encode_with_offsets(prompt + completion)
            mask = [int(i > 0 and start >= len(prompt)) for i, start in enumerate(starts)]
            if completion and max(starts) < len(prompt):
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
    params: Params,
    tokenizer: Tokenizer,
    conversations: Sequence[Messages],
    sampling: Sampling,
    batch_size: int,
) -> list[str]:
    """The model's greedy or sampled answer to each conversation that ends with the user, decoded in batches."""
    prompts = [chat.encode_chat(tokenizer, messages, add_generation_prompt=True)[0] for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    result = [""] * len(prompts)
    weights = model.slots.unstack(cfg, params)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # The last batch is padded with repetitions, so that all have one shape.
        filled = (chosen * batch_size)[:batch_size] if start else chosen
        for i, ids in zip(chosen, model.generate(cfg, weights, [prompts[j] for j in filled], sampling), strict=False):
            result[i] = tokenizer.decode(ids)
    return result


def exact_answers(rows: Sequence[Row], responses: Sequence[str], correct: Callable[[Row, str], bool]) -> dict[str, Any]:
    """`exact_match`, the share of right answers, of how many `prompts`, and the share of each of the `families`."""
    families: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, responses, strict=True):
        families[row["family"]].append(correct(row, answer))
    everything = [right for group in families.values() for right in group]
    return {
        "exact_match": round(float(np.mean(everything)), 4),
        "prompts": len(everything),
        "families": {name: round(float(np.mean(group)), 4) for name, group in sorted(families.items())},
    }


def pair_margins(cfg: config.ModelConfig, params: Params, tokenizer: Tokenizer, pairs: Sequence[Row]) -> np.ndarray:
    """Log-probability of the chosen answer minus that of the rejected one, for each pair, float64."""
    encoded = [side for pair in pairs for side in chat.encode_pair(tokenizer, pair)]
    logprobs = sequence_logprobs(cfg, params, [ids for ids, _ in encoded], [mask for _, mask in encoded])
    return np.array(logprobs[::2]) - np.array(logprobs[1::2])
