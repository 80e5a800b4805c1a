"""Profiles of a few steps, by config or by signal, for TensorBoard's profiler or xprof."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import jax

logger = logging.getLogger(__name__)
_requested = threading.Event()


@contextlib.contextmanager
def handle_sigusr1() -> Iterator[None]:
    """While inside, SIGUSR1 asks for a profile of the next steps, and does not end the process; may be nested."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, lambda *_: _requested.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


class Profile:
    """A window of `steps` steps from step `start` on (counted from 1; 0 = none), and from the next one on after a SIGUSR1.

    Each process writes what it saw below `directory`/profile/step-N.  A profiler that fails is reported, and the run goes on.
    """

    def __init__(self, directory: Path, start: int, steps: int) -> None:
        self._directory, self._start, self._steps, self._end = directory / "profile", start, steps, 0

    def before(self, step: int) -> None:
        """A step is about to begin."""
        if self._end or not (step == self._start or _requested.is_set()):
            return
        _requested.clear()
        place = self._directory / f"step-{step}"
        with _report_failure():
            jax.profiler.start_trace(str(place))
            self._end = step + self._steps - 1
            logger.info("step %d: profile of %d steps into %s", step, self._steps, place)

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """A step has been handed to the devices."""
        if self._end and step >= self._end:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends what is open."""
        if self._end:
            self._end = 0
            with _report_failure():
                jax.profiler.stop_trace()


@contextlib.contextmanager
def _report_failure() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        logger.warning("profile: %s", error)
