"""Trains the tokenizer: from texts to counted units, a SentencePiece unigram model, and the files of a tokenizer."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tokenization.errors import TokenizationError
from tokenization.export import export
from tokenization.fit import fit
from tokenization.languages import count_pieces, fit_mixture
from tokenization.options import Hooks, TrainOptions
from tokenization.segment import BOUNDARIES, count_units, split_lines
from tokenization.vocabulary import BOS, CONTROLS, EOS, PAD, SPELLING, UNK


class Trained(NamedTuple):
    """What was learnt from, and what came of it."""

    pieces: int
    units: int
    distinct_units: int
    forgotten: int  # occurrences of units that did not fit memory
    by_language: dict[str, int]  # pieces that are likelier in a language's units than in the others'

    def __str__(self) -> str:
        languages = ", ".join(f"{n:,} {language or 'of no named language'}" for language, n in self.by_language.items())
        lost = f"; {self.forgotten:,} units too rare for memory were left out" if self.forgotten else ""
        return f"{self.pieces:,} pieces ({languages}) from {self.units:,} units ({self.distinct_units:,} distinct){lost}"


def train(texts: Iterable[tuple[str, str]], output: Path, options: TrainOptions, hooks: Hooks | None = None) -> Trained:
    """Writes tokenizer.json (canonical), tokenizer.model, tokenizer_config.json and special_tokens_map.json to `output`.

    Identity normalisation, no dummy prefix, byte fallback, single digits, the newline as a piece.  The files are not written
    atomically: name a temporary directory, and move it.

    Args:
      texts: (language, text) pairs; the language is any name, or empty.
    """
    hooks = hooks or Hooks()
    if options.boundary not in BOUNDARIES:
        raise TokenizationError(f"tokenizer: boundary {options.boundary!r} is none of {', '.join(BOUNDARIES)}")
    check_options(options.vocab_size, options.character_coverage, options.language_weights)
    with hooks.disk_errors(output.resolve().parent):
        return _train(texts, output, options, hooks)


def check_options(vocab_size: int, character_coverage: float, language_weights: Mapping[str, float] | None) -> None:
    """Refuses numbers with which no tokenizer can be trained."""
    minimum = len((UNK, BOS, EOS, PAD, *CONTROLS)) + 256 + 1 + len(SPELLING)  # bytes, the newline
    if not minimum < vocab_size <= 1 << 24:
        raise TokenizationError(
            f"tokenizer: vocab_size {vocab_size} pieces cannot be: there must be more than {minimum}, which are special "
            f"tokens, bytes and their characters, and at most {1 << 24:,}"
        )
    if not 0 < character_coverage <= 1:
        raise TokenizationError(f"tokenizer: character_coverage {character_coverage} must be above 0 and at most 1 (0.9995)")
    if language_weights and not all(0 < share < math.inf for share in language_weights.values()):
        raise TokenizationError(f"tokenizer: every share of the vocabulary must be a number above 0: {dict(language_weights)}")


def _train(texts: Iterable[tuple[str, str]], output: Path, options: TrainOptions, hooks: Hooks) -> Trained:
    if options.boundary == "none":
        counts, forgotten = _count_lines(texts), 0
    else:
        counts, forgotten = count_units(texts, options.boundary, options.dictionary, init_worker=hooks.init_worker)
    if not any(counts.values()):
        raise TokenizationError("tokenizer: the corpus is empty; --input must match files with text")
    output.mkdir(parents=True, exist_ok=True)
    if options.language_weights:
        model = fit_mixture(counts, options, hooks)
    else:
        all_units: collections.Counter[str] = collections.Counter()
        for units in counts.values():
            all_units.update(units)
        model = fit(all_units, options, hooks)
    (output / "tokenizer.model").write_bytes(model.SerializeToString())
    pieces = export(output / "tokenizer.model", output, hooks.chat_template)
    occurrences = sum(units.total() for units in counts.values())
    distinct = len(set().union(*counts.values()))
    return Trained(pieces, occurrences, distinct, forgotten, count_pieces(model, counts))


def _count_lines(texts: Iterable[tuple[str, str]]) -> dict[str, collections.Counter[str]]:
    """Lines as units, for the boundary none; all distinct lines are in memory, as SentencePiece needs them."""
    counts: dict[str, collections.Counter[str]] = {}
    for language, text in texts:
        lines = (line.replace("\t", " ") for line in split_lines(text) if line)
        counts.setdefault(language, collections.Counter()).update(lines)
    return counts
