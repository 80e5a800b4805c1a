"""The shard function: tokenizes a part of a corpus into shards.  Its output is the same wherever and however often it runs.

A part becomes shards of about `shard_characters`; a shard is finished when its .json exists, a part when its .done does.
After a kill it resumes behind the last finished shard and writes the same bytes.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from tanuki_jax import files
from tanuki_jax.data import chat, sources
from tanuki_jax.data.store import Store, StoreWriter, token_dtype
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError

CHUNK = 1_000_000  # characters that are encoded together
CHUNK_ROWS = 5_000
REASONS = 10_000  # rejected rows that a shard lists; it counts all


@dataclass(frozen=True)
class Work:
    """What the parts of a corpus have in common."""

    directory: Path  # where shards are written
    tokenizer: Path
    kind: str
    fields: sources.Fields
    skip_invalid: bool
    shard_characters: int


@dataclass(frozen=True)
class Shard:
    """What a shard holds; `records` counts rejected rows too."""

    name: str  # numbers of the part, and of the shard in it: 00003-00001
    records: int
    rows: int
    documents: int
    tokens: int
    characters: int
    rejected: int
    reasons: list[dict[str, str]]  # where, reason
    sha256: str  # of the tokens


def write_part(
    work: Work, number: int, part: sources.Part, tokenizer: Tokenizer | None = None, show: Callable[[int], None] | None = None
) -> None:
    """Writes the shards of part `number` that do not exist yet.  show: called with how many bytes of the part are read."""
    done = work.directory / f"{number:05d}.done"
    if done.is_file():
        return
    tokenizer = tokenizer or Tokenizer(work.tokenizer)
    finished = finished_shards(work.directory, number)
    chunks = _chunks(work, part, skip=sum(shard.records for shard in finished))
    with concurrent.futures.ThreadPoolExecutor(1) as reader:  # the next chunk is read while this one is encoded
        next_chunk = reader.submit(next, chunks, None)
        writer: _Writer | None = None
        shard = len(finished)
        while True:
            chunk = next_chunk.result()
            if chunk is None:
                break
            next_chunk = reader.submit(next, chunks, None)
            writer = writer or _Writer(work, f"{number:05d}-{shard:05d}", tokenizer.vocab_size)
            writer.add(chunk, _encode(work, chunk, tokenizer))
            if show:
                show(chunk.bytes_read)
            if writer.characters >= work.shard_characters:
                writer.close()
                writer, shard = None, shard + 1
        if writer:
            writer.close()
    files.write_text(done, "")


def finished_shards(directory: Path, number: int | None = None) -> list[Shard]:
    """The finished shards of a part, or of all, in order."""
    pattern = "?????-?????.json" if number is None else f"{number:05d}-?????.json"
    return [Shard(**files.read_json(path)) for path in sorted(directory.glob(pattern))]


def damaged_shard(directory: Path) -> str:
    """The first file of the finished shards that is cut short, as after a power cut; empty where there is none."""
    for path in sorted(directory.glob("?????-?????.json")):
        try:
            shard = Shard(**files.read_json(path))
            store = Store(*prefixes(directory, [shard.name]))
        except (UserError, TypeError):
            return str(path)
        if (store.documents, store.size) != (shard.documents, shard.tokens):
            return str(path)
    return ""


# --- reading ------------------------------------------------------------------------------------------------------------------


@dataclass
class _Chunk:
    """Rows that are encoded together, and the invalid ones among them."""

    rows: list[sources.Row] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)
    records: int = 0
    characters: int = 0
    bytes_read: int = 0

    def reject(self, where: str, reason: str) -> None:
        self.rejected.append({"where": where, "reason": reason})


def _chunks(work: Work, part: sources.Part, skip: int) -> Iterator[_Chunk]:
    chunk = _Chunk()
    on_bad_row = (lambda where, reason: chunk.reject(where, reason)) if work.skip_invalid else None
    for row in sources.read_part(part, work.fields, on_bad_row, skip):
        chunk.records += 1
        if row is not None:
            try:
                size = _check_row(row, work.kind)
            except UserError as error:
                _reject(work, chunk, row, error)
            else:
                chunk.rows.append(row)
                chunk.characters += size
                chunk.bytes_read = row.bytes_read
        if chunk.characters >= CHUNK or chunk.records >= CHUNK_ROWS:
            yield chunk
            chunk = _Chunk()
    if chunk.records:
        yield chunk


def _reject(work: Work, chunk: _Chunk, row: sources.Row, error: UserError) -> None:
    """Raises the error of an invalid row, or with skip_invalid counts the row as rejected."""
    reason = str(error).removeprefix("data: ").removeprefix(row.where).lstrip(" :")
    if not work.skip_invalid:
        raise UserError(f"data: {row.where}: {reason}") from error
    chunk.reject(row.where, reason)


def _check_row(row: sources.Row, kind: str) -> int:
    """Characters of a row (tokens, if it is tokenized already); a row of another kind or without text is an error."""
    row_kind = sources.kind_of(row)
    if row_kind != kind:
        raise UserError(f"data: {row.where} is a {row_kind} row, those before are {kind}; use one source per kind")
    if kind == "tokens":
        size = len(_ids(row))
    elif kind == "text":
        size = 0 if row.fields["text"].isspace() else len(row.fields["text"])
    else:
        size = len(chat.text_of(row.fields))
    if not size:
        raise UserError(
            f"data: {row.where} is an empty document (or white space only); remove it, or leave such rows out with "
            "--skip_invalid"
        )
    return size


def _ids(row: sources.Row) -> np.ndarray:
    """The tokens of a row that is tokenized already."""
    try:
        ids = np.asarray(row.fields["tokens"])
    except (ValueError, TypeError, OverflowError):  # nested lists of different lengths
        ids = np.zeros((), object)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UserError(f"data: {row.where}: tokens must be a list of ids, whole numbers from 0 on: [5, 6, 7]")
    return ids


# --- encoding and writing -----------------------------------------------------------------------------------------------------

Encoded: TypeAlias = tuple[np.ndarray, np.ndarray | None]  # token ids of a document, and its mask


def _encode(work: Work, chunk: _Chunk, tokenizer: Tokenizer) -> Iterator[list[Encoded]]:
    """The documents of each valid row; rows that cannot be encoded are refused, and their characters not counted."""
    if work.kind == "text":
        for ids in tokenizer.encode_batch([row.fields["text"] for row in chunk.rows]):
            ids.append(tokenizer.eos)
            yield [(np.frombuffer(ids, np.uint32), None)]
        return
    for row in chunk.rows:
        try:
            documents = _documents(work.kind, row, tokenizer)
        except UserError as error:
            _reject(work, chunk, row, error)
            chunk.characters -= _check_row(row, work.kind)
        else:
            yield documents


def _documents(kind: str, row: sources.Row, tokenizer: Tokenizer) -> list[Encoded]:
    if kind == "tokens":
        ids = _ids(row)
        if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
            raise UserError(f"holds id {ids.max() if ids.min() >= 0 else ids.min()}, the tokenizer has {tokenizer.vocab_size}")
        return [(ids, None)]
    if kind == "pair":
        encoded = chat.encode_pair(tokenizer, row.fields)
    else:
        encoded = [chat.encode_dialogue(tokenizer, row.fields["messages"], chat.template_arguments(row.fields))]
    return [(np.array(ids), np.array(mask)) for ids, mask in encoded]


class _Writer:
    """Writes a shard: files under temporary names, renamed together, the .json last.

    The temporary names are unique, so that a process that should be dead cannot write into the same files.
    """

    def __init__(self, work: Work, name: str, vocab_size: int) -> None:
        self._work, self._name = work, name
        self._hidden = f".{uuid.uuid4().hex[:8]}."
        self._tokens = StoreWriter(work.directory / f"{self._hidden}tokens-{name}", token_dtype(vocab_size))
        masked = work.kind in ("dialogue", "pair")
        self._mask = StoreWriter(work.directory / f"{self._hidden}mask-{name}", np.dtype(np.uint8)) if masked else None
        self._hash = hashlib.sha256()
        self._reasons: list[dict[str, str]] = []
        self.records = self.rows = self.rejected = self.characters = 0

    def add(self, chunk: _Chunk, encoded: Iterator[list[Encoded]]) -> None:
        for documents in encoded:
            self.rows += 1
            for ids, mask in documents:
                tokens = ids.astype(self._tokens.dtype, casting="unsafe")
                self._tokens.add(tokens)
                self._hash.update(tokens.data)
                if self._mask is not None and mask is not None:
                    self._mask.add(mask)
        self.records, self.characters = self.records + chunk.records, self.characters + chunk.characters
        self.rejected += len(chunk.rejected)
        self._reasons += chunk.rejected[: max(0, REASONS - len(self._reasons))]

    def close(self) -> None:
        lengths = self._tokens.lengths
        for writer in filter(None, (self._tokens, self._mask)):
            writer.close()
            for suffix in (".bin", ".idx"):
                hidden = Path(f"{writer.prefix}{suffix}")
                hidden.replace(hidden.with_name(hidden.name.removeprefix(self._hidden)))
        shard = Shard(
            self._name,
            self.records,
            self.rows,
            len(lengths),
            sum(lengths),
            self.characters,
            self.rejected,
            self._reasons,
            self._hash.hexdigest(),
        )
        files.write_json(self._work.directory / f"{self._name}.json", asdict(shard))


def prefixes(directory: Path, names: Sequence[str], stem: str = "tokens") -> list[Path]:
    """Paths of the tokens (or, with the stem mask, of the masks) of shards, without suffix."""
    return [directory / f"{stem}-{name}" for name in names]
