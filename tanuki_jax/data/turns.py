"""Which characters of a rendered conversation are trained: from the generation prompt to the token that ends a turn."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from tanuki_jax.data import traced
from tanuki_jax.data.conversation import Message, Messages, RowFields
from tanuki_jax.data.rendering import render_chat
from tanuki_jax.data.tokenizer import Span, Tokenizer
from tanuki_jax.data.traced import Traced
from tanuki_jax.errors import UserError

Placed: TypeAlias = tuple[Span, int]  # a token and its characters


class TurnFormat(NamedTuple):
    """How a template writes a turn of the assistant, read off a few example conversations."""

    prompts: tuple[str, ...]  # what add_generation_prompt adds, and the part of it that also stands before an answer
    stop_ids: tuple[int, ...]  # the tokens that end an answer or a tool call, eos included; ascending


USER: Message = {"role": "user", "content": "alpha"}
ANSWER: Message = {"role": "assistant", "content": "beta"}
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
    calls: list[Message] = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in CALLS]
    stops = {tokenizer.eos, *tokenizer.generation_eos}
    for reply, more in ((ANSWER, [USER, ANSWER]), *((call, [RESULT, ANSWER]) for call in calls)):
        last = _tail(_example(tokenizer, [USER, reply]), 1)
        between = _tail(_example(tokenizer, [USER, reply, *more]), 1)
        stops.update(_end_of_turn(tokenizer, last, between))
    return TurnFormat(tuple(prompt for prompt in prompts if prompt.strip()), tuple(sorted(stops)))


def _end_of_turn(tokenizer: Tokenizer, last: str, between: str) -> list[int]:
    """The token that ends a turn, from what follows it at the end of a conversation and before the next message.

    That is the last special token of what both have in common; else the last at the end of a conversation; else (GLM-4) the
    first of the next message.  Where none is special, it is another added token.
    """
    for candidates in (tokenizer.special_ids, tokenizer.added_ids):
        shared, ending, middle = (_controls(tokenizer, t, candidates) for t in (_common_prefix(last, between), last, between))
        ends = shared[-1:] or ending[-1:] or middle[:1]
        if ends:
            return [token for _, token in ends]
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


def _controls(tokenizer: Tokenizer, text: str, candidates: frozenset[int]) -> list[Placed]:
    """Which of the candidate tokens a template's text spells, and where; tokens of white space (Gemma's) do not count."""
    ids, spans = tokenizer.encode_rendered(text)
    placed = zip(spans, ids, strict=True)
    return [(span, token) for span, token in placed if token in candidates and text[slice(*span)].strip()]


def _speaks(source: traced.Source) -> bool:
    """Whether characters come from what a message says, rather than from its role or name."""
    return source[1:2] not in (("role",), ("name",), ("weight",))


def is_trained(message: RowFields) -> bool:
    """Whether what a message says is trained: its weight is not 0."""
    return message.get("weight") is None or bool(message["weight"])


def trained_spans(
    tokenizer: Tokenizer, rendered: Traced, messages: Messages, turn: TurnFormat, added: Sequence[Placed]
) -> list[Span]:
    """The characters of the rendering that are trained, ascending.  added: its special and other added tokens."""
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and is_trained(m)]
    if any(run.generated for run in traced.runs_of(rendered)):
        return _marked_spans(rendered, trained, turn, added)
    text, special = str.__str__(rendered), tokenizer.special_ids
    rendering = _Rendering(text, turn.prompts, tuple(map(tokenizer.piece, turn.stop_ids)), added, special)
    sourced = [_Part(*span, run.source, run.offset) for span, run in traced.spans_of(rendered) if run.source]
    spoken = {part.source[0] for part in sourced if part.stop > part.start and _speaks(part.source)}
    sourced = [part for part in sourced if part.stop > part.start or part.source[0] not in spoken]
    groups = [list(group) for _, group in itertools.groupby(sourced, key=lambda part: part.source[0])]
    result: list[Span] = []
    before = 0
    for group, after in zip(groups, [*(group[0].start for group in groups[1:]), len(text)], strict=True):
        number = group[0].source[0]
        if number in trained:
            result += _turn_spans(rendering, messages[int(number)], group, before, after)
        before = group[-1].stop
    return result


class _Part(NamedTuple):
    """Characters of a rendering that come from one text."""

    start: int
    stop: int
    source: traced.Source
    offset: int | None


class _Rendering(NamedTuple):
    """A rendered conversation, and what marks the turns in it."""

    text: str
    prompts: tuple[str, ...]  # as in TurnFormat
    stops: tuple[str, ...]  # spellings of the tokens that end a turn
    added: Sequence[Placed]  # special and other added tokens
    special: frozenset[int]


def _turn_spans(rendering: _Rendering, message: RowFields, parts: Sequence[_Part], before: int, after: int) -> list[Span]:
    """The turn of a message in text[before:after]; several, where the template ends one and prompts for the next."""
    text = rendering.text
    result: list[Span] = []
    begun: int | None = None
    for part, following in zip(parts, [*(p.start for p in parts[1:]), after], strict=True):
        if begun is None and not _speaks(part.source):
            continue
        if begun is None:
            begun = _turn_start(rendering, message, part, before)
        end = _first_end(text[part.stop : following], rendering.stops)
        if end is not None:
            result.append((begun, part.stop + end))
            begun, before = None, part.stop + end
            if not any(prompt in text[before:following] for prompt in rendering.prompts):
                return result
    if begun is not None:  # no token ends the turn: the first of the next message does, and a model trained on it stops there
        stop = parts[-1].stop
        ends = (b for (a, b), token in rendering.added if stop <= a < after and token in rendering.special)
        result.append((begun, next(ends, stop)))
    return result


def _first_end(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stops in a text ends; of several that begin there, the shortest."""
    begins = ((text.find(stop), len(stop)) for stop in stops)
    first = min(((at, at + size) for at, size in begins if at >= 0), default=None)
    return first[1] if first else None


def _turn_start(rendering: _Rendering, message: RowFields, part: _Part, before: int) -> int:
    """Where the trained part of a turn begins: after the generation prompt, or with the first words of the message."""
    text = rendering.text
    for prompt in rendering.prompts:
        at = text.rfind(prompt, before, part.start)
        if at >= 0:
            return at + len(prompt)
    whole, start, offset = message.get(str(part.source[1])), part.start, part.offset
    if not isinstance(whole, str) or not offset:
        return start
    while offset > 0 and start > before and text[start - 1] == whole[offset - 1]:
        start, offset = start - 1, offset - 1  # <think> of a content that the template split and joined again
    start = next((b for (a, b), _ in rendering.added if a < start < b), start)
    return start + len(text[start : part.start]) - len(text[start : part.start].lstrip())


def _marked_spans(rendered: Traced, trained: Sequence[int], turn: TurnFormat, added: Sequence[Placed]) -> list[Span]:
    """What {% generation %} marks, and the token that ends the turn if it follows at once."""
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
