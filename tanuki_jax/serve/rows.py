"""The rows that the engine works on: what each has so far, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tanuki_jax.data.detokenizer import Detokenizer
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.serve.errors import ApiError
from tanuki_jax.serve.jobs import Job, Piece, ScoredToken
from tanuki_jax.serve.stops import StopFinder

LEAST = -9999.0  # stands for a log-probability of minus infinity, which JSON cannot hold


@dataclass(frozen=True)
class Block:
    """Tokens of n steps on the host: ids [n, B] int32, logprobs [n, B] float32, and top_ids, top_logprobs [n, B, top]."""

    ids: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True)
class PromptScores:
    """Of the S tokens of a prompt: logprobs [S] float32, the first without meaning, and top_ids, top_logprobs [S, top]."""

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(eq=False)
class Row:
    """A job on its way.

    Args:
      send: takes each piece; called by the engine's thread.
      slot: where it lives on the device; -1 = nowhere.
      n_dispatched, n_tokens: steps that were started for it, and tokens that came out of them.
    """

    job: Job
    send: Callable[[Piece], None]
    slot: int = -1
    n_dispatched: int = 0
    n_tokens: int = 0
    n_characters: int = 0
    prompt_scores: tuple[ScoredToken, ...] = ()
    is_done: bool = False
    is_cancelled: bool = False
    detokenizer: Detokenizer | None = None
    stops: StopFinder = field(default_factory=lambda: StopFinder(()))

    @property
    def is_open(self) -> bool:
        """Whether somebody still waits for its tokens."""
        return not self.is_done and not self.is_cancelled

    @property
    def n_missing(self) -> int:
        """Steps that it may still need."""
        return self.job.sampling.max_new_tokens - self.n_dispatched

    def begin(self, tokenizer: Tokenizer) -> None:
        """Gets ready for tokens."""
        self.detokenizer = Detokenizer(tokenizer, self.job.prompt)
        self.stops = StopFinder(self.job.stop_texts)

    def end(self, piece: Piece) -> None:
        """Sends the last piece."""
        self.is_done = True
        self.send(piece)

    def fail(self, error: ApiError) -> None:
        """Ends with an error."""
        self.end(Piece(error=error))

    def take(self, block: Block) -> None:
        """Takes its tokens out of a block, up to its end, and sends them."""
        assert self.detokenizer
        text, finish, count = "", "", 0
        scored: list[ScoredToken] = []
        while not finish and count < len(block.ids):
            token, logprob = int(block.ids[count, self.slot]), float(block.logprobs[count, self.slot])
            if math.isnan(logprob):
                self.fail(ApiError(500, "the model gives no numbers; its weights are damaged", code="damaged_model"))
                return
            if self.job.top is not None:
                tops = block.top_ids[count, self.slot], block.top_logprobs[count, self.slot]
                scored.append(score_token(token, logprob, *tops, self.job.top, self.n_characters))
            count += 1
            is_last = self.n_tokens + count == self.job.sampling.max_new_tokens
            finish = "stop" if token in self.job.sampling.stop else "length" if is_last else ""
            new = "" if finish == "stop" else self.detokenizer.add(token)
            new += self.detokenizer.finish() if finish else ""
            self.n_characters += len(new)
            passed, is_stopped = self.stops.add(new)
            text += passed
            finish = "stop" if is_stopped else finish
            text += self.stops.finish() if finish else ""
        self.n_tokens += count
        self.is_done = bool(finish)
        self.send(Piece(text, count, tuple(scored), self.prompt_scores, finish))
        self.prompt_scores = ()


def score_token(
    token: int, logprob: float, top_ids: np.ndarray, top_logprobs: np.ndarray, top: int, offset: int
) -> ScoredToken:
    """A token with its log-probability, which is the same float wherever the token is among the likeliest."""
    likeliest = [(int(i), _finite(float(p))) for i, p in zip(top_ids, top_logprobs, strict=True)]
    value = next((p for i, p in likeliest if i == token), _finite(logprob))
    tops = likeliest[:top]
    if top and all(i != token for i, _ in tops):
        tops.append((token, value))
    return ScoredToken(token, value, tuple(tops), offset)


def score_prompt(tokenizer: Tokenizer, job: Job, scores: PromptScores) -> tuple[ScoredToken, ...]:
    """The tokens of a prompt with their log-probabilities; the first has none."""
    detokenizer, offset, scored = Detokenizer(tokenizer, ()), 0, []
    top = job.top or 0
    for i, token in enumerate(job.prompt):
        if i == 0:
            scored.append(ScoredToken(token, None, (), 0))
        else:
            scored.append(score_token(token, float(scores.logprobs[i]), scores.top_ids[i], scores.top_logprobs[i], top, offset))
        offset += len(detokenizer.add(token)) if i >= job.n_added else 0
    return tuple(scored)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
