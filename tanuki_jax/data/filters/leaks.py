"""Parts of a prompt, of a template, or of an assistant's manners in what should be the answer alone."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterable
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
    phrases: re.Pattern[str]
    openings: re.Pattern[str]
    answer_openings: re.Pattern[str]
    translations: re.Pattern[str]
    translation_requests: re.Pattern[str]
    instructions: re.Pattern[str]


@functools.cache
def load_signs() -> Signs:
    """The patterns, compiled."""
    folder = resources.files("tanuki_jax.data.filters")
    tables = [tomllib.loads((folder / f"leaks_{language}.toml").read_text("utf-8")) for language in LANGUAGES]
    flags = re.IGNORECASE | re.MULTILINE
    return Signs(*(re.compile("|".join(f"(?:{p})" for table in tables for p in table[name]), flags) for name in Signs._fields))


def find_leak(answer: Answer) -> str:
    """What has leaked into an answer or document; empty = nothing."""
    signs = load_signs()
    heading = next((m for m in signs.headings.finditer(answer.text) if m[0].strip() not in answer.prompt), None)
    if heading:
        return f"heading {heading[0].strip()!r}"
    if phrase := signs.phrases.search(answer.text):
        return f"phrase {phrase[0]!r}" if phrase[0] not in answer.prompt else ""
    beginning = answer.text.lstrip()
    openings = (signs.openings,) if answer.is_document else (signs.openings, signs.answer_openings)
    if opening := next(filter(None, (pattern.match(beginning) for pattern in openings)), None):
        return f"opening {opening[0]!r}"
    translation = signs.translations.search(answer.text)
    if translation and not signs.translation_requests.search(answer.prompt):
        return f"translation {translation[0].strip()!r}"
    copied = next(_copied(answer, signs.instructions), "")
    return f"instruction {copied!r}" if copied else ""


def _copied(answer: Answer, instructions: re.Pattern[str]) -> Iterable[str]:
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
