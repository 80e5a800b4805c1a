"""Chains that make dialogues and documents: what is asked after what.  Each is a pure function of the item and the answers."""

from __future__ import annotations

import asyncio
from hashlib import blake2b

from tanuki_jax.endpoint import Drop, Job
from tanuki_jax.synth import asking, cleaning
from tanuki_jax.synth.asking import Ask, Chain, Context, Row, message
from tanuki_jax.synth.seeds import Item

GENERAL = {"ja": "一般", "en": "general"}  # the category of a topic that names none


def answer(context: Context) -> Chain:
    """Answers to the questions of a prompt, one after the other; the answers that it came with are replaced."""

    async def chain(item: Item, ask: Ask) -> list[Row | Drop]:
        language = item.get("meta", {}).get("lang", "")
        messages = []
        number = 0
        for asked in item["messages"]:
            if asked["role"] == "assistant":
                continue
            messages.append(asked)
            if asked["role"] == "user":
                number += 1
                text = await asking.answer(ask, context, item, f"a{number}", messages, language)
                messages = [*messages, message("assistant", text)]
        return [{"messages": messages, "meta": asking.meta(context, item)}]

    return chain


def dialogue(context: Context) -> Chain:
    """A question of a persona or about a topic, its answer, and further turns that depend on them."""
    synth = context.synth

    async def chain(item: Item, ask: Ask) -> list[Row | Drop]:
        values: dict[str, str] = {name: item[name] for name in ("persona", "task", "topic") if name in item}
        values["category"] = item.get("category") or GENERAL[synth.language]
        messages: asking.Messages = []
        for turn in range(1, synth.turns + 1):
            step = "follow_up" if messages else "question"
            text = await asking.question(
                ask, context, item, f"q{turn}", step, conversation=asking.transcribe(messages, synth.language), **values
            )
            if any(text == m["content"] for m in messages):
                raise Drop("repeated question", {"text": text})
            messages = [*messages, message("user", text)]
            text = await asking.answer(ask, context, item, f"a{turn}", messages, synth.language)
            messages = [*messages, message("assistant", text)]
        return [{"messages": messages, "meta": asking.meta(context, item)}]

    return chain


def styles(context: Context) -> tuple[str, ...]:
    """The styles that a document is rewritten in."""
    return context.synth.styles or tuple(context.templates.texts)


def rewrite(context: Context) -> Chain:
    """A document in many styles, so that a fact is met in many forms; one row for each.

    Knowledge that is stated once is stored but not extracted; it needs several wordings (Allen-Zhu and Li, "Physics of Language
    Models, Part 3.1", to which the paper refers).  A style that fails is left out and counted; the document's others stay.
    """
    synth = context.synth
    other = {"ja": "en", "en": "ja"}[synth.language]

    async def write(item: Item, ask: Ask, style: str) -> Row | Drop:
        notes = asking.meta(context, item, style=style)
        prompt = context.templates.render(style, document=item["document"])
        try:
            text = await asking.call(ask, context, item, style, [message("user", prompt)])
            if text == item["document"].strip():
                raise Drop("unchanged")
            asking.check_language(context, text, other if style == "translation" else synth.language)
        except Drop as drop:
            return Drop(drop.reason, {**(drop.row or {}), "meta": notes, "steps": [style]})
        return {"text": text, "meta": notes, "steps": [style]}

    async def chain(item: Item, ask: Ask) -> list[Row | Drop]:
        return list(await asyncio.gather(*(write(item, ask, style) for style in styles(context))))

    return chain


def magpie(context: Context) -> Chain:
    """A question that an aligned model makes up when it sees the beginning of a user's turn, and its answer.

    Xu et al., "Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with Nothing".
    """
    texts = context.templates.texts

    async def chain(item: Item, ask: Ask) -> list[Row | Drop]:
        job = Job(
            prompt=texts["prefix"],
            step="q1",
            template=context.templates.version,
            sampling={"stop": [texts["stop"]]},
        )
        text = cleaning.question(asking.check(await ask(job), item).split(texts["stop"])[0])
        if not text:
            raise Drop("empty")
        asking.check_language(context, text, context.synth.language)
        messages = [message("user", text)]
        reply = await asking.answer(ask, context, item, "a1", messages, context.synth.language)
        return [{"messages": [*messages, message("assistant", reply)], "meta": asking.meta(context, item)}]

    return chain


def evol(context: Context) -> Chain:
    """A prompt that is made harder, `rounds` times in ways that the item decides, and then answered.

    Xu et al., "WizardLM: Empowering Large Language Models to Follow Complex Instructions" (Evol-Instruct).
    """
    synth, ways = context.synth, sorted(context.templates.texts)

    async def chain(item: Item, ask: Ask) -> list[Row | Drop]:
        *before, last = item["messages"]
        text = last["content"]
        chosen: list[str] = []
        for number in range(1, synth.rounds + 1):
            digest = blake2b(f"{item['id']} {number}".encode(), digest_size=8).digest()
            way = ways[int.from_bytes(digest, "big") % len(ways)]
            harder = await asking.question(ask, context, item, f"{way} {number}", way, prompt=text)
            if harder == text.strip():
                raise Drop("unchanged")
            text, chosen = harder, [*chosen, way]
        messages = [*before, message("user", text)]
        reply = await asking.answer(ask, context, item, "answer", messages, synth.language)
        notes = asking.meta(context, item, ways=chosen, original=last["content"])
        notes.pop("answer", None)  # of the prompt as it was
        return [{"messages": [*messages, message("assistant", reply)], "meta": notes}]

    return chain
