"""Which characters of a rendered conversation the assistant says: from behind the prompt to the token that ends its turn."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tanuki_jax.data import traced
from tanuki_jax.data.rendering import Messages, render_chat
from tanuki_jax.data.tokenizer import Span, Tokenizer
from tanuki_jax.data.traced import Traced
from tanuki_jax.errors import UserError

Placed = tuple[Span, int]  # a token and its characters


class TurnFormat(NamedTuple):
    """How a template writes a turn of the assistant, as a few example conversations show it."""

    prompts: tuple[str, ...]  # what add_generation_prompt adds; and as much of it as stands before an answer, too
    stop_ids: tuple[int, ...]  # what ends an answer or a tool call, eos included; ascending


USER: dict[str, Any] = {"role": "user", "content": "alpha"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "beta"}
CALLS = [
    {"type": "function", "function": {"name": "gamma", "arguments": arguments}}
    for arguments in ({"delta": "1"}, '{"delta": 1}')
]
RESULT = {"role": "tool", "name": "gamma", "content": "epsilon"}


@functools.lru_cache(maxsize=8)
def turn_format(tokenizer: Tokenizer) -> TurnFormat:
    """How the tokenizer's template writes the assistant's turns."""
    prompted, unprompted = (str.__str__(_example(tokenizer, [USER], prompt=prompt) or "") for prompt in (True, False))
    answered = str.__str__(_example(tokenizer, [USER, ANSWER]) or "")
    shared = len(_common_prefix(prompted, unprompted))
    prompts = (prompted[shared:], _common_prefix(prompted, answered)[shared:])
    calls: list[dict[str, Any]] = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in CALLS]
    stops = {tokenizer.eos, *tokenizer.generation_eos}
    for said, more in ((ANSWER, [USER, ANSWER]), *((call, [RESULT, ANSWER]) for call in calls)):
        last = _tail(_example(tokenizer, [USER, said]), 1)
        between = _tail(_example(tokenizer, [USER, said, *more]), 1)
        stops.update(_end_of_turn(tokenizer, last, between))
    return TurnFormat(tuple(prompt for prompt in prompts if prompt.strip()), tuple(sorted(stops)))


def _end_of_turn(tokenizer: Tokenizer, last: str, between: str) -> list[int]:
    """The token that ends a turn, from what follows it at the end of a conversation and before the next message.

    That is the last special token of what both have in common; else the last at the end of a conversation; else (GLM-4) the
    next message's first.  Where none is special, another added token.
    """
    for known in (tokenizer.special, tokenizer.added):
        shared, ending, middle = (_controls(tokenizer, t, known) for t in (_common_prefix(last, between), last, between))
        if found := shared[-1:] or ending[-1:] or middle[:1]:
            return [token for _, token in found]
    return []


def _example(tokenizer: Tokenizer, messages: Messages, prompt: bool = False) -> Traced | None:
    try:
        return render_chat(tokenizer, messages, prompt, None)
    except UserError:
        return None


def _tail(rendered: Traced | None, number: int) -> str:
    """What the template itself writes after the last character of a message, up to the next one or the end."""
    spans = [] if rendered is None else [(span, run.source) for span, run in traced.spans_of(rendered) if run.source]
    stop = max((span[1] for span, source in spans if source[0] == number and _speaks(source)), default=None)
    if rendered is None or stop is None:
        return ""
    after, following = next(
        ((a, source[0]) for (a, _), source in spans if a >= stop and source[0] != number), (len(rendered), number + 1)
    )
    return str.__str__(rendered)[stop:after] if following == number + 1 else ""


def _common_prefix(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def _controls(tokenizer: Tokenizer, text: str, known: Mapping[str, int]) -> list[tuple[Span, int]]:
    """Which of the known tokens a template's text spells, and where; white space (Gemma has tokens of it) is none."""
    tokens = set(known.values())
    ids, spans = tokenizer.encode_rendered(text)
    return [(span, token) for token, span in zip(ids, spans, strict=True) if token in tokens and text[slice(*span)].strip()]


def _speaks(source: traced.Source) -> bool:
    """Whether characters are of what a message says, rather than its role or name."""
    return source[1:2] not in (("role",), ("name",), ("weight",))


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether what a message says is to be learnt: its weight is not 0."""
    return message.get("weight") is None or bool(message["weight"])


def trained_spans(
    tokenizer: Tokenizer, rendered: Traced, messages: Messages, turn: TurnFormat, added: Sequence[Placed]
) -> list[Span]:
    """The characters of the rendering that are trained, ascending.  added: its special and other added tokens."""
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and is_trained(m)]
    if any(run.generated for run in traced.runs_of(rendered)):
        return _marked_spans(rendered, trained, turn, added)
    text = str.__str__(rendered)
    sourced = [_Part(*span, run.source, run.offset) for span, run in traced.spans_of(rendered) if run.source]
    spoken = {part.source[0] for part in sourced if part.stop > part.start and _speaks(part.source)}
    sourced = [part for part in sourced if part.stop > part.start or part.source[0] not in spoken]
    groups = [list(group) for _, group in itertools.groupby(sourced, key=lambda part: part.source[0])]
    result: list[Span] = []
    before = 0
    for group, after in zip(groups, [*(group[0].start for group in groups[1:]), len(text)], strict=True):
        number = group[0].source[0]
        if number in trained:
            result += _turns(tokenizer, text, messages[int(number)], group, before, after, turn, added)
        before = group[-1].stop
    return result


class _Part(NamedTuple):
    """Characters of a rendering that come from one text."""

    start: int
    stop: int
    source: traced.Source
    offset: int | None


def _turns(
    tokenizer: Tokenizer,
    text: str,
    message: Mapping[str, Any],
    parts: Sequence[_Part],
    before: int,
    after: int,
    turn: TurnFormat,
    added: Sequence[Placed],
) -> list[Span]:
    """The turn that a message is in text[before:after]; several, where the template ends one and prompts for the next."""
    stops = [tokenizer.piece(token) for token in turn.stop_ids]
    result: list[Span] = []
    begun: int | None = None
    for part, following in zip(parts, [*(p.start for p in parts[1:]), after], strict=True):
        if begun is None and not _speaks(part.source):
            continue
        if begun is None:
            begun = _start(text, message, part, before, turn, added)
        between = text[part.stop : following]
        found = min(((at, at + len(stop)) for stop in stops if (at := between.find(stop)) >= 0), default=None)
        if found:
            result.append((begun, part.stop + found[1]))
            begun, before = None, part.stop + found[1]
            if not any(prompt in text[before:following] for prompt in turn.prompts):
                return result
    if begun is not None:  # no token that ends turns: the next message's first, which a model that is trained on it stops at
        special = set(tokenizer.special.values())
        stop = parts[-1].stop
        result.append((begun, next((b for (a, b), token in added if stop <= a < after and token in special), stop)))
    return result


def _start(text: str, message: Mapping[str, Any], part: _Part, before: int, turn: TurnFormat, added: Sequence[Placed]) -> int:
    """Where a turn begins to be trained: behind the generation prompt, or at the first of what is said."""
    for prompt in turn.prompts:
        if (at := text.rfind(prompt, before, part.start)) >= 0:
            return at + len(prompt)
    whole, start, offset = message.get(str(part.source[1])), part.start, part.offset
    if not isinstance(whole, str) or not offset:
        return start
    while offset > 0 and start > before and text[start - 1] == whole[offset - 1]:
        start, offset = start - 1, offset - 1  # <think> of a content that the template has taken apart and put together again
    start = next((b for (a, b), _ in added if a < start < b), start)
    return start + len(text[start : part.start]) - len(text[start : part.start].lstrip())


def _marked_spans(rendered: Traced, trained: Sequence[int], turn: TurnFormat, added: Sequence[Placed]) -> list[Span]:
    """What {% generation %} marks, and the token that ends the turn where it follows at once."""
    text = str.__str__(rendered)
    stops = [span for span, token in added if token in turn.stop_ids]
    result: list[Span] = []
    for block, group in itertools.groupby(traced.spans_of(rendered), key=lambda part: part[1].generated):
        parts = list(group)
        start, stop = parts[0][0][0], parts[-1][0][1]
        owners = {run.source[0] for _, run in parts if run.source}
        if block and trained and (not owners or owners.intersection(trained)):
            result.append((start, stop))
        elif not block and result and result[-1][1] == start:
            ended = any(result[-1][0] <= a and not text[b:start].strip() for a, b in stops if b <= start)
            following = next(((a, b) for a, b in stops if start <= a < stop and not text[start:a].strip()), None)
            if following and not ended:
                result[-1] = (result[-1][0], following[1])
    return result
