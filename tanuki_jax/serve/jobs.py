"""What the server's HTTP side and its engine tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tanuki_jax.model import Sampling
from tanuki_jax.serve.errors import ApiError

TOP = 20  # likeliest tokens whose log-probabilities are computed where any are asked for


@dataclass(frozen=True)
class Job:
    """One row to make.

    Args:
      sampling: its stop tokens are not part of the row's text.
      sample: number of this row among those with the same prompt and seed.
      top: how many of the likeliest tokens are told with each token; None = not even its own log-probability.
      score_prompt: the log-probabilities of the prompt's tokens are asked for, too.
      n_added: tokens that the tokenizer has put before the prompt's text.
      streams: somebody reads while it is made.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int = 0
    sample: int = 0
    stop_texts: tuple[str, ...] = ()
    top: int | None = None
    score_prompt: bool = False
    n_added: int = 0
    streams: bool = False


class ScoredToken(NamedTuple):
    """A token, and what the model thought of it and of others at its place, in natural logarithms."""

    token: int
    logprob: float | None  # None for the first of a prompt
    tops: tuple[tuple[int, float], ...]  # likeliest first; the token itself is among them with the same float
    offset: int  # characters of the answer that come before it


class Piece(NamedTuple):
    """What a row has gained."""

    text: str = ""
    n_tokens: int = 0
    scored: tuple[ScoredToken, ...] = ()
    prompt: tuple[ScoredToken, ...] = ()
    finish: str = ""  # "stop" or "length" with the last piece
    error: ApiError | None = None  # the last piece, too
