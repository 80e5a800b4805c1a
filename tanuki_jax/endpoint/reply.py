"""What a server sent with status 200: an answer, or one of the things that only look like one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tanuki_jax.endpoint.job import Answer, Refused

OVERFLOW = re.compile(
    r"context.{0,20}(length|window|size)|max_model_len|maximum.{0,40}tokens|too many tokens|reduce the length|"
    r"prompt.{0,40}too long|longer than.{0,60}(context|model)",
    re.IGNORECASE | re.DOTALL,
)


SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair is no text; servers send it where a token is half a character


class Failure(Exception):
    """A try that brought no answer.

    kind: unreachable, time_out, cut_body, server_error (5xx), busy (408, 409, 425), rate_limit (429), html, bad_json,
      no_choices, empty, bad_request (other 4xx).
    retry_after: seconds that the server asks to wait for.
    usage: tokens that were spent.
    """

    def __init__(
        self, kind: str, message: str, retry_after: float | None = None, usage: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.retry_after, self.usage = kind, retry_after, usage or {}


def read(value: object) -> Answer:
    """The answer in a response's JSON; both of /chat/completions and /completions.

    Raises:
      Failure: it is none.
      Refused: the model or its provider refused.
    """
    if not isinstance(value, dict):  # the client gives other content types than JSON as text
        start = str(value).lstrip()[:60].lower()
        kind = "html" if start.startswith(("<!doctype", "<html", "<")) else "bad_json"
        raise Failure(kind, f"status 200 with a body that is no answer ({start!r})")
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Failure("no_choices", f"status 200 without choices ({error_message(value)})")
    choice: dict[str, Any] = choices[0]
    usage, finish = _usage(value), str(choice.get("finish_reason") or "stop")
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    refusal = message.get("refusal") if isinstance(message, dict) else None
    if finish == "content_filter" or (refusal and not text):
        raise Refused("refused", {"message": str(refusal or finish), "usage": usage})
    if not isinstance(text, str) or not text.strip():
        if finish != "length" or not isinstance(text, str | None):
            raise Failure("empty", f"status 200 without text (finish_reason {finish})", usage=usage)
        text = ""  # a model that thinks was cut while it did
    text = SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
    return Answer(text, finish, usage, str(value.get("model") or ""), _logprobs(choice.get("logprobs")))


def model_names(value: object) -> list[str] | None:
    """The names in a list of models; None where it is none."""
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, list) or not all(isinstance(entry, dict) and "id" in entry for entry in data):
        return None
    return [str(entry["id"]) for entry in data]


def error_message(body: object) -> str:
    """The message of an error's body."""
    if not isinstance(body, dict):
        return ""
    error = body.get("error", body)
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return str(message or "")


def is_overflow(message: str) -> bool:
    """Whether an error says that a prompt is longer than the model's context."""
    return bool(OVERFLOW.search(message))


def _usage(value: Mapping[str, Any]) -> dict[str, int]:
    """Prompt and completion tokens, where the server reports both."""
    usage = value.get("usage")
    names = ("prompt_tokens", "completion_tokens")
    if not isinstance(usage, dict) or not all(isinstance(usage.get(name), int) for name in names):
        return {}
    return {name: usage[name] for name in names}


def _logprobs(value: object) -> dict[str, float]:
    """Log-probabilities of the likeliest first tokens."""
    if not isinstance(value, dict):
        return {}
    content, tops = value.get("content"), value.get("top_logprobs")
    if isinstance(content, list) and content:  # /chat/completions
        listed = content[0].get("top_logprobs") or [content[0]]
        return {SURROGATE.sub("?", entry["token"]): float(entry["logprob"]) for entry in reversed(listed)}
    first = tops[0] if isinstance(tops, list) and tops else None  # /completions
    return {token: float(number) for token, number in first.items()} if isinstance(first, dict) else {}
