"""The staged mixture: which source gives row i of a stage, and which of its rows; a pure function of i."""

from __future__ import annotations

from collections.abc import Sequence

import grain
import numpy as np

BLOCK = 4096  # rows after which each source has exactly its share, to 1/BLOCK


class StagedMixture(grain.transforms.DatasetSelectionMap):
    """Interleaves sources by weights that change at given rows, without repeating or skipping a row of any source.

    Within a block of rows the sources follow a fixed pattern, spread as evenly as their shares allow; a source's rows
    are taken in its own (shuffled) order, and every phase goes on where the one before stopped.
    """

    def __init__(
        self, weights: Sequence[Sequence[float]], starts: Sequence[int], length: int, used_before: Sequence[int] = ()
    ) -> None:
        """weights[p][k]: weight of source k in phase p, which begins at row starts[p]; used_before[k]: row it goes on from."""
        self.length = length
        self.first = np.array(used_before or [0] * len(weights[0]), np.int64)
        self.starts = np.array(starts, np.int64)
        self.patterns = [_pattern(np.array(w, np.float64)) for w in weights]
        sources = len(weights[0])
        # ranks[p][r, k]: rows of source k among the first r of a block
        self.ranks = [
            np.concatenate([np.zeros((1, sources), np.int64), np.cumsum(np.eye(sources, dtype=np.int64)[p], axis=0)])
            for p in self.patterns
        ]
        self.taken = [np.zeros(sources, np.int64)]  # rows of each source used before each phase
        for p in range(len(starts) - 1):
            self.taken.append(self.taken[p] + self._used(p, int(self.starts[p + 1] - self.starts[p])))

    def _used(self, phase: int, rows: int) -> np.ndarray:
        blocks, rest = divmod(rows, BLOCK)
        return blocks * self.ranks[phase][BLOCK] + self.ranks[phase][rest]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, int]:
        phase = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = index - int(self.starts[phase])
        source = int(self.patterns[phase][row % BLOCK])
        return source, int(self.first[source] + self.taken[phase][source] + self._used(phase, row)[source])

    def used(self, rows: int) -> np.ndarray:
        """Rows of each source among the first `rows` of the mixture, int64 [sources]."""
        phase = int(np.searchsorted(self.starts, rows, side="right")) - 1
        return self.taken[phase] + self._used(phase, rows - int(self.starts[phase]))


def _pattern(weights: np.ndarray) -> np.ndarray:
    """int64 [BLOCK] of source numbers with exact shares (largest remainder), nowhere more than a row off them.

    Balinski and Young's quota method: of the sources that may have one more row by now, the one that is due first.
    """
    exact = weights / weights.sum() * BLOCK
    counts = np.floor(exact).astype(np.int64)
    for k in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
        counts[k] += 1
    owner, taken = np.empty(BLOCK, np.int64), np.zeros(len(counts), np.int64)
    for row in range(BLOCK):
        due = np.where(taken * BLOCK < counts * (row + 1), (taken + 1) / np.maximum(counts, 1), np.inf)
        owner[row] = due.argmin()
        taken[owner[row]] += 1
    return owner
