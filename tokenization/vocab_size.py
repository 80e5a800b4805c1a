"""Which sizes a vocabulary can have: known from the characters of a text, long before its units are counted."""

from __future__ import annotations

import collections
import dataclasses
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenization.errors import TokenizationError
from tokenization.options import Hooks, TrainOptions
from tokenization.train import train
from tokenization.vocabulary import (
    CONTROLS,
    LARGE_VOCAB,
    MAX_PIECE_LENGTH,
    MAX_SEEDS,
    SPELLING,
    SYMBOLS,
    required_characters,
)

FIXED_PIECES = 4 + len(CONTROLS) + 1 + 256  # special tokens, the newline, the bytes
MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = FIXED_PIECES + len(SPELLING), FIXED_PIECES + MAX_SEEDS + sys.maxunicode
SLACK = 0.02  # of the characters counted: white space at the end of a line, say, is no part of a unit


def check_vocab_size(texts: Iterable[tuple[str, str]], options: TrainOptions, hooks: Hooks | None = None) -> None:
    """Refuses a vocabulary that these texts cannot give, before their units are counted, which takes far longer.

    It must hold the characters that get a piece, and cannot be larger than what the texts are long enough for: a piece of
    several characters occurs at least twice.  A size that a message names has been tried.
    """
    vocab_size = options.vocab_size
    _check_range(options)
    counts: collections.Counter[str] = collections.Counter()
    short_texts: list[tuple[str, str]] = []  # as long as they are too short
    length = 0
    for language, text in texts:
        length += len(text)
        if _max_pieces(length, vocab_size) < vocab_size:
            short_texts.append((language, text))
        elif vocab_size >= LARGE_VOCAB:
            return  # it holds the characters of any language
        counts.update(text)
    counts = collections.Counter({c: n for c, n in counts.items() if not c.isspace() or c in " \u3000"})
    if not counts:
        return  # an empty corpus has its own message
    upper = _max_pieces(length, vocab_size)
    if upper < vocab_size:
        pieces = _reachable(short_texts, upper, options, hooks)
        if pieces < LARGE_VOCAB <= upper:  # below LARGE_VOCAB no characters are added that the text does not have
            pieces = _reachable(short_texts, pieces, options, hooks)
        raise TokenizationError(
            f"tokenizer: {vocab_size:,} pieces cannot come of {length:,} characters of text; "
            f"--vocab_size={pieces} is the most that they give, or bring more text"
        )
    minimum = FIXED_PIECES + len(_characters_with_piece(counts, options))
    slack = math.ceil(SLACK * minimum)
    if minimum > vocab_size + slack:
        raise TokenizationError(
            f"tokenizer: {vocab_size:,} pieces have no room for the characters of the text; --vocab_size={minimum + slack} "
            f"has, or lower --character_coverage ({options.character_coverage})"
        )


def _reachable(texts: Iterable[tuple[str, str]], vocab_size: int, options: TrainOptions, hooks: Hooks | None) -> int:
    """The pieces that come of training on the texts with this vocab_size."""
    with tempfile.TemporaryDirectory() as scratch:
        return train(texts, Path(scratch), dataclasses.replace(options, vocab_size=vocab_size), hooks).pieces


def _check_range(options: TrainOptions) -> None:
    if not 0.98 <= options.character_coverage <= 1:
        raise TokenizationError(f"tokenizer: character_coverage {options.character_coverage} must be from 0.98 to 1")
    if not MIN_VOCAB_SIZE <= options.vocab_size <= MAX_VOCAB_SIZE:
        raise TokenizationError(
            f"tokenizer: no vocabulary has {options.vocab_size:,} pieces: special tokens, bytes and what spells them are "
            f"{MIN_VOCAB_SIZE}, and more than {MAX_VOCAB_SIZE:,} are never found"
        )


def _max_pieces(length: int, vocab_size: int) -> int:
    """More pieces than can come of so many characters of text."""
    required = len(required_characters(vocab_size))
    symbols = 2 * sum(MAX_PIECE_LENGTH * len(symbol) for symbol in SYMBOLS) if vocab_size >= LARGE_VOCAB else 0
    return FIXED_PIECES + required + symbols + length + min(MAX_SEEDS, (MAX_PIECE_LENGTH - 1) * length // 2)


def _characters_with_piece(counts: Mapping[str, int], options: TrainOptions) -> set[str]:
    """The commonest characters, until they cover their share of the text, and those that any vocabulary has."""
    required = required_characters(options.vocab_size)
    occurrences = collections.Counter(dict.fromkeys({*counts, *required}, 1))  # as `fit` counts
    occurrences.update(counts)
    covered, total, characters = 0, occurrences.total(), set(required)
    for character, n in occurrences.most_common():
        if covered >= options.character_coverage * total:
            break
        covered += n
        characters.add(character)
    return characters
