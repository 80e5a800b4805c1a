"""Fits a SentencePiece unigram model to counted units, so that no piece can cross the boundary of a unit."""

from __future__ import annotations

import collections
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokenization import vocabulary
from tokenization.errors import TokenizationError
from tokenization.options import Hooks, TrainOptions
from tokenization.vocabulary import CONTROLS, MAX_PIECE_LENGTH, MAX_SEEDS, SYMBOL_COUNT

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class PieceProto(Protocol):
    """A piece of a SentencePiece model, as protobuf."""

    piece: str
    score: float
    type: int
    NORMAL: int


class PieceList(Protocol):
    """The pieces of a model: a repeated field of protobuf."""

    def __iter__(self) -> Iterator[PieceProto]: ...
    def __len__(self) -> int: ...
    def __delitem__(self, index: slice) -> None: ...
    def add(self, *, piece: str, score: float) -> PieceProto: ...
    def extend(self, pieces: Iterable[PieceProto], /) -> None: ...


class TrainerSpec(Protocol):
    """How a model was trained."""

    vocab_size: int

    def ClearField(self, name: str, /) -> None: ...


class ModelProto(Protocol):
    """A SentencePiece model, as protobuf."""

    @property
    def pieces(self) -> PieceList: ...
    @property
    def trainer_spec(self) -> TrainerSpec: ...
    def HasField(self, name: str, /) -> bool: ...
    def SerializeToString(self) -> bytes: ...


def fit(counts: Mapping[str, int], options: TrainOptions, hooks: Hooks) -> ModelProto:
    """A model of counted units; languages are not told apart here."""
    import sentencepiece

    required, symbols = vocabulary.required_characters(options.vocab_size), collections.Counter[str]()
    if options.vocab_size >= vocabulary.LARGE_VOCAB:
        spellings = [*vocabulary.SYMBOLS, *(f" {symbol}" for symbol in vocabulary.SYMBOLS)]
        symbols = collections.Counter(dict.fromkeys(spellings, SYMBOL_COUNT))
    with tempfile.TemporaryDirectory() as scratch, hooks.disk_errors(Path(scratch)):
        table, seeds = Path(scratch) / "units.tsv", Path(scratch) / "seeds.tsv"
        with table.open("w", encoding="utf-8") as f:
            f.writelines(f"{unit}\t{n}\n" for unit, n in sorted(counts.items()) if "\t" not in unit)
            f.writelines(f"{symbol}\t{n}\n" for symbol, n in symbols.items())
            # A character that occurs in one word only would lose its own piece to that word, and the word then be pruned
            # for want of an alternative.  Counted once alone, each keeps a small probability.
            f.writelines(f"{character}\t1\n" for character in sorted({*"".join(counts), *required} - {"\t"}))
        settings = _trainer_settings(options, required)
        if options.boundary != "none":  # lines seldom repeat, and SentencePiece's own seeds are right for them
            with seeds.open("w", encoding="utf-8") as f:
                f.writelines(f"{piece}\t{n}\n" for piece, n in seed_pieces(collections.Counter(counts) + symbols))
            settings["seed_sentencepieces_file"] = str(seeds)
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(table), model_prefix=str(Path(scratch) / "tokenizer"), **settings
            )
        except (RuntimeError, OSError) as error:
            reason = (str(error).splitlines() or ["?"])[-1]
            raise TokenizationError(
                f"tokenizer: SentencePiece could not train {options.vocab_size} pieces: {reason}"
            ) from error
        model = _read_model(Path(scratch) / "tokenizer.model")
    for field in ("input", "model_prefix", "seed_sentencepieces_file", "num_threads"):
        model.trainer_spec.ClearField(field)  # so that two trainings on one text give one file
    return model


def _trainer_settings(options: TrainOptions, required: str) -> dict[str, Any]:
    """SentencePiece's own options."""
    return {
        "input_format": "tsv",
        "model_type": "unigram",
        "vocab_size": options.vocab_size,
        "hard_vocab_limit": False,
        "character_coverage": options.character_coverage,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "normalization_rule_name": "identity",
        "max_sentence_length": 1 << 30,  # longer lines would be dropped without a word
        "max_sentencepiece_length": MAX_PIECE_LENGTH,
        "required_chars": required,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": 3,
        "control_symbols": list(CONTROLS),
        "user_defined_symbols": ["\n"],
        "num_threads": os.cpu_count() or 1,
        "minloglevel": 2,
    }


def _read_model(path: Path) -> ModelProto:
    """The model that SentencePiece wrote; it does not say when the disk was full."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    data = path.read_bytes() if path.is_file() else b""
    model: ModelProto | None
    try:
        # The generated module makes its classes when it is imported, where mypy cannot see them.
        model = sentencepiece_model_pb2.ModelProto.FromString(data)  # type: ignore[attr-defined]
    except DecodeError:
        model = None
    if model is None or not model.HasField("normalizer_spec"):  # which comes last
        raise TokenizationError(
            f"tokenizer: SentencePiece left no whole model in {path.parent}; is the disk full? TMPDIR names another"
        )
    return model


def seed_pieces(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Candidates: the substrings of 2 to 16 characters that occur at least twice, with their true counts.

    SentencePiece's own seeds ignore the counts of a table, which leaves the commonest words in pieces.
    """
    substrings: collections.Counter[str] = collections.Counter()
    for unit, n in counts.items():
        text = unit.replace(" ", "\u2581")
        for start in range(len(text)):
            for end in range(start + 2, min(start + MAX_PIECE_LENGTH, len(text)) + 1):
                substrings[text[start:end]] += n
    repeated = ((piece, n) for piece, n in substrings.items() if n > 1)
    return sorted(repeated, key=lambda item: (-item[1] * len(item[0]), item[0]))[:MAX_SEEDS]


def load_processor(model: ModelProto) -> SentencePieceProcessor:
    """The model, ready to encode."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
