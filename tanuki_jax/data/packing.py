"""Rows of S tokens from a store: windows of a token stream, or whole documents packed by best fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from tanuki_jax.data.store import Store
from tanuki_jax.errors import UserError

Example: TypeAlias = dict[str, np.ndarray]


class Rows(Protocol):
    """Rows that are read by number."""

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


class Packing(NamedTuple):
    """Which units share a row: row r holds units[starts[r] : starts[r + 1]]."""

    starts: np.ndarray  # int64 [rows + 1]
    units: np.ndarray  # int64
    dropped: int  # units longer than a row


def best_fit(lengths: Sequence[int] | np.ndarray, seq_len: int) -> Packing:
    """Best-fit decreasing: the longest unit first, each into the fullest row that still has room for it.

    O(n) for n units: rows are listed by free space, and the set of free spaces is a bit mask.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(seq_len + 1)]
    spaces = 0  # bit s is set where some row has s free places
    dropped = 0
    for unit in order.tolist():
        n = int(lengths[unit])
        if n > seq_len:
            dropped += 1
            continue
        enough = spaces >> n
        if enough:
            space = n + (enough & -enough).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(unit)
        if space > n:
            by_space[space - n].append(row)
            spaces |= 1 << (space - n)
    starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    return Packing(starts, np.array([u for r in rows for u in r], np.int64), dropped)


def pack(tokens: Store, mask: Store, seq_len: int, pairs: bool) -> Packing:
    """Packs the dialogues of a store, or its pairs, into rows.

    A pair that is too long is left out.  Of a longer dialogue the start is used, unless there is nothing to train in it.
    """
    lengths = tokens.lengths
    if pairs:
        return best_fit(lengths[::2] + lengths[1::2], seq_len)
    units = np.minimum(lengths, seq_len)
    for long in np.flatnonzero(lengths > seq_len).tolist():
        if not mask.document(long)[1:seq_len].any():  # its start is all prompt
            units[long] = seq_len + 1
    return best_fit(units, seq_len)


def padding(packed: Packing, lengths: np.ndarray, seq_len: int, pairs: bool) -> float:
    """The share of all rows that is padding; lengths: of the documents, two per pair."""
    units = lengths[::2] + lengths[1::2] if pairs else np.minimum(lengths, seq_len)
    return 1 - int(units[packed.units].sum()) / max(1, (len(packed.starts) - 1) * seq_len)


def describe_packing(packed: Packing, lengths: np.ndarray, seq_len: int, pairs: bool, source: str) -> str:
    """How the dialogues or pairs of a source fill rows, as a stage and `data inspect` print it."""
    cut = 0 if pairs else int((lengths > seq_len).sum()) - packed.dropped
    why = f"longer than {seq_len} tokens" if pairs else f"with no answer in their first {seq_len} tokens"
    return (
        f"{len(packed.units):,} {'pairs' if pairs else 'dialogues'} of {source} in {len(packed.starts) - 1:,} rows, "
        f"{padding(packed, lengths, seq_len, pairs):.1%} padding"
        + (f"; {cut:,} longer than {seq_len} tokens cut" if cut else "")
        + (f"; {packed.dropped:,} {why} left out" if packed.dropped else "")
    )


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
