"""Which documents share a row of S tokens: best-fit packing, and what it wastes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tanuki_jax.data.store import Store


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
