"""The run-time tokenizer: tokenizer.json, read so that no text can produce a special token."""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tanuki_jax import files
from tanuki_jax.errors import UserError

NEWLINE_CUT = {"type": "Split", "pattern": {"Regex": "\n"}, "behavior": "Isolated", "invert": False}
PART = 1 << 15  # characters of a text that are encoded together, where newlines cut it
FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
)  # of a directory that may hold weights too
LONGEST = 1 << 20  # the same for a line, or where newlines do not cut: longer ones are cut there, which a round trip survives


class Tokenizer:
    """Text to ids and back; decode(encode(x)) == x for every string that UTF-8 can hold."""

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (directory / name).is_file():
                raise UserError(
                    f"tokenizer: {directory} has no {name}; a model needs its own tokenizer, and for a new model "
                    "`tanuki tokenizer train` makes one"
                )
        self.directory = directory
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"tokenizer: {directory / 'tokenizer.json'} cannot be read: {error}") from error
        self._tokenizer.encode_special_tokens = True  # their spelling in text is text
        config = files.read_json(directory / "tokenizer_config.json")
        # Where a newline is always a token of its own, the ids of a text are those of its lines, one after another.
        self._cuts_at_newlines = json.loads(self._tokenizer.to_str())["pre_tokenizer"] == NEWLINE_CUT
        self.special = {a.content: i for i, a in self._tokenizer.get_added_tokens_decoder().items() if a.special}
        self.bos_token, eos_token, pad_token = (_spelling(config.get(f"{name}_token")) for name in ("bos", "eos", "pad"))
        if eos_token not in self.special:
            raise UserError(f"tokenizer: {directory} has no eos_token among its special tokens; every text must end with one")
        self.eos_token, self.eos = eos_token, self.special[eos_token]
        self.bos, self.pad = self.special.get(self.bos_token), self.special.get(pad_token)
        self.chat_template: str = config.get("chat_template") or _text(directory / "chat_template.jinja")
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.fingerprint = files.fingerprint(directory / "tokenizer.json", self.chat_template)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone; nothing is added."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and for each the character of `text` at which it starts."""
        encoding = self._tokenizer.encode(_encodable(text), add_special_tokens=False)
        # The library gives every byte of a run of unknown characters the start of the run; count its characters.
        starts: list[int] = []
        run = -1
        for piece, (start, _) in zip(encoding.tokens, encoding.offsets, strict=True):
            byte = byte_of(piece)
            begins = byte is not None and byte & 0xC0 != 0x80  # the first byte of a character
            starts.append(starts[-1] + begins if byte is not None and start == run else start)
            run = start if byte is not None else -1
        return encoding.ids, starts

    def encode_batch(self, texts: Sequence[str]) -> list[array]:
        """Ids of many texts, uint32, on all cores; long texts are cut so that the cores share them."""
        parts: list[str] = []
        counts = []
        for text in texts:
            cut = self._parts(_encodable(text))
            counts.append(len(cut))
            parts += cut
        encoded = iter(self._tokenizer.encode_batch_fast(parts, add_special_tokens=False))
        result = []
        for count in counts:
            ids = array("I")
            for _ in range(count):
                ids.extend(next(encoded).ids)
            result.append(ids)
        return result

    def _parts(self, text: str) -> list[str]:
        """A text in parts, cut before newlines where that changes no token, and at LONGEST characters."""
        size = PART if self._cuts_at_newlines else LONGEST
        parts, start = [], 0
        while len(text) - start > size:
            end = text.find("\n", start + size, start + LONGEST) if self._cuts_at_newlines else -1
            end = end if end > start else min(start + LONGEST, len(text))
            parts.append(text[start:end])
            start = end
        return [*parts, text[start:]]

    def piece(self, token: int) -> str:
        """How a token is written in the vocabulary."""
        return self._tokenizer.id_to_token(token) or ""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are spelt out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer's own files into a new directory, whole or not at all; nothing where there is no tokenizer.json."""
    if (source / "tokenizer.json").is_file() and not target.is_dir():
        with files.atomic_path(target) as temporary:
            temporary.mkdir()
            for file in (file for pattern in FILES for file in source.glob(pattern) if file.is_file()):
                copy = temporary / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(file, copy)


def _spelling(token: Any) -> str:
    """A special token of tokenizer_config.json: text, a dictionary with `content`, or nothing."""
    return str(token["content"] if isinstance(token, dict) else token or "")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def byte_of(piece: str) -> int | None:
    """The byte that a piece such as <0x41> spells; None for any other piece."""
    return int(piece[3:5], 16) if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else None


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"text has a lone surrogate at character {error.start}; it is not valid Unicode text") from error
    return text
