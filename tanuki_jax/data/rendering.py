"""Conversations through a chat template: what is handed to it, as transformers does, and a check that all of it came out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from tanuki_jax.data import template, traced
from tanuki_jax.data.conversation import REASONING, check_messages
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.data.traced import Traced
from tanuki_jax.errors import UserError

Messages = Sequence[Mapping[str, Any]]
Arguments = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "model", "tool", "ipython", "function", "observation")
LISTS = ("tools", "documents")  # arguments of a template that a row may give


def template_of(tokenizer: Tokenizer, arguments: Arguments | None) -> str:
    """The template that transformers takes of several: tool_use where there are tools, else default."""
    templates = tokenizer.chat_templates
    if (arguments or {}).get("tools") is not None and "tool_use" in templates:
        return templates["tool_use"]
    if templates and "default" not in templates:
        raise UserError(f"tokenizer: of the chat templates {', '.join(sorted(templates))} none is named default; add one")
    return tokenizer.chat_template


def render_chat(tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool, arguments: Arguments | None) -> Traced:
    """What the template writes, traced to (number of the message, field, ...) or (argument, ...)."""
    check_messages(messages)
    source = template_of(tokenizer, arguments)
    as_text = not _reads_parts(source, tuple(tokenizer.named.items())) if _has_parts(messages) else False
    try:
        values = {name: traced.trace(value, (name,)) for name, value in (arguments or {}).items()}
        listed = [_traced_message(i, message) for i, message in enumerate(plain_messages(messages, as_text))]
    except RecursionError as error:
        raise UserError("conversation with values nested hundreds deep; make them flat") from error
    return template.render(
        source,
        {
            "messages": listed,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **tokenizer.named,
            **values,
        },
    )


def quoted_spans(rendered: Traced) -> list[tuple[int, int]]:
    """The characters that come from a row, ascending.  The name of a known role is a template's own: '<|' + role + '|>'."""
    text = str.__str__(rendered)
    return [
        (a, b)
        for (a, b), run in traced.spans_of(rendered)
        if run.source and b > a and not (run.source[1:] == ("role",) and text[a:b].lower() in ROLES)
    ]


def _traced_message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it to a template: reasoning under each of its names."""
    found = {name: traced.trace(value, (number, name)) for name, value in message.items()}
    reasoning = next((found[name] for name in REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def plain_messages(messages: Messages, as_text: bool = True) -> list[dict[str, Any]]:
    """Messages without keys that have no value, as transformers gives them; with lists of text parts as text."""
    plain = [{name: value for name, value in message.items() if value is not None} for message in messages]
    for message in plain:
        if as_text and isinstance(message.get("content"), list):
            message["content"] = "\n".join(part["text"] for part in message["content"])
    return plain


def _has_parts(messages: Messages) -> bool:
    return any(isinstance(message.get("content"), list) for message in messages)


@functools.lru_cache(maxsize=32)
def _reads_parts(source: str, named: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template writes the text of a content that is a list of parts (vLLM's "openai" content format)."""
    messages = [
        _traced_message(number, {"role": role, "content": [{"type": "text", "text": "alpha"}]})
        for number, role in enumerate(("user", "assistant"))
    ]
    values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False, **dict(named)}
    try:
        came = {run.source for run in traced.runs_of(template.render(source, values))}
    except UserError:
        return False
    return {(number, "content", 0, "text") for number in range(2)} <= came


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Every text in a JSON value, with where it stands."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from leaves(item, (*path, number))


def check_all_came_out(rendered: Traced, messages: Messages, arguments: Arguments, source: str) -> None:
    """An error that names the first message, or part of one, of which the template writes nothing."""
    came = {run.source[:n] for run in traced.runs_of(rendered) if run.source for n in range(1, len(run.source) + 1)}

    def missing(what: str, fix: str) -> UserError:
        return UserError(f"{what} does not come out of the chat template; {fix}, or use a template that writes it")

    for i, message in enumerate(messages):
        where = f"message {i} (role {message['role']!r})"
        if texts_of(message.get("content")).strip() and (i, "content") not in came:
            raise missing(f"content of {where}", "remove or merge it, write it as [{'type': 'text', 'text': ...}]")
        for path, text in leaves(message.get("content"), (i, "content")):
            if path in came and (lost := _lost_part(rendered, path, text, template.strings(source))):
                raise missing(f"{lost[:40]!r} of the content of {where}", "leave it out of the row")
        for number, part in enumerate(message["content"] if isinstance(message.get("content"), list) else ()):
            if (i, "content", 0) in came and part["text"].strip() and (i, "content", number) not in came:
                raise missing(f"part {number} of the content of {where}", "join the parts")
        for name in REASONING:
            last = all(m["role"] != "assistant" for m in messages[i + 1 :])
            dropped = texts_of(message.get(name)).strip() and not any((i, n) in came for n in REASONING)
            if dropped and (
                last or not template.mentions(source).intersection(REASONING)
            ):  # of earlier turns many leave it out
                raise missing(f"{name} of {where}", "remove it")
        if texts_of(message.get("function_call")).strip() and (i, "function_call") not in came:
            raise missing(f"function_call of {where}", "write it as tool_calls")
        for number, call in enumerate(message.get("tool_calls") or ()):
            for path, text in leaves(call):
                if path[-1] not in ("id", "type") and text.strip() and (i, "tool_calls", number, *path) not in came:
                    raise missing(f"tool_calls of {where}: {'.'.join(map(str, path))}", "remove it")
    for name in LISTS:
        for number, _ in enumerate(arguments.get(name) or ()):
            if (name, number) not in came:
                raise missing(f"{name}[{number}] of the row", "remove it")


def _lost_part(rendered: Traced, source: traced.Source, text: str, known: Collection[str]) -> str:
    """The first part of a text that a template cuts away.

    White space may go, and what stands beside a string that the template knows: "</think>" that it splits at, or replaces.
    """
    runs = [run for run in traced.runs_of(rendered) if run.source == source and run.length]
    if any(run.offset is None for run in runs):  # made anew from the text, as `upper` does
        return ""
    spans = sorted((run.offset or 0, (run.offset or 0) + run.length) for run in runs)
    starts = [0, *itertools.accumulate((stop for _, stop in spans), max)]
    for start, stop in zip(starts, [*(start for start, _ in spans), len(text)], strict=True):
        lost = text[start:stop].strip()
        if lost and not any(word.strip() and word.strip() in lost for word in known):
            return lost
    return ""


def texts_of(value: Any) -> str:
    """All text of a content, which is text or a list of text parts."""
    return "".join(text for path, text in leaves(value) if path[-1:] != ("type",))
