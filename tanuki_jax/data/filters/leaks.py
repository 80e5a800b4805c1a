"""Parts of a prompt, of a template, or of an assistant's manners in what should be the answer alone."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import NamedTuple

from tanuki_jax.config.synthesis import LANGUAGES
from tanuki_jax.data.filters.texts import JAPANESE, Answer

COPIED = {"ja": 12, "en": 24}  # letters of the shortest instruction that counts as copied
NEARLY = 0.7  # share of an instruction in one piece at the beginning of an answer that counts, too ("... を説明します。")
BEGINNING = 200  # letters of an answer that are its beginning
_SENTENCE_END = re.compile(r"(?<=[。！？!?])|(?<=[.!?])\s|\n")
_QUOTED = re.compile(r"「[^「」]*」|『[^『』]*』|“[^“”]*”|\"[^\"\n]*\"")
_ENGLISH_WORDS = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{1,}\s+[A-Za-z]{2,}")
_NO_LETTER = re.compile(r"[\W_]+")


class Signs(NamedTuple):
    """The patterns of leaks_ja.toml and leaks_en.toml, both languages together; see there."""

    headings: re.Pattern[str]
    speakers: re.Pattern[str]
    turns: re.Pattern[str]
    turn_requests: re.Pattern[str]
    openings: re.Pattern[str]
    answer_openings: re.Pattern[str]
    document_openings: re.Pattern[str]
    identity_questions: re.Pattern[str]
    translations: re.Pattern[str]
    translation_requests: re.Pattern[str]
    instructions: re.Pattern[str]
    question_labels: re.Pattern[str]
    answer_labels: re.Pattern[str]
    refusals: re.Pattern[str]
    phrases: dict[str, re.Pattern[str]]  # by a word, in lower case, without which none of them is there


@functools.cache
def load_signs() -> Signs:
    """The patterns, compiled."""
    folder = resources.files("tanuki_jax.data.filters")
    tables = [tomllib.loads((folder / f"leaks_{language}.toml").read_text("utf-8")) for language in LANGUAGES]
    lists = {name: [pattern for table in tables for pattern in table[name]] for name in Signs._fields if name != "phrases"}
    phrases: dict[str, list[str]] = {}
    for word, patterns in (item for table in tables for item in table["phrases"].items()):
        phrases.setdefault(word, []).extend(patterns)
    compiled = {word: _compile(patterns) for word, patterns in phrases.items()}
    return Signs(**{name: _compile(patterns) for name, patterns in lists.items()}, phrases=compiled)


def _compile(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE | re.MULTILINE)


def find_leak(answer: Answer) -> str:
    """What has leaked into an answer or document; empty = nothing."""
    signs = load_signs()
    return (
        _find_heading(answer, signs)
        or _find_phrase(answer, signs)
        or _find_opening(answer, signs)
        or _find_translation(answer, signs)
        or next((f"instruction {sentence!r}" for sentence in _copied(answer, signs.instructions)), "")
    )


def _find_heading(answer: Answer, signs: Signs) -> str:
    headings = [match[0].strip() for match in signs.headings.finditer(answer.text)]
    speakers = list({match[0].strip() for match in signs.speakers.finditer(answer.text)})
    if len(speakers) > 1 or not answer.is_document:
        headings += sorted(speakers)
    if not answer.is_document and not signs.turn_requests.search(answer.prompt):
        turns = sorted({match[0].strip() for match in signs.turns.finditer(answer.text)})
        headings += turns if len(turns) > 1 else []
    return next((f"heading {heading!r}" for heading in headings if heading not in answer.prompt), "")


def _find_phrase(answer: Answer, signs: Signs) -> str:
    if answer.question and signs.identity_questions.search(answer.question):
        return ""
    lower = answer.text.casefold()
    matches = (pattern.search(answer.text) for word, pattern in signs.phrases.items() if word in lower)
    return next((f"phrase {match[0]!r}" for match in matches if match and match[0] not in answer.prompt), "")


def _find_opening(answer: Answer, signs: Signs) -> str:
    beginning = answer.text.lstrip()
    for pattern in (signs.openings, signs.document_openings if answer.is_document else signs.answer_openings):
        if match := pattern.match(beginning):
            return f"opening {match[0]!r}"
    first, _, others = beginning.partition("\n")
    foreign = first.rstrip().endswith(":") and _ENGLISH_WORDS.search(first) and not JAPANESE.search(first)
    return (
        f"opening {first!r}"
        if foreign and JAPANESE.search(others) and not signs.translation_requests.search(answer.prompt)
        else ""
    )


def _find_translation(answer: Answer, signs: Signs) -> str:
    match = signs.translations.search(answer.text)
    return f"translation {match[0].strip()!r}" if match and not signs.translation_requests.search(answer.prompt) else ""


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
            if len(copy) >= shortest and (copy in letters or _repeats(letters[:BEGINNING], copy, shortest)):
                yield sentence


def _repeats(beginning: str, copy: str, shortest: int) -> bool:
    """Whether an answer begins with most of an instruction in one piece."""
    least = max(shortest, round(NEARLY * len(copy)))
    if least > len(beginning):
        return False
    pieces = {copy[i : i + least] for i in range(len(copy) - least + 1)}
    return any(piece in beginning for piece in pieces)


def _sentences(text: str) -> list[str]:
    """Sentences of a prompt, without what it quotes."""
    return [sentence.strip() for sentence in _SENTENCE_END.split(_QUOTED.sub(" ", text)) if sentence and sentence.strip()]


def _letters(text: str) -> str:
    return _NO_LETTER.sub("", text).casefold()
