"""What a model is asked, what it answers, and the ways in which a row comes to nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from tanuki_jax.config.synthesis import Endpoint

SAMPLING = {"temperature", "top_p", "max_tokens", "repetition_penalty", "stop", "logprobs"}


class Drop(Exception):
    """A row that is left out on purpose; counted by its reason and written to dropped.jsonl.

    A chain raises it for its whole item, or returns it among its rows for one of them.

    row: what is left out, where there is something to look at.
    """

    def __init__(self, reason: str, row: Mapping[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.reason, self.row = reason, row


class NoAnswer(Drop):
    """A job that has no answer, and would have none the next time: it is not asked again.

    A chain may catch it; else its item is dropped for the reason `overflow`, `refused` or `empty`.
    """


class Overflow(NoAnswer):
    """The prompt does not fit into the model's context."""


class Refused(NoAnswer):
    """The model or its provider refused: a refusal in the answer, or its content filter."""


class Empty(NoAnswer):
    """The answer is empty, several times."""


NO_ANSWER: dict[str, type[NoAnswer]] = {"overflow": Overflow, "refused": Refused, "empty": Empty}


class Failed(Exception):
    """A job whose tries are used up; its item is not done, and is tried again by the next run.  Not for a chain to catch."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    text: str
    finish_reason: str = "stop"  # length: cut at max_tokens
    usage: Mapping[str, int] = field(default_factory=dict)  # prompt_tokens, completion_tokens
    model: str = ""  # as the server calls it
    logprobs: Mapping[str, float] = field(default_factory=dict)  # of the likeliest first tokens, where they were asked for


@dataclass(frozen=True)
class Job:
    """One question to a model.

    messages: dicts with `role` and `content`; or, in their place,
    prompt: text that the model goes on with, without a chat template (/completions).
    role: which of the run's clients is asked: generator, judge, ...
    step: its name within the chain, q1; sample: its number, where one step asks several times.
    template: version or hash of the template that the messages are made with.
    item: the seed item's id; empty = the id of the item that the chain was called with.
    sampling: in place of the endpoint's temperature, top_p, max_tokens, repetition_penalty; also `stop` (a list of strings)
      and `logprobs` (the number of likeliest first tokens that the answer reports).
    """

    messages: Sequence[Mapping[str, str]] = ()
    step: str = ""
    role: str = "generator"
    sample: int = 0
    template: str = ""
    item: str = ""
    prompt: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, endpoint: Endpoint) -> dict[str, Any]:
        """The sampling that is asked for: the endpoint's, with the job's in its place."""
        if unknown := self.sampling.keys() - SAMPLING:
            raise ValueError(f"step {self.step}: sampling has no {', '.join(sorted(unknown))}")
        names = ("temperature", "top_p", "max_tokens", "repetition_penalty")
        merged = {name: getattr(endpoint, name) for name in names} | dict(self.sampling)
        if merged["repetition_penalty"] == 1:  # which not every server knows
            del merged["repetition_penalty"]
        return {name: value for name, value in merged.items() if value not in (None, [], ())}

    def id(self, recipe: str, endpoint: Endpoint) -> str:
        """Sixteen hexadecimal digits, the same whenever the same is asked; recipe: the fingerprint of the recipe."""
        asked = asdict(self) | {"recipe": recipe, "model": endpoint.model, "sampling": self.settings(endpoint)}
        return hashlib.sha256(_canonical(asked)).hexdigest()[:16]

    def prompt_sha256(self) -> str:
        """Of the messages or the prompt."""
        return hashlib.sha256(_canonical(self.prompt or self.messages)).hexdigest()

    def text(self) -> str:
        """All that the model reads, without the chat template."""
        return self.prompt or "\n".join(message["content"] for message in self.messages)


Ask: TypeAlias = Callable[[Job], Awaitable[Answer]]
Chain: TypeAlias = Callable[[Any, Ask], Awaitable[Sequence[Mapping[str, Any] | Drop]]]


def seed_of(job_id: str) -> int:
    """The seed of a job's request."""
    return int(job_id, 16) & 0x7FFFFFFF


def estimate_tokens(text: str) -> int:
    """Tokens of a text, roughly: four ASCII characters are one, and so is any other character."""
    others = sum(character > "\x7f" for character in text)
    return (len(text) - others + 3) // 4 + others


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
