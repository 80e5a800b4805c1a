"""What all chains share: a call with its checks, and conversations as text."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tanuki_jax.config.synthesis import Synth
from tanuki_jax.data import encodings
from tanuki_jax.endpoint import Answer, Ask, Drop, Job
from tanuki_jax.synth import cleaning
from tanuki_jax.synth.seeds import Item
from tanuki_jax.synth.templates import Templates

Messages: TypeAlias = list[dict[str, str]]
Row: TypeAlias = dict[str, Any]
Chain: TypeAlias = Callable[[Item, Ask], Awaitable[list[Row | Drop]]]
SPEAKERS = {"ja": {"user": "利用者", "assistant": "AI"}, "en": {"user": "User", "assistant": "AI"}}


@dataclass(frozen=True)
class Context:
    """What a chain is made for.

    synth: the recipe's entry.  templates: its texts.  dry_run: answers are fillers, which are of no language.
    """

    synth: Synth
    templates: Templates
    dry_run: bool = False


def message(role: str, text: str) -> dict[str, str]:
    """One message of a conversation."""
    return {"role": role, "content": text}


def transcribe(messages: Sequence[Mapping[str, str]], language: str) -> str:
    """A conversation as text, each message under its speaker's name."""
    names = SPEAKERS[language]
    return "\n\n".join(f"{names.get(m['role'], m['role'])}: {m['content']}" for m in messages)


async def call(ask: Ask, context: Context, item: Item, step: str, messages: Messages, **more: Any) -> str:
    """The stripped text of an answer that passes `check`."""
    answer = await ask(Job(messages=messages, step=step, template=context.templates.version, **more))
    return check(answer, item)


def check(answer: Answer, item: Item) -> str:
    """The stripped text of an answer; Drop where it is empty, cut at its length, refused, or holds what is no text.

    A model whose tokens are bytes may write control characters, which no source of a recipe may hold.  What the item names as
    its right answer is no refusal ("I am very sorry." is one of the rules' manners).
    """
    text = answer.text.strip()
    if answer.finish_reason == "length":
        raise Drop("cut", {"text": text})
    right = item.get("meta", {}).get("answer")
    if answer.finish_reason == "content_filter" or (text != right and cleaning.is_refusal(text)):
        raise Drop("refused", {"text": text})
    if not text:
        raise Drop("empty")
    if problem := encodings.problem(text):
        raise Drop("not_text", {"text": text, "message": problem})
    return text


def check_language(context: Context, text: str, language: str) -> str:
    """The text; Drop where it is of another language.  An empty `language` takes any."""
    if language and not context.dry_run and not cleaning.in_language(text, language):
        raise Drop("language", {"text": text})
    return text


async def question(ask: Ask, context: Context, item: Item, step: str, template: str, **values: str) -> str:
    """A question that the model writes when it is asked with a template."""
    prompt = context.templates.render(template, **values)
    text = cleaning.question(await call(ask, context, item, step, [message("user", prompt)]))
    if not text:
        raise Drop("empty")
    return check_language(context, text, context.synth.language)


async def answer(ask: Ask, context: Context, item: Item, step: str, messages: Messages, language: str) -> str:
    """What the model says to a conversation that ends with the user, with no instruction beside it."""
    text = cleaning.answer(await call(ask, context, item, step, messages))
    if not text:
        raise Drop("empty")
    return check_language(context, text, language)


def meta(context: Context, item: Item, **more: object) -> dict[str, object]:
    """What a row says of itself: the method, the seed, and what the seed says of itself."""
    seed = {name: item[name] for name in ("persona", "task", "topic", "category") if name in item}
    return {**item.get("meta", {}), "method": context.synth.method, "item": item["id"], **seed, **more}
