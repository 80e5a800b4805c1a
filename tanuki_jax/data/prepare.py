"""From rows to a token store on disk, once; what is already there under the same fingerprint is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from tanuki_jax import files
from tanuki_jax.data import chat, sources
from tanuki_jax.data.store import Store, StoreWriter, token_dtype
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.progress import Progress

CHUNK = 1000  # rows encoded together


@dataclass(frozen=True)
class Manifest:
    """What a store holds.  kind: text, dialogue or pair (documents 2i and 2i+1 are chosen and rejected)."""

    kind: str
    rows: int
    documents: int
    tokens: int
    characters: int
    tokenizer: str  # fingerprint
    content: str  # SHA-256 of tokens.bin

    def __str__(self) -> str:
        rate = self.characters / max(self.tokens, 1)
        return f"{self.rows:,} {self.kind} rows, {self.tokens:,} tokens, {rate:.3f} characters a token"


def prepare(patterns: str, tokenizer: Tokenizer, output: Path) -> Manifest:
    """Tokenizes files into `output`: tokens.bin/.idx, for dialogues and pairs mask.bin/.idx too, and manifest.json.

    A text document ends with the end token.  Dialogues are rendered with the tokenizer's chat template; the mask is 1 on
    what the assistant says.  All rows of a source must be of one kind.  Nothing is left behind on failure.
    """
    with files.atomic_path(output) as temporary:
        temporary.mkdir()
        rows = sources.read_rows(patterns)
        first = next(rows, None)
        if first is None:
            raise UserError(f"data: {patterns} holds no rows; the corpus is empty")
        kind = sources.kind_of(first)
        tokens = StoreWriter(temporary / "tokens", token_dtype(tokenizer.vocab_size))
        mask = None if kind == "text" else StoreWriter(temporary / "mask", np.dtype(np.uint8))
        count = characters = 0
        progress = Progress("tokenize", sources.total_bytes(patterns), "MB", 1e6)
        for chunk in _chunks(_first_again(first, rows)):
            for row in chunk:
                if sources.kind_of(row) != kind:
                    raise UserError(
                        f"data: {row.where} is a {sources.kind_of(row)} row, those before are {kind}; use one source per kind"
                    )
            count += len(chunk)
            characters += sum(len(text_of(row)) for row in chunk)
            for ids, weights in _encode(kind, chunk, tokenizer):
                tokens.add(ids)
                if mask is not None:
                    mask.add(weights)
            progress.show(chunk[-1].bytes_read, f"{count:,} rows")
        if not characters:
            raise UserError(f"data: {patterns} holds no text; the corpus is empty")
        for writer in filter(None, (tokens, mask)):
            writer.close()
        manifest = Manifest(
            kind,
            count,
            len(tokens.lengths),
            sum(tokens.lengths),
            characters,
            tokenizer.fingerprint,
            _sha256(temporary / "tokens.bin"),
        )
        files.write_json(temporary / "manifest.json", asdict(manifest))
    return manifest


def _encode(kind: str, chunk: list[sources.Row], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of each document of some rows, and their mask (empty for text)."""
    if kind == "text":
        for ids in tokenizer.encode_batch([row.fields["text"] for row in chunk]):
            yield [*ids, tokenizer.eos], []
        return
    for row in chunk:
        with _naming(row):
            if kind == "pair":
                encoded = chat.encode_pair(tokenizer, row.fields)
            else:
                encoded = [chat.encode_dialogue(tokenizer, row.fields["messages"])]
        yield from encoded


@contextmanager
def _naming(row: sources.Row) -> Iterator[None]:
    """Says in an error where the row stands."""
    try:
        yield
    except UserError as error:
        raise UserError(f"data: {row.where}: {error}") from error


def text_of(row: sources.Row) -> str:
    """The text of a row as a model would see it, without special tokens."""
    kind = sources.kind_of(row)
    if kind == "text":
        return row.fields["text"]
    with _naming(row):
        if kind == "dialogue":
            return chat.render(row.fields["messages"])
        prompt = chat.as_messages(row.fields["prompt"], "user")
        sides = [[*prompt, *chat.as_messages(row.fields[side], "assistant")] for side in ("chosen", "rejected")]
        return "\n".join(chat.render(messages) for messages in sides)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a store."""
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        raise UserError(f"token store: {directory} has no manifest.json; make it with `tanuki data prepare`")
    return Manifest(**json.loads(path.read_text(encoding="utf-8")))


def open_store(directory: Path) -> tuple[Manifest, Store, Store | None]:
    """Manifest, tokens, and the mask where there is one."""
    manifest = read_manifest(directory)
    return manifest, Store(directory / "tokens"), None if manifest.kind == "text" else Store(directory / "mask")


def _first_again(first: sources.Row, rows: Iterator[sources.Row]) -> Iterator[sources.Row]:
    yield first
    yield from rows


def _chunks(rows: Iterable[sources.Row]) -> Iterator[list[sources.Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
