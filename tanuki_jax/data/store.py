"""Token stores: Megatron-LM's indexed dataset, a memory-mapped .bin of tokens and an .idx of documents.

.idx: magic "MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 sequences, uint64 documents + 1, then
int32 lengths, int64 byte offsets, int64 document starts.  Here every sequence is one document.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tanuki_jax.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(v): k for k, v in DTYPES.items()}
HEADER = 9 + 8 + 1 + 8 + 8


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
        offsets = (
            np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * self.dtype.itemsize
            if len(lengths)
            else np.zeros(0)
        )
        with Path(f"{self.prefix}.idx").open("wb") as f:
            f.write(MAGIC + struct.pack("<QBQQ", 1, CODES[self.dtype], len(lengths), len(lengths) + 1))
            f.write(lengths.tobytes())
            f.write(offsets.astype(np.int64).tobytes())
            f.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


class Store:
    """A token store, read through memory maps that are opened on first use."""

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
        version, code, self.documents, starts = struct.unpack("<QBQQ", header[9:])
        if version != 1 or code not in DTYPES:
            raise UserError(f"token store: {index} has version {version}, dtype code {code}; expected version 1, codes 1 to 8")
        self.dtype = np.dtype(DTYPES[code])
        expected = HEADER + 12 * self.documents + 8 * starts
        if index.stat().st_size < expected:
            raise UserError(f"token store: {index} is cut short: {index.stat().st_size} bytes, expected {expected}")
        self.size = tokens.stat().st_size // self.dtype.itemsize
        indexed = int(self.lengths.sum(dtype=np.int64))
        if self.size != indexed:
            raise UserError(f"token store: {tokens} holds {self.size} tokens, its index {indexed}; prepare it again")

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32."""
        return (
            np.memmap(f"{self.prefix}.idx", np.int32, "r", HEADER, (self.documents,))
            if self.documents
            else np.zeros(0, np.int32)
        )

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """First token of each document, and the end of the last, int64."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, one after another."""
        return np.memmap(f"{self.prefix}.bin", self.dtype, "r", shape=(self.size,)) if self.size else np.zeros(0, self.dtype)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]
