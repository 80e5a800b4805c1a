"""Renders conversations with a chat template as transformers does, and checks that the template leaves out nothing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeAlias

from tanuki_jax.data import template, traced
from tanuki_jax.data.conversation import REASONING, Message, Messages, RowFields, check_messages
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.data.traced import Source, Traced
from tanuki_jax.errors import UserError

Arguments: TypeAlias = RowFields  # of a chat template: tools, documents, enable_thinking, ...
ROLES = ("system", "developer", "user", "assistant", "model", "tool", "ipython", "function", "observation")
LISTS = ("tools", "documents")  # arguments that are lists


def template_of(tokenizer: Tokenizer, arguments: Arguments | None) -> str:
    """The template that transformers uses: of several, tool_use where there are tools, else default."""
    templates = tokenizer.chat_templates
    if (arguments or {}).get("tools") is not None and "tool_use" in templates:
        return templates["tool_use"]
    if templates and "default" not in templates:
        raise UserError(f"tokenizer: of the chat templates {', '.join(sorted(templates))} none is named default; add one")
    return tokenizer.chat_template


def render_chat(tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool, arguments: Arguments | None) -> Traced:
    """The rendered conversation, traced to (number of the message, field, ...) or (argument, ...)."""
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
    """The characters that come from a row, ascending.  Names of known roles belong to the template: '<|' + role + '|>'."""
    text = str.__str__(rendered)
    return [
        (a, b)
        for (a, b), run in traced.spans_of(rendered)
        if run.source and b > a and not (run.source[1:] == ("role",) and text[a:b].lower() in ROLES)
    ]


def _traced_message(number: int, message: RowFields) -> Message:
    """A message as transformers passes it to a template: reasoning under each of its names."""
    fields = {name: traced.trace(value, (number, name)) for name, value in message.items()}
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def plain_messages(messages: Messages, as_text: bool = True) -> list[Message]:
    """Messages without keys whose value is None, as transformers passes them; lists of text parts are joined if as_text."""
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


def leaves(value: object, path: Source = ()) -> Iterator[tuple[Source, str]]:
    """Every string in a JSON value, with its path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from leaves(item, (*path, number))


def check_all_came_out(rendered: Traced, messages: Messages, arguments: Arguments, source: str) -> None:
    """Raises an error that names the first message, or part of one, that the template leaves out."""
    came = {run.source[:n] for run in traced.runs_of(rendered) if run.source for n in range(1, len(run.source) + 1)}
    runs: dict[Source, list[traced.Run]] = {}
    for run in traced.runs_of(rendered):
        if run.source and run.length:
            runs.setdefault(run.source, []).append(run)
    last_answer = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)

    def missing(name: str, fix: str) -> UserError:
        return UserError(f"{name} does not come out of the chat template; {fix}, or use a template that writes it")

    for i, message in enumerate(messages):
        where = f"message {i} (role {message['role']!r})"
        if texts_of(message.get("content")).strip() and (i, "content") not in came:
            raise missing(f"content of {where}", "remove or merge it, write it as [{'type': 'text', 'text': ...}]")
        for path, text in leaves(message.get("content"), (i, "content")):
            lost = _lost_part(runs.get(path, []), text, template.strings(source)) if path in came else ""
            if lost:
                raise missing(f"{lost[:40]!r} of the content of {where}", "leave it out of the row")
        for number, part in enumerate(message["content"] if isinstance(message.get("content"), list) else ()):
            if (i, "content", 0) in came and part["text"].strip() and (i, "content", number) not in came:
                raise missing(f"part {number} of the content of {where}", "join the parts")
        for name in REASONING:
            dropped = texts_of(message.get(name)).strip() and not any((i, n) in came for n in REASONING)
            # Many templates write the reasoning of the last turn alone.
            if dropped and (i >= last_answer or not template.mentions(source).intersection(REASONING)):
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


def _lost_part(runs: Sequence[traced.Run], text: str, literals: Collection[str]) -> str:
    """The first part of a text that a template cuts off, of which it writes these runs; empty where it keeps all.

    It may cut white space, and parts that hold one of its string literals: "</think>" at which it splits, or replaces.
    """
    if any(run.offset is None for run in runs):  # derived from the text, as by `upper`
        return ""
    spans = sorted((run.offset or 0, (run.offset or 0) + run.length) for run in runs)
    starts = [0, *itertools.accumulate((stop for _, stop in spans), max)]
    for start, stop in zip(starts, [*(start for start, _ in spans), len(text)], strict=True):
        lost = text[start:stop].strip()
        if lost and not any(word.strip() and word.strip() in lost for word in literals):
            return lost
    return ""


def texts_of(value: object) -> str:
    """All text of a content, which is text or a list of text parts."""
    return "".join(text for path, text in leaves(value) if path[-1:] != ("type",))
