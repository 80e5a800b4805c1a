"""Batches that a run leaves out after a rollback: the batch of a step stays a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tanuki_jax import files


class Rollback(NamedTuple):
    """A rollback to the checkpoint of `step`: the first and the last batch that are left out since, and the rate's factor."""

    step: int
    first_batch: int
    last_batch: int
    lr_scale: float


@dataclass(frozen=True)
class SkippedBatches:
    """What the rollbacks of a stage leave out, kept in a file."""

    path: Path
    rollbacks: tuple[Rollback, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> SkippedBatches:
        path = directory / "rollbacks.json"
        return cls(path, tuple(Rollback(*values) for values in files.read_json(path)) if path.is_file() else ())

    def with_rollback(self, to_step: int, first: int, count: int, lr_scale: float) -> SkippedBatches:
        """With one more: back to `to_step`, and without the batches that `count` steps from `first` on have now."""
        rollback = Rollback(to_step, self.batch(first), self.batch(first + count - 1), lr_scale)
        return SkippedBatches(self.path, (*self.rollbacks, rollback))

    def write(self) -> None:
        """Keeps them."""
        files.write_json(self.path, self.rollbacks)

    def batch(self, step: int) -> int:
        """The number of the batch of a step, both counted from 0: of those that are not left out, the step-th."""
        batch, end = step, -1
        for first, last in sorted((r.first_batch, r.last_batch) for r in self.rollbacks):
            if batch < first:
                break
            batch += max(0, last - max(first, end + 1) + 1)
            end = max(end, last)
        return batch

    def lr_scale(self, step: int) -> float:
        """The factor of a step's learning rate."""
        return math.prod(r.lr_scale for r in self.rollbacks if step >= r.step)
