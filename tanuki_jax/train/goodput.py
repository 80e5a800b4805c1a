"""Where the time of a stage goes, over all its runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from tanuki_jax import multihost

PATIENCE, LONG = 300.0, 20.0  # a step takes long: so many seconds, and so many times the median
# `step` is what is left: the time that trains.  `lost` was spent on steps that a later run, or going back, made anew.
PHASES = ("compile", "input", "step", "score", "save", "restore", "replayed")


class Clock:
    """Seconds by kind, the recent rate, and the wait for input; it also tells multihost/watchdog.py where the run is.

    step_timeout_seconds: a step that takes longer ends the process; 0 = never.
    seconds: of all kinds but `lost`, as `seconds_by_phase` (KINDS but `step`) of earlier runs has them.
    """

    def __init__(self, tokens_per_step: int, step_timeout_seconds: float = 0.0) -> None:
        self._tokens_per_step, self._hang_seconds, self.step = tokens_per_step, step_timeout_seconds, 0
        self.seconds = 0.0
        self._times = dict.fromkeys(PHASES, 0.0)
        self._took = 0.0  # by what was timed last
        self._last = time.monotonic()
        self._recent: list[tuple[float, int]] = []
        self.tokens_per_second = 0.0
        self._waited, self._steps = 0.0, 0

    def resume(self, step: int, row: dict[str, Any], lost: float) -> None:
        """Takes up the times of an earlier run from the row of its last step that counts; `lost` seconds in all did not.

        What was timed last, the restoring of its state, comes on top.
        """
        self.step, before = step, row.get("seconds_by_phase", {})
        self.seconds = row.get("seconds", 0.0) + self._took
        self._times = {kind: before.get(kind, 0.0) for kind in PHASES}
        self._times["restore"] += self._took
        self._times["replayed"] = lost
        self._last, self._recent = time.monotonic(), []

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """What happens inside counts as `kind`."""
        since = time.monotonic()
        self._at(kind)
        try:
            yield
        finally:
            self._took = time.monotonic() - since
            self._times[kind] += self._took
            self._at("step")

    def _at(self, kind: str) -> None:
        what, end = f"{kind} after step {self.step}", self._hang_seconds
        if kind in ("step", "input"):
            limit = max(PATIENCE, LONG * self.seconds_per_step())
            multihost.enter_phase(what, min(limit, end) if end else limit, end)
        else:
            multihost.enter_phase(what, exit_seconds=end and max(end, multihost.wait_seconds()))

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, with the time that each made the loop wait."""
        while True:
            with self.of("input"):
                batch = next(batches, None)
            if batch is None:
                return
            self._waited, self._steps = self._waited + self._took, self._steps + 1
            yield batch

    def seconds_per_step(self) -> float:
        """Of recent steps, the median; 0 where there are none."""
        times = [time for time, _ in self._recent]
        return statistics.median(after - before for before, after in pairwise(times)) if len(times) > 1 else 0.0

    def mean_wait(self) -> float:
        """Seconds a step that input was waited for, since the last call."""
        waited, steps, self._waited, self._steps = self._waited, self._steps, 0.0, 0
        return waited / max(1, steps)

    def done(self, step: int) -> None:
        """A step has ended."""
        self.step = step
        now = time.monotonic()
        self.seconds += now - self._last
        self._last = now
        self._recent = [*self._recent[-20:], (now, step)]
        (since, first), (until, last) = self._recent[0], self._recent[-1]
        if until > since:
            self.tokens_per_second = (last - first) * self._tokens_per_step / (until - since)

    def times(self) -> dict[str, float]:
        """Seconds by kind."""
        others = sum(value for kind, value in self._times.items() if kind not in ("step", "replayed"))
        return {kind: round(value, 3) for kind, value in {**self._times, "step": max(0.0, self.seconds - others)}.items()}

    def goodput(self) -> float:
        """The share of all time, lost time included, that trained."""
        times = self.times()
        return round(times["step"] / max(1e-9, self.seconds + times["replayed"]), 4)
