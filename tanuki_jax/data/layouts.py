"""Layouts: how rows of S tokens are made of a source, as windows of its stream or of whole documents that are packed."""

from __future__ import annotations

import logging
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from tanuki_jax import files
from tanuki_jax.data import packing
from tanuki_jax.data.packing import Packing
from tanuki_jax.data.store import Store
from tanuki_jax.errors import UserError

logger = logging.getLogger(__name__)
Example: TypeAlias = dict[str, np.ndarray]


class Rows(Protocol):
    """Rows of S tokens that are read by number."""

    @property
    def seq_len(self) -> int:
        """S."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True)
class Windows:
    """Row i is the tokens i*S to (i+1)*S of the whole stream, each predicting the next one.

    With `reset`, attention and positions restart at each document and a document's last token predicts nothing; without it,
    a row is one segment (Megatron-LM's default, and Tanuki's).
    """

    store: Store
    seq_len: int
    reset: bool
    vocab_size: int
    held_out: int = 0  # tokens at the end of the stream that are in no row

    def __len__(self) -> int:
        return max(0, (self.store.size - self.held_out - 1) // self.seq_len)

    def describe(self, source: str) -> str:
        """How the text of a source fills rows, as a stage and `data inspect` print it."""
        left = self.store.size - self.held_out - len(self) * self.seq_len
        return (
            f"{self.store.size:,} tokens of {source} in {len(self):,} rows; the last {left:,} fill no row or are only predicted"
            + (f"; {self.held_out:,} held out for validation" if self.held_out else "")
            + ("; the last token of each document predicts nothing (reset_attention)" if self.reset else "")
        )

    def __getitem__(self, index: int) -> Example:
        S = self.seq_len
        start = index * S
        window = self.store.read(start, start + S + 1)
        if window.max() >= self.vocab_size or window.min() < 0:
            invalid = int(window.max() if window.max() >= self.vocab_size else window.min())
            raise UserError(
                f"token store: {self.store} holds id {invalid} near token {start}, the model's vocabulary is "
                f"{self.vocab_size}; it was made with another tokenizer"
            )
        window = window.astype(np.int32)
        weights, segments, positions = np.ones(S, np.float32), np.ones(S, np.int32), np.arange(S, dtype=np.int32)
        if self.reset:
            begins = self.store.boundaries(start, start + S + 1) - start  # in (0, S]
            weights[begins - 1] = 0
            inside = begins[begins < S]
            marks = np.zeros(S, np.int32)
            marks[inside] = 1
            segments += np.cumsum(marks, dtype=np.int32)
            marks[inside] = np.diff(inside, prepend=0)
            positions -= np.cumsum(marks, dtype=np.int32)
        return {
            "tokens": window[:-1],
            "targets": window[1:],
            "loss_weights": weights,
            "segment_ids": segments,
            "positions": positions,
        }


@dataclass(frozen=True)
class HeldOutRows:
    """The rows at the end of the stream that `windows` leaves out."""

    windows: Windows

    def __len__(self) -> int:
        return self.windows.held_out // self.windows.seq_len

    def __getitem__(self, index: int) -> Example:
        return self.windows[len(self.windows) + index]


@dataclass(frozen=True)
class PackedDialogues:
    """Row i holds whole dialogues, each a segment with its own positions; of a longer one, its start."""

    tokens: Store
    mask: Store
    packing: Packing
    seq_len: int

    def __len__(self) -> int:
        return len(self.packing.starts) - 1

    def __getitem__(self, index: int) -> Example:
        units = self.packing.units[self.packing.starts[index] : self.packing.starts[index + 1]]
        return _row(self.tokens, self.mask, units, self.seq_len)


@dataclass(frozen=True)
class PackedPairs:
    """Row i holds whole pairs: segments 2p+1 and 2p+2 are the chosen and the rejected conversation of its pair p."""

    tokens: Store
    mask: Store
    packing: Packing
    seq_len: int
    max_pairs: int  # P: maximum of pairs in a row
    ref_logprobs: np.ndarray  # float32 [pairs, 2] of the reference model; zeros while it is being computed

    def __len__(self) -> int:
        return len(self.packing.starts) - 1

    def pairs(self, index: int) -> np.ndarray:
        """The pairs of a row."""
        return self.packing.units[self.packing.starts[index] : self.packing.starts[index + 1]]

    def __getitem__(self, index: int) -> Example:
        pairs = self.pairs(index)
        row = _row(self.tokens, self.mask, np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1), self.seq_len)
        segments = np.zeros((self.max_pairs, 2), np.int32)
        segments[: len(pairs)] = np.arange(1, 2 * len(pairs) + 1).reshape(-1, 2)
        reference = np.zeros((self.max_pairs, 2), np.float32)
        reference[: len(pairs)] = self.ref_logprobs[pairs]
        return {**row, "pair_segments": segments, "ref_logprobs": reference}


def _row(tokens: Store, mask: Store, documents: np.ndarray, seq_len: int) -> Example:
    """Concatenated documents as segments 1, 2, ...; the weight of a target is the mask of that token."""
    row = {name: np.zeros(seq_len, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    row["loss_weights"] = np.zeros(seq_len, np.float32)
    at = 0
    for segment, document in enumerate(documents.tolist(), 1):
        ids = tokens.document(document)[: seq_len - at]
        n = len(ids)
        row["tokens"][at : at + n] = ids
        row["targets"][at : at + n - 1] = ids[1:]
        row["loss_weights"][at : at + n - 1] = mask.document(document)[1:n]
        row["segment_ids"][at : at + n] = segment
        row["positions"][at : at + n] = np.arange(n)
        at += n
    return row


# --- a source as a stage reads it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageSource:
    """A token store, and what the stage that reads it asks for."""

    name: str
    stage: str
    kind: str  # of the stage
    content: str  # fingerprint of what the store holds
    documents: int
    tokens: Store
    mask: Store | None  # None for text
    seq_len: int
    reset_attention: bool
    vocab_size: int
    held_out: int  # tokens
    cache: Path  # of pack indexes


def _open_windows(source: StageSource) -> Windows:
    windows = Windows(source.tokens, source.seq_len, source.reset_attention, source.vocab_size, source.held_out)
    if not len(windows):
        raise UserError(
            f"stage {source.stage}: source {source.name!r} has too little text for one row of {source.seq_len} tokens"
            f"{' beside validation.tokens' if source.held_out else ''}; add data or lower seq_len"
        )
    print(f"stage {source.stage}: {windows.describe(source.name)}", file=sys.stderr)
    return windows


def _open_dialogues(source: StageSource) -> PackedDialogues:
    assert source.mask is not None
    return PackedDialogues(source.tokens, source.mask, _load_packing(source, pairs=False), source.seq_len)


def _open_pairs(source: StageSource) -> PackedPairs:
    assert source.mask is not None
    packed = _load_packing(source, pairs=True)
    reference = np.zeros((source.documents // 2, 2), np.float32)
    max_pairs = int(np.diff(packed.starts).max())
    return PackedPairs(source.tokens, source.mask, packed, source.seq_len, max_pairs, reference)


LAYOUTS: Mapping[str, Callable[[StageSource], Rows]] = {
    "windows": _open_windows,
    "dialogues": _open_dialogues,
    "pairs": _open_pairs,
}


def _load_packing(source: StageSource, pairs: bool) -> Packing:
    """The pack index of dialogues or pairs, from the cache where it is there; says what it wastes."""
    stage, name, seq_len, lengths = source.stage, source.name, source.seq_len, source.tokens.lengths
    assert source.mask is not None
    units = len(lengths) // 2 if pairs else len(lengths)
    fingerprint = files.fingerprint(source.content, source.kind, seq_len, units)
    path = source.cache / f"pack-{fingerprint}.npz"
    packed = _read_packing(path, units)
    if packed is None:
        packed = packing.pack(source.tokens, source.mask, seq_len, pairs)
        with files.disk_errors(source.cache, "data"), files.atomic_path(path) as temporary, temporary.open("wb") as f:
            np.savez(f, starts=packed.starts, units=packed.units, dropped=packed.dropped)
    print(f"stage {stage}: {packing.describe_packing(packed, lengths, seq_len, pairs, name)}", file=sys.stderr)
    if not len(packed.units):
        raise UserError(
            f"stage {stage}: no {'pair' if pairs else 'answer'} of source {name!r} fits into {seq_len} tokens; raise seq_len"
        )
    return packed


def _read_packing(path: Path, units: int) -> Packing | None:
    """A pack index from the cache; none where it is not there or damaged, which is said."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as saved:
            packed = Packing(saved["starts"], saved["units"], int(saved["dropped"]))
        sound = packed.starts[0] == 0 and packed.starts[-1] == len(packed.units) == units - packed.dropped
        if sound and np.array_equal(np.unique(packed.units), np.sort(packed.units)) and (packed.units < units).all():
            return packed
        reason = "its numbers do not fit the data"
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error) or type(error).__name__
    logger.warning("data: %s is damaged (%s) and made anew", path, reason)
    return None
