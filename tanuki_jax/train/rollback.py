"""Batches that a run leaves out after it went back: the batch of a step stays a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tanuki_jax import files


@dataclass(frozen=True)
class SkippedBatches:
    """Batches that a run leaves out after it went back, kept in a file: the batch of a step stays a function of the step.

    entries: step to which the run went back, first and last batch that are left out, factor of the learning rate.
    """

    path: Path
    entries: tuple[tuple[int, int, int, float], ...] = ()

    @classmethod
    def read(cls, directory: Path) -> SkippedBatches:
        path = directory / "detours.json"
        return cls(path, tuple(map(tuple, files.read_json(path))) if path.is_file() else ())

    def plus(self, back: int, first: int, count: int, factor: float) -> SkippedBatches:
        """With one more: back to step `back`, and without the batches that `count` steps from `first` on have now."""
        return SkippedBatches(self.path, (*self.entries, (back, self.batch(first), self.batch(first + count - 1), factor)))

    def write(self) -> None:
        """Keeps them."""
        files.write_json(self.path, self.entries)

    def batch(self, step: int) -> int:
        """The number of the batch of a step, both counted from 0: of those that are not left out, the step-th."""
        batch, end = step, -1
        for first, last in sorted((first, last) for _, first, last, _ in self.entries):
            if batch < first:
                break
            batch += max(0, last - max(first, end + 1) + 1)
            end = max(end, last)
        return batch

    def rate(self, step: int) -> float:
        """By what the learning rate of a step is multiplied."""
        return math.prod(factor for back, _, _, factor in self.entries if step >= back)
