"""Profiles of a few steps, by config or by signal, for TensorBoard's profiler or xprof."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import jax


class Profile:
    """A window of `steps` steps from step `start` on (counted from 1; 0 = none), and from the next one on after a SIGUSR1.

    Each process writes what it saw below `directory`/profile/step-N.
    """

    def __init__(self, directory: Path, start: int, steps: int) -> None:
        self._directory, self._start, self._steps = directory / "profile", start, steps
        self._asked, self._end = threading.Event(), 0
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, lambda *_: self._asked.set())

    def before(self, step: int) -> None:
        """A step is about to begin."""
        if self._end or not (step == self._start or self._asked.is_set()):
            return
        self._asked.clear()
        self._end = step + self._steps - 1
        place = self._directory / f"step-{step}"
        jax.profiler.start_trace(str(place))
        print(f"step {step}: profile of {self._steps} steps into {place}", file=sys.stderr, flush=True)

    def after(self, step: int, metrics: Any) -> None:
        """A step has been handed to the devices."""
        if self._end and step >= self._end:
            jax.block_until_ready(metrics)
            self._stop()

    def close(self) -> None:
        """Ends what is open."""
        if self._end:
            self._stop()
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)

    def _stop(self) -> None:
        self._end = 0
        jax.profiler.stop_trace()
