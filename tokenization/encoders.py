"""Tokenizers of any make behind one interface, for the report."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tokenization.errors import TokenizationError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # spells one byte


class SentencePieceModel(Protocol):
    """What the report asks of the SentencePiece model that lies next to a tokenizer.json."""

    def encode(self, text: str, /) -> list[int]: ...
    def get_score(self, token: int, /) -> float: ...


class DirectoryTokenizer(Protocol):
    """The run-time tokenizer of a directory, as the calling program has it."""

    vocab_size: int
    special: dict[str, int]

    def piece(self, token: int, /) -> str: ...
    def encode_with_offsets(self, text: str, /) -> tuple[list[int], list[int]]: ...
    def decode(self, ids: Sequence[int], /) -> str: ...


class Encoder(NamedTuple):
    """A tokenizer of any make: what the report asks of it."""

    name: str
    encode: Callable[[str], tuple[list[int], list[int]]]  # ids, and the character at which each begins
    decode: Callable[[list[int]], str]
    pieces: list[str]  # of each id, with real spaces
    special: set[int]
    sentencepiece: SentencePieceModel | None = None  # the model next to tokenizer.json, where there is one


def is_byte_piece(piece: str) -> bool:
    """Whether a piece such as <0x41> spells a byte."""
    return BYTE_PIECE.fullmatch(piece) is not None


def open_encoder(path: Path, open_directory: Callable[[Path], DirectoryTokenizer]) -> Encoder:
    """A directory with tokenizer.json, a tokenizer.json (or any .json of the tokenizers library), or a SentencePiece .model.

    open_directory: gives the run-time tokenizer of a directory.
    """
    path = Path(path)
    if not path.exists():
        raise TokenizationError(f"tokenizer report: no such tokenizer: {path}")
    if path.is_dir():
        tokenizer, model = open_directory(path), path / "tokenizer.model"
        pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
        sentencepiece = _load_model(model) if model.is_file() else None
        special = set(tokenizer.special.values())
        return Encoder(path.name, tokenizer.encode_with_offsets, tokenizer.decode, pieces, special, sentencepiece)
    return _open_sentencepiece(path) if path.suffix == ".model" else _open_json(path)


def _open_sentencepiece(path: Path) -> Encoder:
    processor = _load_model(path)

    def encode(text: str) -> tuple[list[int], list[int]]:
        pieces = processor.encode(text, return_type="proto").pieces
        byte_offsets = list(itertools.accumulate((len(c.encode()) for c in text), initial=0))  # of each character
        return [p.id for p in pieces], [bisect.bisect_right(byte_offsets, p.begin) - 1 for p in pieces]

    size = processor.get_piece_size()
    special = {i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)}
    special |= {i for i in range(size) if _looks_special(processor.id_to_piece(i)) and not processor.is_byte(i)}
    pieces = [processor.id_to_piece(i).replace("\u2581", " ") for i in range(size)]
    return Encoder(path.name, encode, processor.decode, pieces, special)


def _open_json(path: Path) -> Encoder:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizationError(f"tokenizer report: {path} cannot be read: {error}") from error

    def encode(text: str) -> tuple[list[int], list[int]]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False)
        return text

    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    pieces = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
    return Encoder(path.stem, encode, decode, pieces, special)


def _looks_special(piece: str) -> bool:
    return len(piece) > 2 and piece.startswith("<") and piece.endswith(">") and not is_byte_piece(piece)


def _load_model(path: Path) -> SentencePieceProcessor:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise TokenizationError(f"tokenizer report: {path} is not a SentencePiece model: {error}") from error
