"""Where the time of a stage goes, over all its runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from tanuki_jax import multihost
from tanuki_jax.train.contract import Batch
from tanuki_jax.train.metrics import Row

MIN_HANG_SECONDS, HANG_FACTOR = 300.0, 20.0  # a step takes long: after so many seconds, and so many times the median
# `step` is what is left: the time that trains.  `replayed` was spent on steps that a later run, or a rollback, repeats.
PHASES = ("compile", "input", "step", "score", "save", "restore", "replayed")


class Clock:
    """Seconds by phase, the recent rate, and the wait for input; it also tells the watchdog (multihost) where the run is.

    step_timeout_seconds: a step that takes longer ends the process; 0 = never.
    seconds: of all phases but `replayed`, earlier runs included.
    """

    def __init__(self, tokens_per_step: int, step_timeout_seconds: float = 0.0) -> None:
        self._tokens_per_step, self._step_timeout, self.step = tokens_per_step, step_timeout_seconds, 0
        self.seconds = 0.0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._last_seconds = 0.0  # of what was timed last
        self._last = time.monotonic()
        self._recent: list[tuple[float, int]] = []
        self.tokens_per_second = 0.0
        self._waited, self._steps = 0.0, 0

    def resume(self, step: int, row: Row, replayed: float) -> None:
        """Takes up the times of an earlier run from the row of its last step that counts; `replayed` seconds in all did not.

        What was timed last, the restoring of its state, comes on top.
        """
        self.step, before = step, row.get("seconds_by_phase", {})
        self.seconds = row.get("seconds", 0.0) + self._last_seconds
        self._seconds = {name: before.get(name, 0.0) for name in PHASES}
        self._seconds["restore"] += self._last_seconds
        self._seconds["replayed"] = replayed
        self._last, self._recent = time.monotonic(), []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside counts as the phase `name`."""
        since = time.monotonic()
        self._enter(name)
        try:
            yield
        finally:
            self._last_seconds = time.monotonic() - since
            self._seconds[name] += self._last_seconds
            self._enter("step")

    def _enter(self, name: str) -> None:
        label, end = f"{name} after step {self.step}", self._step_timeout
        if name in ("step", "input"):
            limit = max(MIN_HANG_SECONDS, HANG_FACTOR * self.seconds_per_step())
            multihost.enter_phase(label, min(limit, end) if end else limit, end)
        else:
            multihost.enter_phase(label, exit_seconds=end and max(end, multihost.wait_seconds()))

    def time_input(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time that each made the loop wait."""
        while True:
            with self.phase("input"):
                batch = next(batches, None)
            if batch is None:
                return
            self._waited, self._steps = self._waited + self._last_seconds, self._steps + 1
            yield batch

    def seconds_per_step(self) -> float:
        """Of recent steps, the median; 0 where there are none."""
        times = [time for time, _ in self._recent]
        return statistics.median(after - before for before, after in pairwise(times)) if len(times) > 1 else 0.0

    def mean_wait(self) -> float:
        """Seconds a step that input was waited for, since the last call."""
        waited, steps, self._waited, self._steps = self._waited, self._steps, 0.0, 0
        return waited / max(1, steps)

    def end_step(self, step: int) -> None:
        """A step has ended."""
        self.step = step
        now = time.monotonic()
        self.seconds += now - self._last
        self._last = now
        self._recent = [*self._recent[-20:], (now, step)]
        (since, first), (until, last) = self._recent[0], self._recent[-1]
        if until > since:
            self.tokens_per_second = (last - first) * self._tokens_per_step / (until - since)

    def seconds_by_phase(self) -> dict[str, float]:
        """Seconds by phase."""
        others = sum(value for name, value in self._seconds.items() if name not in ("step", "replayed"))
        return {name: round(value, 3) for name, value in {**self._seconds, "step": max(0.0, self.seconds - others)}.items()}

    def goodput(self) -> float:
        """The share of all time, replayed time included, that trained."""
        seconds = self.seconds_by_phase()
        return round(seconds["step"] / max(1e-9, self.seconds + seconds["replayed"]), 4)
