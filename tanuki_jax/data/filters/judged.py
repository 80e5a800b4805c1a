"""Filters that ask a judge: Ask-LLM's quality score, and whether later questions of a dialogue need what came before.

Ask-LLM (Sachdeva et al., 2024) takes the probability of "yes" as the score; it is that of the first token where the server
gives log-probabilities, else 1 or 0 by what the answer says.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tanuki_jax import files
from tanuki_jax.config.synthesis import Endpoint, Filters
from tanuki_jax.data.filters.texts import JAPANESE, text_of, texts_of
from tanuki_jax.data.sources import Row
from tanuki_jax.endpoint import runner
from tanuki_jax.endpoint.client import Client
from tanuki_jax.endpoint.job import Answer, Ask, Drop, Job
from tanuki_jax.errors import UserError

VERSION = "1"  # of the prompts
ROLE = "judge"
MAX_CHARACTERS = 4000  # of a text that the judge sees
SAMPLING: Mapping[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 4, "logprobs": 20}
YES, NO = frozenset(("yes", "y", "はい")), frozenset(("no", "n", "いいえ"))

QUALITY = {
    "ja": """次の ### で囲まれた文章は、言語モデルの訓練に役立ちますか。\
書式が整い、内容が正確で、知識や考え方を学べる文章なら yes、\
宣伝、定型文、壊れた文、空疎な文章なら no と答えてください。

###
{text}
###

yes か no の一語だけで答えてください。""",
    "en": """Would the text between the two ### help to train a language model? \
Answer yes if it is well formed and accurate, and one can learn from it how the world is or how to think; \
answer no if it is advertising, boilerplate, broken, or empty of content.

###
{text}
###

Answer with one word alone, yes or no.""",
}
DEPENDENT = {
    "ja": """次は、対話の途中までと、それに続く質問です。

<対話>
{before}
</対話>

<質問>
{question}
</質問>

この質問は、対話の内容を受けたもので、対話を知らなければ正しく答えられませんか。\
対話が必要なら yes、質問だけで答えられるなら no と、一語だけで答えてください。""",
    "en": """Here are the beginning of a conversation and the question that follows it.

<conversation>
{before}
</conversation>

<question>
{question}
</question>

Does the question build on the conversation, so that it could not be answered well without it? \
Answer with one word alone: yes if the conversation is needed, no if the question alone is enough.""",
}


class NoVerdict(Drop):
    """An answer of the judge that says neither yes nor no."""


def probability_of_yes(answer: Answer) -> float:
    """P(yes) / (P(yes) + P(no)) of an answer's first token; without log-probabilities, 1 or 0.

    Raises:
      NoVerdict: neither word is there.
    """
    chances = {True: 0.0, False: 0.0}
    for token, logprob in answer.logprobs.items():
        word = token.strip().casefold()
        if word in YES or word in NO:
            chances[word in YES] += math.exp(logprob)
    if sum(chances.values()) > 0:
        return chances[True] / sum(chances.values())
    first = re.match(r"[\W_]*(\w+)", answer.text.strip().casefold())
    word = first[1] if first else ""
    if word in YES or word in NO:
        return float(word in YES)
    raise NoVerdict("no_verdict", {"answer": answer.text[:200]})


async def judge(item: Mapping[str, Any], ask: Ask, *, quality: bool, dependent: bool) -> Sequence[Mapping[str, Any]]:
    """A chain: from a row to {"number", "quality", "dependent"}.

    item: number, fields (a row's), and language.
    quality, dependent: what is asked; `dependent` of the answer is the least probability of any later question.
    """
    row, language = Row("", dict(item["fields"])), item["language"]
    verdict: dict[str, Any] = {"number": item["number"]}
    if dependent:
        turns = [m for m in row.fields.get("messages", ()) if m.get("role") in ("user", "assistant") and text_of(m)]
        later = [i for i, m in enumerate(turns) if m["role"] == "user"][1:]
        chances = []
        for number in later:
            before = "\n".join(f"{m['role']}: {text_of(m)}" for m in turns[:number])
            prompt = DEPENDENT[language].format(
                before=before[-MAX_CHARACTERS:], question=text_of(turns[number])[:MAX_CHARACTERS]
            )
            chances.append(await _chance(ask, prompt, f"dependent_{number}"))
        if chances:
            verdict["dependent"] = min(chances)
    if quality:
        prompt = QUALITY[language].format(text=texts_of(row).whole[:MAX_CHARACTERS])
        verdict["quality"] = await _chance(ask, prompt, "quality")
    return [verdict]


async def _chance(ask: Callable[[Job], Awaitable[Answer]], prompt: str, step: str) -> float:
    message = {"role": "user", "content": prompt}
    return probability_of_yes(await ask(Job([message], step=step, role=ROLE, template=VERSION, sampling=SAMPLING)))


class _Items:
    """The rows of a file as items of a run, read again at each iteration."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, fields in enumerate(files.read_jsonl(self._path)):
            language = "ja" if JAPANESE.search(texts_of(Row("", fields)).whole) else "en"
            yield files.fingerprint(fields), {"number": number, "fields": fields, "language": language}


def judge_file(
    path: Path, count: int, filters: Filters, endpoint: Endpoint, directory: Path, quiet: bool = False
) -> Iterator[tuple[str, str]]:
    """Has the rows of a file judged; returns the reason and detail of each that is to be dropped, of others ("", "").

    path: rows as JSON lines, `count` of them.
    directory: where answers are recorded; they are never asked for again.

    Raises:
      UserError: the endpoint does not work, or some rows have no verdict yet; the same call asks for theirs alone.
      Preempted: a signal came; answers are saved.
    """
    chain = functools.partial(judge, quality=filters.min_quality > 0, dependent=filters.dependent_turns)
    (directory / runner.DONE).unlink(missing_ok=True)  # the rows may be others now; the answers are found by what was asked
    summary = runner.run(
        _Items(path, count), chain, {ROLE: Client(endpoint, filters.judge)}, directory,
        recipe=f"filters {VERSION}", label="judge", quiet=quiet,
    )  # fmt: skip
    if not summary.complete:
        failures = ", ".join(f"{kind}: {number}" for kind, number in summary.failed.items())
        raise UserError(
            f"filters: {sum(summary.failed.values())} rows have no verdict yet ({failures}); run the same command again"
        )
    return read_verdicts(directory / "rows.jsonl", count, filters)


def read_verdicts(path: Path, count: int, filters: Filters) -> Iterator[tuple[str, str]]:
    """Reason and detail for each of `count` rows, ("", "") of one that passes, from the rows of a run, one by one.

    A row without a verdict among them is dropped.
    """
    verdicts = files.read_jsonl(path)
    verdict = next(verdicts, None)
    for number in range(count):
        if verdict is None or verdict["number"] != number:
            yield "no_verdict", "the judge said neither yes nor no, or refused"
            continue
        if verdict.get("dependent", 1.0) < 0.5:
            yield "dependent_turns", f"probability {verdict['dependent']:.2f}"
        elif filters.min_quality and verdict["quality"] < filters.min_quality:
            yield "min_quality", f"probability {verdict['quality']:.2f}"
        else:
            yield "", ""
        verdict = next(verdicts, None)
