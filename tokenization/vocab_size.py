"""Which sizes a vocabulary can have: known from the characters of a text, long before its units are counted."""

from __future__ import annotations

import collections
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tanuki_jax.errors import UserError
from tokenization.train import CONTROLS, LONGEST_PIECE, MARKS, MODERN, ROOM, SEEDS, SPELLING, train

FIXED = 4 + len(CONTROLS) + 1 + 256  # special tokens, the newline, the bytes
SMALLEST, LARGEST = FIXED + len(SPELLING), FIXED + SEEDS + sys.maxunicode
SLACK = 0.02  # of the characters counted: white space at the end of a line, say, is no part of a unit


def check_vocab_size(
    texts: Iterable[tuple[str, str]], vocab_size: int, character_coverage: float = 0.9995, **options: Any
) -> None:
    """Refuses a vocabulary that these texts cannot give, before their units are counted, which takes far longer.

    It must have room for the characters that get a piece, and cannot be larger than what the texts are long enough for: a
    piece of several characters occurs at least twice.  What is told to work has been tried.

    Args:
      options: of `train`.
    """
    _check_range(vocab_size, character_coverage)
    counts: collections.Counter[str] = collections.Counter()
    kept: list[tuple[str, str]] = []  # while they are too short
    length = 0
    for language, text in texts:
        length += len(text)
        if _max_pieces(length, vocab_size) < vocab_size:
            kept.append((language, text))
        elif vocab_size >= ROOM:
            return  # room enough for the characters of any language
        counts.update(text)
    counts = collections.Counter({c: n for c, n in counts.items() if not c.isspace() or c in " \u3000"})
    if not counts:
        return  # an empty corpus has its own message
    if (most := _max_pieces(length, vocab_size)) < vocab_size:
        pieces = _reachable(kept, most, character_coverage, **options)
        if pieces < ROOM <= most:  # with so many, no characters are added that the text has not
            pieces = _reachable(kept, pieces, character_coverage, **options)
        raise UserError(
            f"tokenizer: {vocab_size:,} pieces cannot come of {length:,} characters of text; "
            f"--vocab_size={pieces} is the most that they give, or bring more text"
        )
    least = FIXED + len(_characters(counts, vocab_size, character_coverage))
    slack = math.ceil(SLACK * least)
    if least > vocab_size + slack:
        raise UserError(
            f"tokenizer: {vocab_size:,} pieces have no room for the characters of the text; --vocab_size={least + slack} has, "
            f"or lower --character_coverage ({character_coverage})"
        )


def _reachable(texts: Iterable[tuple[str, str]], vocab_size: int, character_coverage: float, **options: Any) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        return train(texts, Path(scratch), vocab_size, character_coverage, **options).pieces


def _check_range(vocab_size: int, character_coverage: float) -> None:
    if not 0.98 <= character_coverage <= 1:
        raise UserError(f"tokenizer: character_coverage {character_coverage} must be from 0.98 to 1")
    if not SMALLEST <= vocab_size <= LARGEST:
        raise UserError(
            f"tokenizer: no vocabulary has {vocab_size:,} pieces: special tokens, bytes and what spells them are {SMALLEST}, "
            f"and more than {LARGEST:,} are never found"
        )


def _max_pieces(length: int, vocab_size: int) -> int:
    """More pieces than can come of so many characters of text."""
    given = len(MODERN) + 2 * sum(LONGEST_PIECE * len(mark) for mark in MARKS) if vocab_size >= ROOM else len(SPELLING)
    return FIXED + given + length + min(SEEDS, (LONGEST_PIECE - 1) * length // 2)


def _characters(counts: Mapping[str, int], vocab_size: int, character_coverage: float) -> set[str]:
    """Those that get a piece: the commonest, until they cover their share of the text, and those that any vocabulary has."""
    required = MODERN if vocab_size >= ROOM else SPELLING
    seen = collections.Counter(dict.fromkeys({*counts, *required}, 1))  # as `_fit` counts
    seen.update(counts)
    covered, total, found = 0, seen.total(), set(required)
    for character, n in seen.most_common():
        if covered >= character_coverage * total:
            break
        covered += n
        found.add(character)
    return found
