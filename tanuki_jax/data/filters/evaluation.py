"""Rows that contain a prompt of an evaluation, found by n-grams of characters (Japanese) or words (others).

Memory: about 100 bytes for each n-gram of the prompts, 1 GB for 10 million of them.
"""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tanuki_jax.data import sources
from tanuki_jax.data.filters.texts import JAPANESE, Texts, normalize, text_of
from tanuki_jax.errors import UserError

FIELDS = ("turns", "messages", "prompt", "question", "text")  # of a question file, in the order in which they are looked for
SHARED = 3  # an n-gram of so many prompts is their form ("次のうち正しいものを選びなさい"), no question
_WORD = re.compile(r"\w+")


class Index(NamedTuple):
    """The n-grams of prompts, and short prompts whole; each with the place of its prompt."""

    n: int
    characters: dict[str, str]
    words: dict[tuple[str, ...], str]
    whole: dict[str, str]


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def read_prompts(patterns: str) -> Iterator[tuple[str, str]]:
    """The place and text of every prompt of question files: records with turns, messages, prompt, question or text."""
    for where, fields in sources.read_records(patterns, FIELDS):
        prompts = list(_prompts(fields))
        if not prompts:
            raise UserError(f"filters: evaluation: {where} has none of {', '.join(FIELDS)} (fields: {', '.join(fields)})")
        for prompt in prompts:
            yield where, prompt


def _prompts(fields: dict[str, Any]) -> Iterator[str]:
    name = next((name for name in FIELDS if fields.get(name)), "")
    value = fields.get(name)
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, str):
                yield item
            elif isinstance(item, dict) and item.get("role", "user") == "user":
                yield text_of(item)


def build(prompts: Iterable[tuple[str, str]], n: int) -> Index:
    """An index of prompts; n: characters or words of an n-gram.

    An n-gram of characters counts where half of it is Japanese.  One that SHARED or more prompts have is left out.
    """
    places: dict[str, str] = {}
    for where, prompt in prompts:
        places.setdefault(prompt, where)
    index = Index(n, {}, {}, {})
    shared: collections.Counter[object] = collections.Counter()
    for prompt, where in places.items():
        characters, words = normalize(prompt), _words(prompt)
        ngrams: set[Any] = {*_character_ngrams(characters, n), *_word_ngrams(words, n)}
        shared.update(ngrams)
        for ngram in ngrams:
            (index.characters if isinstance(ngram, str) else index.words).setdefault(ngram, where)
        if characters and not ngrams:
            index.whole.setdefault(characters, where)
    for ngram, count in shared.items():
        if count >= SHARED:
            (index.characters if isinstance(ngram, str) else index.words).pop(ngram, None)  # type: ignore[call-overload]
    return index


def open_index(patterns: str, n: int) -> Index:
    """The index of the question files that globs name."""
    index = build(read_prompts(patterns), n)
    if not index.characters and not index.words and not index.whole:
        raise UserError(f"filters: evaluation: {patterns} holds no prompts")
    return index


def _character_ngrams(text: str, n: int) -> Iterator[str]:
    flags = [JAPANESE.match(character) is not None for character in text]
    count = sum(flags[:n])
    for start in range(len(text) - n + 1):
        if 2 * count >= n:
            yield text[start : start + n]
        count += (flags[start + n] if start + n < len(text) else 0) - flags[start]


def _word_ngrams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    """N-grams of words; text with Japanese in it has none, since its words are not told apart."""
    for start in range(len(words) - n + 1):
        ngram = tuple(words[start : start + n])
        if not any(map(JAPANESE.search, ngram)):
            yield ngram


def find_prompt(texts: Texts, index: Index) -> str:
    """The place of a prompt that a row contains, and what they share; empty = none."""
    for part in texts.parts:
        text = normalize(part)
        if index.whole and text in index.whole:
            return f"{index.whole[text]}: {part.strip()!r}"
        if index.characters and JAPANESE.search(text):
            n = index.n
            for start in range(len(text) - n + 1):
                if text[start : start + n] in index.characters:
                    return f"{index.characters[text[start : start + n]]}: {text[start : start + n]!r}"
        if index.words:
            words = _words(part)
            for ngram in zip(*(words[i:] for i in range(index.n)), strict=False):
                if ngram in index.words:
                    return f"{index.words[ngram]}: {' '.join(ngram)!r}"
    return ""
