"""Conversations to ids and an assistant mask, by any Jinja chat template; Tanuki's own is the default.

The template is rendered with placeholders for the contents, so what a user writes is only ever encoded as text, and the
mask follows from where the assistant's placeholders lie: no search for marker tokens, no tags needed in the template.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tanuki_jax import files
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError

SYSTEM = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}" + SYSTEM + "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n\n### 指示:\n' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\n\n### 応答:\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### 応答:\n' }}{% endif %}"
)
ROLES = ("system", "user", "assistant")
_SLOT = "\ue000{}\ue001"  # private-use characters around the number of a message


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and 1 for each id that the assistant says (its content and the end token), else 0.

    A message of the assistant with `weight` 0 is not trained on, as in OpenAI's format.
    Text between special tokens is encoded in one piece, so that ids do not depend on where a message ends.
    """
    check_messages(messages)
    slots = [{**m, "content": _SLOT.format(i)} for i, m in enumerate(messages)]
    rendered = _rendered(
        tokenizer.chat_template,
        messages=slots,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        add_generation_prompt=add_generation_prompt,
    )
    special = "|".join(re.escape(s) for s in tokenizer.special)
    ids: list[int] = []
    mask: list[int] = []
    text, assistant_last = "", False
    spans: list[tuple[int, int]] = []

    def flush() -> None:
        nonlocal text, spans
        if text:
            pieces, starts = tokenizer.encode_with_offsets(text)
            ids.extend(pieces)
            mask.extend(int(any(a <= start < b for a, b in spans)) for start in starts)
        text, spans = "", []

    for part in re.split(f"({special}|\ue000\\d+\ue001)", rendered):
        if part in tokenizer.special:
            flush()
            ids.append(tokenizer.special[part])
            mask.append(int(assistant_last and part == tokenizer.eos_token))
            assistant_last = False
        elif part.startswith("\ue000"):
            message = messages[int(part[1:-1])]
            assistant_last = message["role"] == "assistant" and message.get("weight", 1) != 0
            if assistant_last:
                spans.append((len(text), len(text) + len(message["content"])))
            text += message["content"]
        elif part:
            assistant_last = False
            text += part
    flush()
    return ids, mask


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end what is generated."""
    file = tokenizer.directory / "generation_config.json"
    told = files.read_json(file).get("eos_token_id") if file.is_file() else None
    return tuple(sorted({tokenizer.eos, *(told if isinstance(told, list) else [] if told is None else [told])}))


def render(
    messages: Sequence[Mapping[str, Any]],
    template: str = TEMPLATE,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = False,
) -> str:
    """A conversation as text; by default in Tanuki's template without special tokens: what a tokenizer should learn from."""
    check_messages(messages)
    return str(
        _template(template).render(
            messages=messages, bos_token=bos_token, eos_token=eos_token, add_generation_prompt=add_generation_prompt
        )
    )


def encode_dialogue(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """A training conversation; one without an assistant turn, or with an empty one, is an error."""
    ids, mask = encode_chat(tokenizer, messages)
    if any(m["role"] == "assistant" and m.get("weight", 1) and not m["content"] for m in messages):
        raise UserError("conversation with an empty answer of the assistant: it would learn to say nothing")
    if not any(mask):
        raise UserError("conversation without an assistant turn: there is nothing to learn from it")
    return ids, mask


def encode_pair(tokenizer: Tokenizer, row: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """The chosen and the rejected conversation of a preference row; only the last answer is in the mask."""
    if as_messages(row["chosen"], "assistant") == as_messages(row["rejected"], "assistant"):
        raise UserError("pair whose chosen and rejected answers are the same: there is nothing to prefer")
    prompt = _given(row["prompt"])
    return [encode_dialogue(tokenizer, [*prompt, *as_messages(row[side], "assistant")]) for side in ("chosen", "rejected")]


def _given(prompt: Any) -> list[Mapping[str, Any]]:
    """The messages of a prompt, whose earlier answers are not trained on."""
    messages = as_messages(prompt, "user")
    return [{**m, "weight": 0} if isinstance(m, Mapping) and m.get("role") == "assistant" else m for m in messages]


def text_of(fields: Mapping[str, Any]) -> str:
    """The conversation of a dialogue row, or both of a pair, as plain text."""
    if "messages" in fields:
        return render(fields["messages"])
    prompt = as_messages(fields["prompt"], "user")
    return "\n".join(render([*prompt, *as_messages(fields[side], "assistant")]) for side in ("chosen", "rejected"))


def conversation(fields: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The messages of a row that spells a conversation in another way; None where it spells none.

    `prompt` and `completion`, of which the completion alone is trained on; `instruction`, `input` (may be missing or empty) and
    `output`; `q1`, `a1`, `q2`, `a2` and so on.
    """
    turns: list[Any] = []
    if "chosen" not in fields and "rejected" not in fields and {"prompt", "completion"} <= fields.keys():
        return [*_given(fields["prompt"]), *as_messages(fields["completion"], "assistant")]
    if {"instruction", "output"} <= fields.keys():
        asked = fields["instruction"]
        turns = [f"{asked}\n\n{fields['input']}" if asked and fields.get("input") else asked, fields["output"]]
    elif {"q1", "a1"} <= fields.keys():
        number = 1
        while fields.get(f"q{number}") and fields.get(f"a{number}"):
            turns += [fields[f"q{number}"], fields[f"a{number}"]]
            number += 1
    else:
        return None
    if not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise UserError(f"conversation with an empty question or answer (fields: {', '.join(fields)})")
    return [{"role": ROLES[1 + i % 2], "content": turn} for i, turn in enumerate(turns)]


def as_messages(value: Any, role: str) -> list[Mapping[str, Any]]:
    """A plain string is one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise UserError(f"prompt, chosen and rejected must be text or a list of messages, not {type(value).__name__}")
    return value


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """A list of {"role", "content"} with known roles and text, or a UserError that says which message is wrong."""
    if not messages:
        raise UserError("conversation is empty; it needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise UserError(f"message {i} must be {{'role': {' | '.join(ROLES)}, 'content': text}}, not {str(message)[:80]}")


def _rendered(source: str, **values: Any) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(_template(source).render(**values))
    except (TemplateError, TypeError, ValueError) as error:  # a template is the tokenizer's, and may be anybody's
        raise UserError(f"chat_template: {error}; mend it in tokenizer_config.json") from error


@functools.lru_cache(maxsize=8)
def _template(source: str) -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Accepts transformers' {% generation %} tags, which only mark what the assistant says."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    if not source:
        raise UserError(
            "tokenizer_config.json has no chat_template; add one, or train the tokenizer with `tanuki tokenizer train`"
        )
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation])
    return environment.from_string(source)
