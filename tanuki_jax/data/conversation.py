"""Rows of text, conversations and preferences in the many layouts that data sets use, read into one.

What a row asks for and training cannot do (a weight of 0.5, a label, a gap between its turns) is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, TypeAlias

from tanuki_jax.errors import UserError

RowFields: TypeAlias = Mapping[str, Any]  # a row as JSON or a columnar file gives it
Message: TypeAlias = dict[str, Any]  # role, content, and what else a message may have: tool_calls, weight, ...
Messages: TypeAlias = Sequence[Mapping[str, Any]]

REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers' names for the same field
SPEAKERS = {  # of ShareGPT's {"from", "value"}
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
    "system": "system",
}
# Format of a row -> the fields by which it is known; one of the alternatives in a group is enough.
FORMATS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "text": (("text",),),
    "messages": (("messages",),),
    "conversations": (("conversations",),),
    "preference": (("chosen",), ("rejected",)),
    "prompt_completion": (("prompt",), ("completion",)),
    "instruction": (("instruction",), ("output", "response")),
    "question_answer": (("question",), ("answer", "response")),
    "turns": (("q1",),),
    "tokens": (("tokens",),),
}
EXTRA_FIELDS = ("weight", "input", "context", "system", "history", "label", "tools", "documents", "chat_template_kwargs")
_TURN = re.compile(r"[qa]([1-9][0-9]{0,2})")  # up to 999
_WEIGHT_ALIASES = ("train", "loss", "trainable", "training")  # other tools' names of a message's weight


class Columns(Container[str]):
    """The fields of a row that are read: those of every format, and `more`."""

    def __init__(self, *more: str) -> None:
        self._names = {*EXTRA_FIELDS, *more, *(name for groups in FORMATS.values() for group in groups for name in group)}

    def __contains__(self, name: object) -> bool:
        return name in self._names or (isinstance(name, str) and _TURN.fullmatch(name) is not None)


def read_fields(fields: RowFields, row_format: str = "auto") -> dict[str, Any]:
    """The fields of a row as {"text"}, {"messages"}, {"prompt", "chosen", "rejected"} or {"tokens"}, and `tools` and the like.

    row_format: a name of FORMATS, or auto: the format that the row has; a row that fits several needs the name.
    """
    matches = [name for name in FORMATS if _has_format(fields, name)]
    if row_format != "auto":
        if row_format not in matches:
            raise UserError(f"has no {' and '.join('/'.join(g) for g in FORMATS[row_format])} (fields: {', '.join(fields)})")
        matches = [row_format]
    if len(matches) > 1:
        raise UserError(f"can be read as {' or as '.join(matches)}; say which with row_format (--row_format={matches[0]})")
    if not matches:
        raise UserError(
            f"has neither text, nor a conversation, nor prompt, chosen and rejected (fields: {', '.join(map(str, fields))})"
        )
    is_chosen = row_format != "auto"
    row_format = matches[0]
    if row_format in ("text", "tokens"):
        return {row_format: fields[row_format]}
    if not is_chosen:
        _check_all_read(fields, row_format)
    extras: dict[str, object] = {name: _list(fields[name], name) for name in ("tools", "documents") if fields.get(name)}
    if fields.get("chat_template_kwargs"):
        extras["chat_template_kwargs"] = _dictionary(fields["chat_template_kwargs"], "chat_template_kwargs")
    if row_format == "preference":
        answers = {name: _side(fields[name]) for name in ("prompt", "chosen", "rejected") if fields.get(name) is not None}
        return {**answers, **_system(fields), **extras}
    if fields.get("label") in (0, 1) or str(fields.get("label")).lower() in ("true", "false"):
        raise UserError(
            "has a label, so its answer is called good or bad (KTO), which SFT does not read; "
            "keep the rows with label true and remove the field, or make pairs with chosen and rejected"
        )
    messages = _CONVERSATIONS[row_format](fields)
    system = _system(fields).get("system")
    if system:
        if messages and messages[0].get("role") == "system":
            raise UserError("has a system field and a system message; keep one of them")
        messages = [{"role": "system", "content": system}, *messages]
    # `tanuki score` reads prompt and completion themselves.
    sides = {name: fields[name] for name in ("prompt", "completion") if row_format == "prompt_completion"}
    return {**sides, "messages": messages, **extras}


def _system(fields: RowFields) -> dict[str, str]:
    system = fields.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f"system must be text, not {str(system)[:80]}")
    return {"system": system} if system else {}


def _check_all_read(fields: RowFields, row_format: str) -> None:
    """Refuses a field of another format that this one would ignore."""
    more = ("input", "context", "history")
    used = {*(name for group in FORMATS[row_format] for name in group), *(more if row_format == "instruction" else ())}
    for name in more:
        if name not in used and fields.get(name):
            raise UserError(
                f"has {name}, which is not read beside {' and '.join(g[0] for g in FORMATS[row_format])}; remove the field, or "
                f"say row_format={row_format} (--row_format) to leave it out"
            )
    for first, second in (("input", "context"), ("output", "response"), ("answer", "response")):
        if {first, second} <= used and fields.get(first) and fields.get(second):
            raise UserError(f"has both {first} and {second}; keep one of them")
    if fields.get("weight") not in (None, 1):
        raise UserError(f"has weight {fields['weight']!r} beside its messages; give the messages a weight of 0 or 1 each")


def _has_format(fields: RowFields, name: str) -> bool:
    if name == "text":
        return isinstance(fields.get("text"), str)
    return all(any(fields.get(field) is not None for field in group) for group in FORMATS[name])


# --- conversations ----------------------------------------------------------------------------------------------------------


def _from_messages(name: str) -> Callable[[RowFields], list[Message]]:
    return lambda fields: _messages(_list(fields[name], name))


def _prompt_completion(fields: RowFields) -> list[Message]:
    prompt, completion = as_messages(_side(fields["prompt"]), "user"), as_messages(_side(fields["completion"]), "assistant")
    return [*without_loss(prompt), *completion]


def _instruction(fields: RowFields) -> list[Message]:
    instruction, more = fields["instruction"], fields.get("input") or fields.get("context")
    answer = fields["output"] if fields.get("output") is not None else fields["response"]
    if more is not None and not isinstance(more, str):
        raise UserError(f"input must be text, not {str(more)[:80]}")
    turns: list[object] = []
    for pair in _list(fields.get("history") or [], "history"):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise UserError("history must be a list of [question, answer]")
        turns += pair
    question = f"{instruction}\n\n{more}" if isinstance(instruction, str) and instruction and more else instruction
    return _alternate([*turns, question, answer])


def _question_answer(fields: RowFields) -> list[Message]:
    return _alternate([fields["question"], fields["answer"] if fields.get("answer") is not None else fields["response"]])


def _turns(fields: RowFields) -> list[Message]:
    """q1, a1, q2, a2 and so on, without a gap."""
    numbers = [int(match[1]) for name, value in fields.items() if value and (match := _TURN.fullmatch(str(name)))]
    names = [f"{letter}{number}" for number in range(1, max(numbers, default=1) + 1) for letter in "qa"]
    for name in names:
        if not fields.get(name):
            raise UserError(f"{name} is missing or empty, though {names[-2]} or {names[-1]} is there; fill it, or remove them")
    return _alternate([fields[name] for name in names])


_CONVERSATIONS: Mapping[str, Callable[[RowFields], list[Message]]] = {
    "messages": _from_messages("messages"),
    "conversations": _from_messages("conversations"),
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "question_answer": _question_answer,
    "turns": _turns,
}


def _alternate(turns: Sequence[object]) -> list[Message]:
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError("conversation with an empty question or answer; fill it, or remove the row")
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _messages(values: Sequence[object]) -> list[Message]:
    """Messages with role and content; ShareGPT's names are translated, keys without a value left out."""
    result = []
    for number, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise UserError(f"message {number} must be {{'role': ..., 'content': text}}, not {str(value)[:80]}")
        message = {name: item for name, item in value.items() if item is not None or name == "content"}
        if "from" in message and "value" in message and "role" not in message:
            speaker = message.pop("from")
            if not isinstance(speaker, str) or speaker not in SPEAKERS:
                raise UserError(f"message {number} is from {speaker!r}; known are {', '.join(SPEAKERS)}")
            message = {"role": SPEAKERS[speaker], "content": message.pop("value"), **message}
        if isinstance(message.get("content"), list):
            message["content"] = [{"type": "text", "text": p} if isinstance(p, str) else p for p in message["content"]]
        if "tool_calls" in message:
            message["tool_calls"] = _list(message["tool_calls"], f"tool_calls of message {number}")
        result.append(message)
    return result


def _list(value: object, name: str) -> list[object]:
    """A list, also one written as JSON text or as a dictionary of equally long lists (TFDS, Sequence of a struct)."""
    value = _load_json(value, name)
    if isinstance(value, dict):
        columns = list(value.values())
        if not columns or not all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
            raise UserError(f"{name} must be a list, not {str(value)[:80]}")
        return [dict(zip(value, entry, strict=True)) for entry in zip(*columns, strict=True)]
    if not isinstance(value, list):
        raise UserError(f"{name} must be a list, not {type(value).__name__}")
    return value


def _dictionary(value: object, name: str) -> dict[str, object]:
    value = _load_json(value, name)
    if not isinstance(value, dict):
        raise UserError(f"{name} must be a dict, not {type(value).__name__}")
    return value


def _load_json(value: object, name: str) -> object:
    """The value of JSON text; anything that is not text, as it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed: object = json.loads(value)
    except ValueError as error:
        raise UserError(f"{name} is text, but no JSON: {error}") from error
    return parsed


# --- preferences ------------------------------------------------------------------------------------------------------------


def _side(value: object) -> object:
    """Text, or messages; a list written as JSON text is read as messages."""
    if isinstance(value, str):
        if not (value.startswith("[{") and value.rstrip().endswith("}]")):
            return value
        try:
            value = json.loads(value)
        except ValueError:
            return value
    return _messages(_list(value, "prompt, completion, chosen or rejected")) if isinstance(value, list | dict) else value


def pair_messages(row: RowFields) -> list[list[Message]]:
    """The chosen and the rejected conversation of a preference row; answers in their common beginning get weight 0.

    Where both sides are whole conversations, their common beginning is the prompt; a `prompt` must be how it ends.
    """
    chosen, rejected = (as_messages(row[name], "assistant") for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise UserError("pair whose chosen and rejected answers are the same: there is nothing to prefer")
    prompt = as_messages(row["prompt"], "user") if row.get("prompt") is not None else []
    whole = [bool(side) and side[0].get("role") != "assistant" for side in (chosen, rejected)]
    if any(whole):
        common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        common = min(len(chosen), len(rejected)) if common is None else common
        if not all(whole) or not common or (prompt and chosen[common - len(prompt) : common] != prompt):
            raise UserError(
                "chosen and rejected begin with messages that are not the same, or not the prompt; "
                "give the prompt once, and the answers alone"
            )
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    if not prompt:
        raise UserError("pair without a prompt; give it as `prompt`, or begin chosen and rejected with its messages")
    for side in (chosen, rejected):
        if not side or side[0].get("role") != "assistant":
            raise UserError("pair in which an answer of the assistant does not follow the prompt")
    if row.get("system"):
        if prompt[0].get("role") == "system":
            raise UserError("has a system field and a system message; keep one of them")
        prompt = [{"role": "system", "content": row["system"]}, *prompt]
    return [[*without_loss(prompt), *side] for side in (chosen, rejected)]


def without_loss(messages: Messages) -> list[Message]:
    """The messages of a prompt, whose earlier answers are not trained on."""
    return [{**m, "weight": 0} if m.get("role") == "assistant" else dict(m) for m in messages]


def as_messages(value: object, role: str) -> list[Message]:
    """Messages as they are; a plain string as one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise UserError(f"prompt, completion, chosen and rejected must be text or a list of messages, not {str(value)[:80]}")
    return [dict(message) for message in value]


# --- what messages must be --------------------------------------------------------------------------------------------------


def check_messages(messages: Messages) -> None:
    """A list of {"role", "content"} with text, or a UserError that says which message is wrong and what to do."""
    if not messages:
        raise UserError("conversation is empty; it needs at least one message")
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        calls = isinstance(message, Mapping) and message.get("tool_calls")
        spoken = isinstance(content, str | list) or (content is None and calls)
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not spoken:
            raise UserError(
                f"message {i} must be {{'role': system | user | assistant | tool, 'content': text}}, not {str(message)[:80]}"
            )
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UserError(f"message {i} has a part that is no text: {str(part)[:80]}; only text is trained on")
        if calls and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
            raise UserError(f"message {i}: tool_calls must be a list of {{'type': 'function', 'function': ...}}")
        _check_weight(i, message)


def _check_weight(number: int, message: RowFields) -> None:
    weight = message.get("weight")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise UserError(f"message {number} has weight {weight!r}; write the number 0 (not trained on) or 1")
    for name in _WEIGHT_ALIASES:
        if message.get(name) is not None and message[name] not in (1, 1.0):
            raise UserError(f"message {number} has {name} {message[name]!r}; write weight 0 (not trained on) or 1 instead")
