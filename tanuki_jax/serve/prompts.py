"""From the texts and messages of a request to token ids; what a client writes never becomes a special token."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tanuki_jax.data import chat
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.serve.errors import ApiError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TURN_FIELDS = ("role", "content", "name", "type", "refusal")  # of a message; the last three are ignored


class Prompt(NamedTuple):
    """Token ids; how many the tokenizer put before the text; the text that `echo` repeats."""

    ids: tuple[int, ...]
    n_added: int
    text: str


def read_prompts(tokenizer: Tokenizer, vocab_size: int, value: object) -> list[Prompt]:
    """The field `prompt` of a completion: a text, ids, or a list of either.  An ApiError where it is nothing of these."""
    if isinstance(value, str):
        return [_encode_text(tokenizer, value, "prompt")]
    if not isinstance(value, list) or not value:
        raise ApiError(400, "prompt must be a text, a list of texts, a list of token ids, or a list of such lists", "prompt")
    if all(_is_id(item) for item in value):
        return [_read_ids(tokenizer, vocab_size, value, "prompt")]
    prompts = []
    for number, item in enumerate(value):
        where = f"prompt[{number}]"
        if isinstance(item, str):
            prompts.append(_encode_text(tokenizer, item, where))
        elif isinstance(item, list) and item and all(map(_is_id, item)):
            prompts.append(_read_ids(tokenizer, vocab_size, item, where))
        else:
            raise ApiError(400, f"{where} must be a text, or a list of at least one token id", where)
    return prompts


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_ids(tokenizer: Tokenizer, vocab_size: int, ids: Sequence[int], where: str) -> Prompt:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ApiError(400, f"{where} holds the id {str(token)[:20]}; ids of this model are 0 to {vocab_size - 1}", where)
    return Prompt(tuple(ids), 0, tokenizer.decode(ids))


def _encode_text(tokenizer: Tokenizer, text: str, where: str) -> Prompt:
    """Ids as `tanuki generate` has them, except that spelt special tokens stay text."""
    try:
        ids, _ = tokenizer.encode_rendered(text, [(0, len(text))], frozenset(chat.stop_ids(tokenizer)))
        before, after = added_ids(tokenizer)
    except UserError as error:
        raise ApiError(400, f"{where}: {error}", where) from error
    whole = (*before, *ids, *after) or (tokenizer.eos if tokenizer.bos is None else tokenizer.bos,)
    return Prompt(whole, len(before) if ids else len(whole), text)


@functools.lru_cache(maxsize=4)
def added_ids(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer's post-processor puts before and after a text."""
    plain, whole = tokenizer.encode_prompt("a", add_special_tokens=False), tokenizer.encode_prompt("a")
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:at]), tuple(whole[at + len(plain) :])


def read_conversation(tokenizer: Tokenizer, value: object, max_length: int) -> Prompt:
    """The field `messages` of a chat, with the beginning of the assistant's answer.

    max_length: tokens that the model takes; more messages than that are refused before any work is done for them.
    """
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    if len(value) > max_length:
        message = f"messages: {len(value)} messages are more than the {max_length} tokens that this server takes"
        raise ApiError(400, message, "messages", "context_length_exceeded")
    messages = [_read_message(message, f"messages[{number}]") for number, message in enumerate(value)]
    try:
        ids, _ = chat.encode_chat(tokenizer, messages, add_generation_prompt=True)
    except UserError as error:
        raise ApiError(400, f"messages: {error}", "messages") from error
    return Prompt(tuple(ids), 0, "")


def _read_message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} must be an object with role and content", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(400, f"{where}.role must be one of {', '.join(ROLES)}", f"{where}.role")
    for name, field in message.items():
        if name not in TURN_FIELDS and field:
            raise ApiError(400, f"{where}.{name[:60]} is not supported; a message has role and content", f"{where}.{name[:60]}")
    return {"role": ROLES[role], "content": _read_content(message.get("content"), f"{where}.content")}


def _read_content(content: object, where: str) -> str:
    """A text, or the texts of a list of parts, joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{where} must be a text, or a list of parts of the type text", where)
    return "".join(_read_part(part, f"{where}[{number}]") for number, part in enumerate(content))


def _read_part(part: object, where: str) -> str:
    fields: Mapping[str, Any] = part if isinstance(part, dict) else {}
    if fields.get("type") != "text" or not isinstance(fields.get("text"), str):
        raise ApiError(400, f"{where} must be a part of the type text with a text; this model reads nothing else", where)
    text: str = fields["text"]
    return text


def warm_up(tokenizer: Tokenizer) -> None:
    """Has the tokenizer build what it builds when it is first used, which takes seconds where the vocabulary is large."""
    text = f"a {tokenizer.eos_token} b"
    _encode_text(tokenizer, text, "prompt")
    tokenizer.encode(text)
    if tokenizer.chat_template:
        read_conversation(tokenizer, [{"role": "user", "content": text}], max_length=1)
