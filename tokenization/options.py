"""What a training run is asked for, and what the program that starts it hands in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`.

    vocab_size: pieces; there are fewer where the text has too few distinct units.
    character_coverage: share of the text's characters that get a piece of their own.
    boundary: what no piece may cross: a MeCab morpheme (the paper's rule), a predicate, a bunsetsu, or none (white space).
    dictionary: of MeCab, ipadic or unidic.
    language_weights: language -> its share of the vocabulary; each language is then trained alone, and the model is their
      mixture by tokens.  Without, the shares are what comes of training on everything.
    """

    vocab_size: int
    character_coverage: float = 0.9995
    boundary: str = "bunsetsu"
    dictionary: str = "ipadic"
    language_weights: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Hooks:
    """What this package takes from the program that calls it, and must not import.

    chat_template: saved with the tokenizer, if any.
    init_worker: called first in every worker process; it must be picklable.
    disk_errors: directory -> a context manager that wraps what is written there, to explain a full disk.
    """

    chat_template: str = ""
    init_worker: Callable[[], None] | None = None
    disk_errors: Callable[[Path], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
