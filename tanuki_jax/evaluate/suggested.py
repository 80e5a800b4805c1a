"""Two questions to begin a conversation with, one per language, that the model has answered rightly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]  # a held-out prompt: family, lang, messages, answer; `given` is the model's answer
Answers: TypeAlias = Callable[[list[list[dict[str, str]]]], list[str]]


def suggested_questions(
    rows: Sequence[Row], families: Mapping[str, float], correct: Callable[[Row, str], bool], answers: Answers, batch_size: int
) -> list[str]:
    """The questions, or none where no two are answered rightly.

    A model that was trained on conversations about one topic may answer a question well alone, and badly after another one.
    So each of the two is asked alone, and after the other.

    Args:
      families: family -> share of right answers; the best are tried first.
      answers: conversations that end with the user -> the model's answers, for `batch_size` conversations at a time.
    """
    right = [row for row in rows if len(row["messages"]) == 1 and correct(row, row["given"])]
    right.sort(key=lambda row: -families.get(row["family"], 0.0))
    languages = [[row for row in right if row["lang"] == lang] for lang in ("ja", "en")]
    pairs = sorted(product(*languages), key=lambda pair: -sum(families.get(row["family"], 0.0) for row in pair))
    pairs = [pair for pair in pairs if pair[0]["family"] != pair[1]["family"]] or pairs  # two families show more than one does
    if not pairs or batch_size < 2:
        return []
    pairs = pairs[: batch_size // 2]
    conversations = [_ask_after(*order) for pair in pairs for order in (pair, pair[::-1])]
    padded = (conversations * batch_size)[: batch_size // 2 * 2]  # always one number, so that one program is compiled
    responses = answers(padded)[: len(conversations)]
    for (first, second), to_second, to_first in zip(pairs, responses[::2], responses[1::2], strict=True):
        if correct(second, to_second) and correct(first, to_first):
            return [row["messages"][0]["content"] for row in (first, second)]
    return []


def _ask_after(first: Row, second: Row) -> list[dict[str, str]]:
    return [*first["messages"], {"role": "assistant", "content": first["given"]}, *second["messages"]]
