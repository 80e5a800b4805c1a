"""Two questions to begin a conversation with, one in each language, that the model has shown to answer rightly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

Row = Mapping[str, Any]  # a held-out prompt: family, lang, messages, answer; `given` is what the model said
Answers = Callable[[list[list[dict[str, str]]]], list[str]]


def suggested_questions(
    rows: Sequence[Row], families: Mapping[str, float], correct: Callable[[Any, str], bool], answers: Answers, batch_size: int
) -> list[str]:
    """The questions, or none where no two are answered rightly.

    A model that was trained on conversations about one thing may answer a question well, and badly after another one.  So
    each of the two has been asked alone, and after the other.

    Args:
      families: family -> share of right answers; the best are tried first.
      answers: conversations that end with the user -> what the model says, asked for `batch_size` at once.
    """
    right = [row for row in rows if len(row["messages"]) == 1 and correct(row, row["given"])]
    right.sort(key=lambda row: -families.get(row["family"], 0.0))
    languages = [[row for row in right if row["lang"] == lang] for lang in ("ja", "en")]
    pairs = sorted(product(*languages), key=lambda pair: -sum(families.get(row["family"], 0.0) for row in pair))
    pairs = [pair for pair in pairs if pair[0]["family"] != pair[1]["family"]] or pairs  # two families show more than one
    if not pairs or batch_size < 2:
        return []
    pairs = pairs[: batch_size // 2]
    asked = [_after(*order) for pair in pairs for order in (pair, pair[::-1])]
    filled = (asked * batch_size)[: batch_size // 2 * 2]  # always as many, so that they are compiled for once
    given = answers(filled)[: len(asked)]
    for (one, other), to_other, to_one in zip(pairs, given[::2], given[1::2], strict=True):
        if correct(other, to_other) and correct(one, to_one):
            return [row["messages"][0]["content"] for row in (one, other)]
    return []


def _after(first: Row, second: Row) -> list[dict[str, str]]:
    return [*first["messages"], {"role": "assistant", "content": first["given"]}, *second["messages"]]
