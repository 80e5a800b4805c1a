"""Token stores: Megatron-LM's indexed dataset, memory-mapped .bin files of tokens with an .idx of documents each.

.idx: magic "MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 sequences, uint64 documents + 1, then
int32 lengths of sequences, int64 byte offsets of sequences, int64 first sequences of documents, and nothing or int8 modes.
Our stores have one sequence per document; others may have several.  Opening costs the same whatever the store's size.
"""

from __future__ import annotations

import bisect
import functools
import mmap
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from tanuki_jax.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(v): k for k, v in DTYPES.items()}
HEADER = 9 + 8 + 1 + 8 + 8
CHECK_ROWS = 1_000_000  # sequences up to which the whole index is checked when a store is opened


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where it holds every id (Megatron-LM's own bound), else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


class StoreWriter:
    """Writes prefix.bin as documents come and prefix.idx at the end."""

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.lengths: list[int] = []
        self._bin = Path(f"{prefix}.bin").open("wb")

    def add(self, tokens: Iterable[int]) -> None:
        """Appends one document."""
        array = np.asarray(tokens, self.dtype)
        self._bin.write(array.tobytes())
        self.lengths.append(len(array))

    def close(self) -> None:
        """Finishes both files."""
        self._bin.close()
        lengths = np.array(self.lengths, np.int32)
        offsets = np.cumsum(lengths, dtype=np.int64) - lengths
        with Path(f"{self.prefix}.idx").open("wb") as f:
            f.write(MAGIC + struct.pack("<QBQQ", 1, CODES[self.dtype], len(lengths), len(lengths) + 1))
            f.write(lengths.tobytes())
            f.write((offsets * self.dtype.itemsize).astype(np.int64).tobytes())
            f.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def _map_file(path: Path, dtype: DTypeLike, offset: int, count: int) -> np.ndarray:
    """Part of a file as a read-only array.

    Reads are random, so the system is told not to read ahead: that costs milliseconds per window of a file that is not
    cached.
    """
    if not count:
        return np.zeros(0, dtype)
    with path.open("rb") as f:
        pages = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
        pages.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(pages, dtype, count, offset)


class _Shard:
    """One .bin and its .idx, read through memory maps that are opened on first use."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index, tokens):
            if not path.is_file():
                raise UserError(f"token store: {path} is missing; make it with `tanuki data prepare`")
        with index.open("rb") as f:
            header = f.read(HEADER)
        if len(header) < HEADER or header[:9] != MAGIC:
            raise UserError(f"token store: {index} is not a Megatron index (wrong magic)")
        version, code, self.sequences, starts = struct.unpack("<QBQQ", header[9:])
        if version != 1 or code not in DTYPES or not starts:
            raise UserError(f"token store: {index} has version {version}, dtype code {code}; expected version 1, codes 1 to 8")
        self.documents, self.dtype = starts - 1, np.dtype(DTYPES[code])
        expected = HEADER + 12 * self.sequences + 8 * starts
        size = index.stat().st_size
        if size not in (expected, expected + self.sequences):
            problem = "is cut short" if size < expected else "has another length than its header says"
            raise UserError(f"token store: {index} {problem}: {size} bytes, expected {expected}; prepare it again")
        self.size, remainder = divmod(tokens.stat().st_size, self.dtype.itemsize)
        indexed = (int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])) if self.sequences else 0
        if self.documents <= CHECK_ROWS:
            first = self.first
            if first[0] != 0 or first[-1] != self.sequences or (np.diff(first) < 0).any():
                raise UserError(f"token store: {index} does not say where its documents begin; prepare it again")
        if 0 < self.sequences <= CHECK_ROWS:  # a short index is checked whole
            ends = np.cumsum(self.lengths, dtype=np.int64)
            whole = bool((self.pointers == (ends - self.lengths) * self.dtype.itemsize).all())
            indexed = int(ends[-1]) if whole else -1
        if remainder or self.size != indexed:
            raise UserError(f"token store: {tokens} holds {self.size} tokens, its index {indexed}; prepare it again")

    def _map(self, dtype: DTypeLike, offset: int, count: int) -> np.ndarray:
        return _map_file(Path(f"{self.prefix}.idx"), dtype, HEADER + offset, count)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32."""
        return self._map(np.int32, 0, self.sequences)

    @functools.cached_property
    def pointers(self) -> np.ndarray:
        """Byte at which each sequence begins, int64."""
        return self._map(np.int64, 4 * self.sequences, self.sequences)

    @functools.cached_property
    def first(self) -> np.ndarray:
        """First sequence of each document, and the number of sequences, int64."""
        return self._map(np.int64, 12 * self.sequences, self.documents + 1)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, one after another."""
        return _map_file(Path(f"{self.prefix}.bin"), self.dtype, 0, self.size)

    @property
    def starts(self) -> np.ndarray:
        """Byte at which each document begins, int64."""
        return np.append(self.pointers, self.size * self.dtype.itemsize)[self.first[:-1]]

    def offset(self, document: int) -> int:
        """First token of a document; the end of the last for `documents`."""
        sequence = int(self.first[document])
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < self.sequences else self.size

    def begins(self, low: int, high: int) -> np.ndarray:
        """First tokens of the documents that begin in (low, high)."""
        item = self.dtype.itemsize
        a, b = (bisect.bisect_left(self.pointers, edge) for edge in (low * item + 1, high * item))
        i, j = (bisect.bisect_left(self.first, edge, hi=self.documents) for edge in (a, b))
        return self.pointers[self.first[i:j]] // item

    def __getstate__(self) -> dict[str, object]:
        """The fields that are pickled; memory maps are opened again."""
        return {name: getattr(self, name) for name in ("prefix", "sequences", "documents", "dtype", "size")}


class Store:
    """A token store of one or more shards, as one stream of tokens and one list of documents."""

    def __init__(self, *prefixes: Path) -> None:
        if not prefixes:
            raise UserError("token store: it has no shards; prepare it again")
        self.shards = [_Shard(prefix) for prefix in prefixes]
        self.dtype = self.shards[0].dtype
        if self.dtype.kind == "f":
            raise UserError(f"token store: {prefixes[0]}.bin holds {self.dtype.name} numbers, not token ids")
        for shard in self.shards:
            if shard.dtype != self.dtype:
                raise UserError(
                    f"token store: {shard.prefix}.bin holds {shard.dtype.name}, {prefixes[0]}.bin {self.dtype.name}; "
                    "prepare them together"
                )
        # First token and first document of each shard, and the end of the last one.
        self._token_starts = np.cumsum([0, *(shard.size for shard in self.shards)], dtype=np.int64)
        self._document_starts = np.cumsum([0, *(shard.documents for shard in self.shards)], dtype=np.int64)
        self.size, self.documents = int(self._token_starts[-1]), int(self._document_starts[-1])

    def __repr__(self) -> str:
        return f"Store({', '.join(str(shard.prefix) for shard in self.shards)})"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the whole stream, in the dtype of the store."""
        k = self._shard(self._token_starts, start)
        base = int(self._token_starts[k])
        if stop <= self._token_starts[k + 1]:
            return self.shards[k].tokens[start - base : stop - base]
        pieces = []
        while start < stop:
            base, end = int(self._token_starts[k]), min(stop, int(self._token_starts[k + 1]))
            pieces.append(self.shards[k].tokens[start - base : end - base])
            start, k = end, k + 1
        return np.concatenate(pieces)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document."""
        k = self._shard(self._document_starts, index)
        shard, index = self.shards[k], index - int(self._document_starts[k])
        return shard.tokens[shard.offset(index) : shard.offset(index + 1)]

    def boundaries(self, start: int, stop: int) -> np.ndarray:
        """First tokens of the documents that begin in (start, stop), int64, ascending."""
        begins = []
        k = self._shard(self._token_starts, start)
        while k < len(self.shards) and self._token_starts[k] < stop:
            shard, base = self.shards[k], int(self._token_starts[k])
            begins.append(shard.begins(start - base, stop - base) + base)
            k += 1
        result = begins[0] if len(begins) == 1 else np.concatenate([np.zeros(0, np.int64), *begins])
        differs = result[1:] != result[:-1]  # empty documents begin where the next one does
        return result if differs.all() else np.concatenate([result[:1], result[1:][differs]])

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """First token of each document, and the end of the last, int64; all of them in memory."""
        parts = [s.starts // s.dtype.itemsize + base for s, base in zip(self.shards, self._token_starts, strict=False)]
        return np.append(np.concatenate(parts), self.size).astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64; all of them in memory."""
        return np.diff(self.offsets)

    def _shard(self, starts: np.ndarray, at: int) -> int:
        if len(self.shards) == 1:
            return 0
        return min(int(np.searchsorted(starts, at, side="right")) - 1, len(self.shards) - 1)
