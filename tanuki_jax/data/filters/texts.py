"""The texts of a row that filters look at."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tanuki_jax.data.conversation import Messages, pair_messages
from tanuki_jax.data.sources import Row, kind_of
from tanuki_jax.errors import UserError

WRITTEN_FIELDS = ("text", "messages", "prompt", "completion", "chosen", "rejected", "system", "documents")
_NAMES = ("role", "type", "id", "name", "tool_call_id")  # keys of a message whose strings are no text
_CODE = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_URL = re.compile(r"https?://\S+")
JAPANESE = re.compile(r"[\u3041-\u30ff\u3400-\u9fff々]")


class Answer(NamedTuple):
    """A document, or what the assistant says at one turn."""

    text: str
    system: str = ""  # of its conversation
    prompt: str = ""  # what the user has said up to it; empty for a document
    question: str = ""  # the last message before it

    @property
    def is_document(self) -> bool:
        return not self.prompt and not self.system


class Texts(NamedTuple):
    """A row's texts: the answers that are trained on, of a pair the chosen one's alone, and all there is in it."""

    trains: bool  # whether there is anything that is trained on: text, or a call of a tool
    answers: tuple[Answer, ...]
    parts: tuple[str, ...]  # the document, or every message (of a pair: with the rejected answer)

    @property
    def whole(self) -> str:
        return "\n".join(self.parts)


def texts_of(row: Row) -> Texts:
    """The texts of a document, dialogue or pair; a row of tokens is an error, since filters look at text."""
    kind = kind_of(row)
    if kind == "tokens":
        raise UserError(f"filters: {row.where} holds tokens; filters look at text, so filter the rows before they are encoded")
    if kind == "text":
        text = row.fields["text"]
        return Texts(bool(text.strip()), (Answer(text),), (text,))
    try:
        conversations: list[Messages] = [row.fields["messages"]] if kind == "dialogue" else list(pair_messages(row.fields))
    except UserError as error:
        raise UserError(f"filters: {row.where}: {error}") from error
    parts = [text_of(message) for message in conversations[0]]
    for other in conversations[1:]:
        shared = sum(1 for first, second in zip(conversations[0], other, strict=False) if first == second)
        parts += [text_of(message) for message in other[shared:]]
    answers = tuple(_answers(conversations[0]))
    trains = any(answer.text.strip() for answer in answers) or any(map(_calls_tools, conversations[0]))
    return Texts(trains, answers, tuple(part for part in parts if part))


def _answers(messages: Messages) -> list[Answer]:
    system, last = "", ""
    questions: list[str] = []
    result: list[Answer] = []
    for message in messages:
        text = text_of(message)
        if message.get("role") == "system":
            system = text
        elif message.get("role") == "assistant":
            if text and message.get("weight") != 0:
                result.append(Answer(text, system, "\n".join(questions), last))
        else:
            questions.append(text)
            last = text
    return result


def _calls_tools(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "assistant" and message.get("weight") != 0 and bool(message.get("tool_calls"))


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message; of a list of parts, theirs."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "\n".join(str(part["text"]) for part in parts if isinstance(part, Mapping) and "text" in part)


def change_texts(row: Row, change: Callable[[str], str]) -> Row:
    """The row with `change` applied to each of its texts; fields that no stage reads stay as they are."""
    changed = {name: _change(row.fields[name], change) for name in WRITTEN_FIELDS if name in row.fields}
    return row._replace(fields={**row.fields, **changed})


def _change(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: item if name in _NAMES else _change(item, change) for name, item in value.items()}
    if isinstance(value, list):
        return [_change(item, change) for item in value]
    return value


def normalize(text: str) -> str:
    """NFKC, lower case, without white space; what texts are compared by."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def without_code(text: str) -> str:
    """The text without fenced blocks of code and addresses, which follow other rules than prose."""
    if "```" in text or "~~~" in text:
        text = _CODE.sub("\n", text)
    return _URL.sub(" ", text) if "://" in text else text
