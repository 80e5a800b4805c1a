"""Parts of a prompt, of a template, or of an assistant's manners in what should be the answer alone."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import NamedTuple

from tanuki_jax.data.filters.texts import JAPANESE, Answer

LANGUAGES = ("ja", "en")
COPIED = {"ja": 12, "en": 24}  # letters of the shortest instruction that counts as copied
_SENTENCE_END = re.compile(r"(?<=[。！？!?])|(?<=[.!?])\s|\n")
_QUOTED = re.compile(r"「[^「」]*」|『[^『』]*』|“[^“”]*”|\"[^\"\n]*\"")
_NO_LETTER = re.compile(r"[\W_]+")


class Signs(NamedTuple):
    """The patterns of leaks_ja.toml and leaks_en.toml, both languages together; see there."""

    headings: re.Pattern[str]
    openings: re.Pattern[str]
    answer_openings: re.Pattern[str]
    translations: re.Pattern[str]
    translation_requests: re.Pattern[str]
    instructions: re.Pattern[str]
    phrases: dict[str, re.Pattern[str]]  # by a word, in lower case, without which none of them is there


@functools.cache
def load_signs() -> Signs:
    """The patterns, compiled."""
    folder = resources.files("tanuki_jax.data.filters")
    tables = [tomllib.loads((folder / f"leaks_{language}.toml").read_text("utf-8")) for language in LANGUAGES]
    lists = {name: [pattern for table in tables for pattern in table[name]] for name in Signs._fields if name != "phrases"}
    phrases = {word: _compile(patterns) for table in tables for word, patterns in table["phrases"].items()}
    return Signs(**{name: _compile(patterns) for name, patterns in lists.items()}, phrases=phrases)


def _compile(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE | re.MULTILINE)


def find_leak(answer: Answer) -> str:
    """What has leaked into an answer or document; empty = nothing."""
    signs = load_signs()
    heading = next((m for m in signs.headings.finditer(answer.text) if m[0].strip() not in answer.prompt), None)
    if heading:
        return f"heading {heading[0].strip()!r}"
    lower = answer.text.casefold()
    matches = (pattern.search(answer.text) for word, pattern in signs.phrases.items() if word in lower)
    if phrase := next((match for match in matches if match and match[0] not in answer.prompt), None):
        return f"phrase {phrase[0]!r}"
    beginning = answer.text.lstrip()
    openings = (signs.openings,) if answer.is_document else (signs.openings, signs.answer_openings)
    if opening := next(filter(None, (pattern.match(beginning) for pattern in openings)), None):
        return f"opening {opening[0]!r}"
    translation = signs.translations.search(answer.text)
    if translation and not signs.translation_requests.search(answer.prompt):
        return f"translation {translation[0].strip()!r}"
    copied = next(_copied(answer, signs.instructions), "")
    return f"instruction {copied!r}" if copied else ""


def _copied(answer: Answer, instructions: re.Pattern[str]) -> Iterator[str]:
    """Instructions of the prompt, and any sentence of the system's, that the answer holds word for word."""
    if answer.is_document:
        return
    letters = _letters(answer.text)
    for source, condition in ((answer.system, None), (answer.prompt, instructions)):
        for sentence in _sentences(source):
            if condition and not condition.search(sentence.rstrip("。.!?！？ ")):
                continue
            copy = _letters(sentence)
            shortest = COPIED["ja" if JAPANESE.search(sentence) else "en"]
            if len(copy) >= shortest and copy in letters:
                yield sentence


def _sentences(text: str) -> list[str]:
    """Sentences of a prompt, without what it quotes."""
    return [sentence.strip() for sentence in _SENTENCE_END.split(_QUOTED.sub(" ", text)) if sentence and sentence.strip()]


def _letters(text: str) -> str:
    return _NO_LETTER.sub("", text).casefold()
