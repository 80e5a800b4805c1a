"""The staged mixture: from which source row i of a stage comes, and which of its rows it is; a pure function of i."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

import grain
import numpy as np

ORDER = 2  # raised when the order of rows changes: part of a stage's fingerprint, so that no run resumes in another order
BLOCK = 1024  # rows that are ordered together; a power of two
END = 1 << 62  # more rows than any mixture has

Weights: TypeAlias = tuple[int, ...]  # of the sources, exact: whole numbers in the ratios of the floats
Counts: TypeAlias = tuple[int, ...]  # rows of each source


class StagedMixture(grain.transforms.DatasetSelectionMap):
    """Interleaves sources by weights that change at given rows, without repeating or skipping a row of any source.

    In each phase every source is, after any number of rows, within one row of its share, however small the share is.
    Sources of equal weight take turns, and count as one source otherwise.
    A source's rows are read in its own (shuffled) order, and every phase continues where the previous one stopped.
    """

    def __init__(
        self, weights: Sequence[Sequence[float]], starts: Sequence[int], length: int, used_before: Sequence[int] = ()
    ) -> None:
        """weights[p][k]: weight of source k in phase p, which begins at row starts[p]; used_before[k]: its first row."""
        self.length = length
        self.first = np.array(used_before or [0] * len(weights[0]), np.int64)
        self.starts = np.array(starts, np.int64)
        exact = [_fractions(w) for w in weights]
        self.groups = [_groups(w) for w in weights]  # in each phase the sources of each weight
        self.weights = [_exact([w[g[0]] * len(g) for g in groups]) for w, groups in zip(exact, self.groups, strict=True)]
        self.used_by_phase = [np.zeros(len(weights[0]), np.int64)]  # rows of each source used before each phase
        for p in range(len(starts) - 1):
            self.used_by_phase.append(self.used_by_phase[p] + self._used(p, int(self.starts[p + 1] - self.starts[p])))

    def _used(self, phase: int, rows: int) -> np.ndarray:
        weights, remainder = self.weights[phase], rows % BLOCK
        whole = rows - remainder
        counts = np.array(_counts(weights, whole), np.int64)
        if remainder:
            owners, _ = _order(weights, whole, whole + BLOCK)
            counts += np.bincount(owners[:remainder], minlength=len(counts))
        result = np.zeros(len(self.first), np.int64)
        for count, group in zip(counts.tolist(), self.groups[phase], strict=True):
            for turn, source in enumerate(group):
                result[source] = (count + len(group) - 1 - turn) // len(group)
        return result

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, int]:
        phase = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = index - int(self.starts[phase])
        inside = row % BLOCK
        owners, ranks = _order(self.weights[phase], row - inside, row - inside + BLOCK)
        group = self.groups[phase][owners[inside]]
        rank, turn = divmod(ranks[inside], len(group))
        source = group[turn]
        return source, int(self.first[source] + self.used_by_phase[phase][source]) + rank

    def used(self, rows: int) -> np.ndarray:
        """Rows of each source among the first `rows` of the mixture, int64 [sources]."""
        phase = int(np.searchsorted(self.starts, rows, side="right")) - 1
        return self.used_by_phase[phase] + self._used(phase, rows - int(self.starts[phase]))


def _fractions(weights: Sequence[float]) -> list[Fraction]:
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise ValueError(f"weights must be finite and at least 0, and one above it: {list(weights)}")
    return [Fraction(float(w)) for w in weights]


def _groups(weights: Sequence[float]) -> list[list[int]]:
    """The sources of each weight above 0, in order."""
    groups: dict[float, list[int]] = {}
    for source, weight in enumerate(weights):
        if weight:
            groups.setdefault(float(weight), []).append(source)
    return list(groups.values())


def _exact(weights: Sequence[Fraction]) -> Weights:
    """Whole numbers in exactly the ratios of the weights, so that nothing drifts over any number of rows."""
    scale = math.lcm(*(w.denominator for w in weights))
    whole = [int(w * scale) for w in weights]
    return tuple(w // math.gcd(*whole) for w in whole)


@functools.lru_cache(1 << 13)
def _counts(weights: Weights, row: int) -> Counts:
    """Rows of each source among the first `row`, a multiple of BLOCK: close to their shares, and never decreasing.

    The rows are bisected: the counts at `row` lie between those at the two rows around it that a higher power of two divides.
    So the counts of any row take a few dozen steps.  Rounding passes half of what a source lost on to the next larger one, so
    that small sources together do not take more than their share from a large one.
    """
    if not row:
        return (0,) * len(weights)
    whole, step = sum(weights), row & -row
    low = (0,) * len(weights) if row == END else _counts(weights, row - step)
    high = (END,) * len(weights) if row == END else _counts(weights, row + step)
    counts, lost = [0] * len(weights), 0
    for k in sorted(range(len(weights)), key=weights.__getitem__):
        due = row * weights[k]
        counts[k] = min(max((2 * due + lost + whole) // (2 * whole), low[k]), high[k])
        lost += due - counts[k] * whole
    ahead = [n * whole - row * w for n, w in zip(counts, weights, strict=True)]
    while missing := row - sum(counts):  # rows too few or too many: change the source that is furthest from its share
        up = missing > 0
        free = [k for k, n in enumerate(counts) if (n < high[k] if up else n > low[k])]
        k = min(free, key=ahead.__getitem__) if up else max(free, key=ahead.__getitem__)
        counts[k] += 1 if up else -1
        ahead[k] += whole if up else -whole
    return tuple(counts)


@functools.lru_cache(1 << 6)
def _order(weights: Weights, first: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each of the rows [first, stop) its source, and how many rows that source had before it.

    The quota method: among the sources that one more row puts at most a row ahead, the one whose next row is due first.
    """
    whole, counts, last = sum(weights), list(_counts(weights, first)), _counts(weights, stop)
    left = [k for k, n in enumerate(counts) if n < last[k]]
    opens = [-(-n * whole // w) for n, w in zip(counts, weights, strict=True)]  # the row that it may have next
    due = [(n + 1) * whole // w for n, w in zip(counts, weights, strict=True)]  # the row that it must have
    owners, ranks = [], []
    for row in range(first + 1, stop + 1):
        may = [k for k in left if opens[k] <= row]
        k = min(may, key=due.__getitem__) if may else min(left, key=lambda k: counts[k] * whole - row * weights[k])
        owners.append(k)
        ranks.append(counts[k])
        counts[k] += 1
        opens[k], due[k] = -(-counts[k] * whole // weights[k]), (counts[k] + 1) * whole // weights[k]
        if counts[k] == last[k]:
            left.remove(k)
    return tuple(owners), tuple(ranks)
