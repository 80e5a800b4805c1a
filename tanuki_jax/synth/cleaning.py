"""Cleans what a model says: labels, quotation marks, refusals, another language than the one that was asked for.

Words of labels and refusals stand in data/filters/leaks_ja.toml and leaks_en.toml.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from tanuki_jax.data.filters.leaks import load_signs
from tanuki_jax.data.filters.texts import without_code
from tanuki_jax.data.scripts import count_letters

BEFORE = r"[\s*#_【\[(]{0,6}"  # of a label, bold or in brackets
AFTER = r"\s?\d{0,2}[*_】\])]{0,3}\s?(?:[:：]|(?<=】))[*_]{0,2}"
QUOTES = {"「": "」", "『": "』", '"': '"', "“": "”", "'": "'"}
CODE = re.compile(r"`[^`\n]*`")
QUOTED = re.compile(r"「[^「」\n]*」|『[^『』\n]*』|“[^“”\n]*”|\"[^\"\n]*\"")
FEW_LETTERS = 8  # below which a text shows no language


class _Labels(NamedTuple):
    """Patterns of labels: of a question and of an answer at the beginning, and of an answer within a question's text."""

    question: re.Pattern[str]
    answer: re.Pattern[str]
    inner_answer: re.Pattern[str]


@functools.cache
def _labels() -> _Labels:
    signs = load_signs()
    questions, answers = signs.question_labels.pattern, signs.answer_labels.pattern
    return _Labels(
        re.compile(rf"\A{BEFORE}(?:{questions}|Q){AFTER}", re.IGNORECASE),
        re.compile(rf"\A{BEFORE}(?:{answers}|A|AI){AFTER}", re.IGNORECASE),
        re.compile(rf"^{BEFORE}(?:{answers}|模範解答|ヒント|Hint){AFTER}", re.IGNORECASE | re.MULTILINE),
    )


def question(text: str) -> str:
    """A question without its label, the quotation marks around it, and an answer that follows it."""
    text = _unquote(_labels().question.sub("", text.strip()))
    answer = _labels().inner_answer.search(text)
    if answer and answer.start() > 0:
        text = text[: answer.start()]
    return _unquote(text)


def answer(text: str) -> str:
    """An answer without its label; the rest of it is the model's."""
    return _labels().answer.sub("", text.strip()).strip()


def _unquote(text: str) -> str:
    """Text without quotation marks that enclose the whole of it."""
    text = text.strip()
    while len(text) > 1 and QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1] and text[-1] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def is_refusal(text: str) -> bool:
    """Whether a model declines to answer: it says that it cannot, and not only that it is sorry."""
    return load_signs().refusals.match(text.strip()) is not None


def in_language(text: str, language: str) -> bool:
    """Whether a text may be of a language (ja or en), by its letters; code, addresses and quotations aside.

    Japanese needs a kana where it is no short run of kanji; a text with hardly any letters is of every language.  Letters do
    not tell English from French: the filter `language` does (data/filters/language.py).
    """
    text = QUOTED.sub("", CODE.sub("", without_code(text)))
    letters = count_letters(text)
    japanese, others = (
        letters.kana + letters.kanji,
        sum(c.isalpha() for c in text) - letters.kana - letters.kanji - letters.latin,
    )
    total = japanese + letters.latin + others
    if total < FEW_LETTERS:
        return others == 0 and (language != "en" or japanese == 0)
    if language == "ja":
        return letters.kana > 0 and japanese >= 0.2 * total and others < 0.3 * total
    return letters.latin >= 0.7 * total
