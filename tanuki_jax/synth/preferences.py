"""Preference pairs of a model's own answers: sampled, judged in both orders by a model or by rules, and kept where both agree."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tanuki_jax.config.synthesis import BETTER, JUDGE, RULES, decider
from tanuki_jax.endpoint import Drop, Job
from tanuki_jax.errors import UserError
from tanuki_jax.synth import asking, rules, templates, verdicts
from tanuki_jax.synth.asking import Ask, Chain, Context, Messages, Row, message
from tanuki_jax.synth.seeds import Item

IDENTICAL, ALL_WRONG, CYCLE = "identical", "all_wrong", "cycle"  # why a prompt gave no pair, beside verdicts and drops


@dataclass(frozen=True)
class Samples:
    """What a model answers a prompt: the different usable texts, how many they were, and why others are not used."""

    texts: tuple[str, ...]
    usable: int
    unusable: Mapping[str, int]

    def lacks(self) -> str:
        """Why there are no two texts to compare; empty = there are."""
        if len(self.texts) > 1:
            return ""
        return IDENTICAL if self.usable > 1 else max(self.unusable, key=lambda reason: self.unusable[reason])


def chain(context: Context) -> Chain:
    """The chain of the recipe's entry: two models compared, rules, or a judge.

    A prompt gives at most one pair, so that no prompt weighs more than another.  A prompt without a pair gives a Drop with its
    answers and verdicts.
    """
    decide = DECIDERS[decider(context.synth)]

    async def of_item(item: Item, ask: Ask) -> list[Row | Drop]:
        return [await decide(context, item, ask)]

    return of_item


async def _samples(context: Context, item: Item, ask: Ask) -> Samples:
    """Answers of the generator; those that will not do are counted."""

    async def sample(number: int) -> str | Drop:
        try:
            return await asking.call(ask, context, item, "answer", item["messages"], sample=number)
        except Drop as drop:
            return drop

    results = await asyncio.gather(*(sample(number) for number in range(context.synth.samples)))
    texts = [result for result in results if isinstance(result, str)]
    unusable = Counter(result.reason for result in results if isinstance(result, Drop))
    return Samples(tuple(dict.fromkeys(texts)), len(texts), dict(unusable))


async def _by_better(context: Context, item: Item, ask: Ask) -> Row | Drop:
    """The answer of a better model is chosen over the generator's, as in the paper's iterative variant; nobody judges."""
    chosen, rejected = await asyncio.gather(
        asking.call(ask, context, item, "answer", item["messages"], role="better"),
        asking.call(ask, context, item, "answer", item["messages"]),
    )
    samples = Samples((chosen, rejected), 2, {})
    if chosen == rejected:
        return _drop(context, item, IDENTICAL, samples, [])
    return _pair(context, item, chosen, rejected, samples, [])


async def _by_rules(context: Context, item: Item, ask: Ask) -> Row | Drop:
    """The right answer against the first wrong one: of different answers at most one is right.  Rules see no order."""
    notes = item.get("meta", {})
    if "answer" not in notes:
        raise UserError("synth: judge = 'rules' checks prompts whose `meta` has the right answer, as rules:prompts have")
    samples = await _samples(context, item, ask)
    if reason := samples.lacks():
        return _drop(context, item, reason, samples, [])
    right = [text for text in samples.texts if rules.correct(notes, text)]
    wrong = [text for text in samples.texts if text not in right]
    if not right:
        return _drop(context, item, ALL_WRONG, samples, [])
    return _pair(context, item, right[0], wrong[0], samples, [])


async def _by_model(context: Context, item: Item, ask: Ask) -> Row | Drop:
    """Every two answers are compared in both orders; the answer with most wins against that with fewest, if they agree there.

    A win is a comparison whose verdicts agree in both orders.  Ties of wins go to the earlier sample.
    """
    samples = await _samples(context, item, ask)
    if reason := samples.lacks():
        return _drop(context, item, reason, samples, [])
    answers = samples.texts
    pairs = list(combinations(range(len(answers)), 2))
    compared = await asyncio.gather(*(_compare(context, item, ask, answers, pair) for pair in pairs))
    score = [0] * len(answers)
    for record in compared:
        if record["winner"] is not None:
            score[record["winner"]] += 1
            score[record["loser"]] -= 1
    order = sorted(range(len(answers)), key=lambda i: -score[i])
    best, worst = order[0], order[-1]
    [last] = [record for record in compared if {*record["answers"]} == {best, worst}]
    if last["winner"] != best:
        return _drop(context, item, last["outcome"] if last["winner"] is None else CYCLE, samples, compared)
    return _pair(context, item, answers[best], answers[worst], samples, compared)


DECIDERS: Mapping[str, Callable[[Context, Item, Ask], Awaitable[Row | Drop]]] = {
    BETTER: _by_better,
    RULES: _by_rules,
    JUDGE: _by_model,
}


async def _compare(context: Context, item: Item, ask: Ask, answers: Sequence[str], pair: tuple[int, int]) -> dict[str, Any]:
    """One comparison in both orders, with the judge's texts."""

    async def verdict(a: int, b: int) -> str | None:
        messages = judge_messages(context.templates.texts, item["messages"], answers[a], answers[b], context.synth.language)
        job = Job(
            messages=messages,
            role="judge",
            step=f"judge {a} {b}",
            template=context.templates.version,
            sampling={"temperature": 0.0},
        )
        try:
            result = await ask(job)
        except Drop:
            return None
        return "" if result.finish_reason == "length" else result.text

    i, j = pair
    texts = await asyncio.gather(verdict(i, j), verdict(j, i))
    outcome, winner = verdicts.judge(*texts)
    return {
        "answers": [i, j],
        "outcome": outcome,
        "winner": None if winner < 0 else pair[winner],
        "loser": None if winner < 0 else pair[1 - winner],
        "texts": list(texts),
    }


def judge_messages(
    texts: Mapping[str, str], prompt: Sequence[Mapping[str, str]], answer_a: str, answer_b: str, language: str
) -> Messages:
    """What the judge is asked.

    Ours, or FastChat's: its prompt of two turns where the user speaks twice; the earlier answer, which both share, stands on
    both sides.  A longer conversation is the question of the prompt of one turn, as text.
    """
    turns = [m for m in prompt if m["role"] != "system"]
    values = {"answer_a": answer_a, "answer_b": answer_b}
    if templates.MULTI_TURN in texts and [m["role"] for m in turns] == ["user", "assistant", "user"]:
        name, (first, reply, second) = templates.MULTI_TURN, (m["content"] for m in turns)
        values = {"question_1": first, "question_2": second, "answer_a_1": reply, "answer_b_1": reply}
        values |= {"answer_a_2": answer_a, "answer_b_2": answer_b}
    else:
        name = templates.PAIR if templates.PAIR in texts else "judge"
        values["question"] = turns[0]["content"] if len(turns) == 1 else asking.transcribe(turns, language)
    system = texts["system" if name == "judge" else f"{name} system"]
    return [message("system", system), message("user", templates.fill(texts[name], values))]


def _pair(
    context: Context, item: Item, chosen: str, rejected: str, samples: Samples, compared: Sequence[Mapping[str, Any]]
) -> Row:
    """A row in the format that DPO stages and TRL read."""
    return {
        "prompt": item["messages"],
        "chosen": [message("assistant", chosen)],
        "rejected": [message("assistant", rejected)],
        "meta": _notes(context, item, samples, compared),
    }


def _drop(context: Context, item: Item, reason: str, samples: Samples, compared: Sequence[Mapping[str, Any]]) -> Drop:
    notes = _notes(context, item, samples, compared)
    return Drop(reason, {"prompt": item["messages"], "answers": list(samples.texts), "meta": notes})


def _notes(context: Context, item: Item, samples: Samples, compared: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """What a row says of itself, with the verdicts, and the samples that are not used."""
    more = {"verdicts": list(compared), "unusable": dict(samples.unusable)}
    notes = {name: value for name, value in asking.meta(context, item).items() if name not in more}  # of an earlier pair
    return notes | {name: value for name, value in more.items() if value}
