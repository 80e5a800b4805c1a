"""What watches a run: steps that are not finite, spikes of loss and gradient norm, steps that do not end.

All of it looks at metrics that the loop has read anyway, one step late.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tanuki_jax import config, files

WINDOW = 200  # steps whose median a step is compared with
LEAST = 20  # steps without which there is no judgement
LOSS_FLOOR, NORM_FLOOR = 0.02, 0.2  # least deviation: of the loss as a share of its median, of the norm's logarithm
PATIENCE, LONG = 300.0, 20.0  # a step hangs that takes so many seconds, and so many times the median
HANGS = 76  # exit code of a process that ended itself


class Events:
    """A stage's events.jsonl, one object for each thing out of the ordinary."""

    def __init__(self, directory: Path, active: bool = True) -> None:
        self.path, self._active = directory / "events.jsonl", active

    def add(self, event: str, step: int, **more: Any) -> None:
        """Appends an event and says it on stderr."""
        if not self._active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        line = json.dumps({"event": event, "step": step, "time": now, **more}, ensure_ascii=False)
        with self.path.open("ab+") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
            after_a_cut = f.read(1) not in (b"", b"\n")
            f.write((b"\n" if after_a_cut else b"") + line.encode() + b"\n")
        told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in more.items())
        print(f"step {step}: {event.replace('_', ' ')}{told and ': '}{told}", file=sys.stderr, flush=True)


def read_events(directory: Path) -> list[dict[str, Any]]:
    """The events of a stage; lines cut short by a kill are left out."""
    path, found = Path(directory) / "events.jsonl", []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


# --- steps that are not finite, and spikes --------------------------------------------------------------------------


@dataclass
class Guard:
    """Judges one step after another."""

    options: config.Guard
    changes: tuple[int, ...] = ()  # steps after which the data change, and losses of before say nothing
    bad: int = 0  # steps in a row that were not finite
    high: int = 0  # steps in a row that were spikes
    first_high: int = 0
    _seen: int = 0  # the last step that was looked at
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def remember(self, rows: Iterable[dict[str, Any]]) -> None:
        """Takes up the logged steps of an interrupted run."""
        for row in rows:
            self._reach(row["step"])
            if row.get("loss") is not None and row.get("grad_norm"):
                self._take(row["loss"], row["grad_norm"])

    def look(self, step: int, loss: float, norm: float) -> str:
        """`good`, `not_finite` or `spike`; only good steps count in what later ones are compared with."""
        self._reach(step)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.bad += 1
            return "not_finite"
        self.bad = 0
        if self.options.spike and len(self._losses) >= LEAST and self._stands_out(loss, norm):
            self.first_high = self.first_high if self.high else step
            self.high += 1
            return "spike"
        self.high = 0
        self._take(loss, norm)
        return "good"

    def _stands_out(self, loss: float, norm: float) -> bool:
        limit = self.options.spike
        middle = statistics.median(self._losses)
        if loss > middle + limit * max(_deviation(self._losses, middle), LOSS_FLOOR * abs(middle)):
            return True
        middle = statistics.median(self._norms)
        return math.log(max(norm, 1e-30)) > middle + limit * max(_deviation(self._norms, middle), NORM_FLOOR)

    def _take(self, loss: float, norm: float) -> None:
        self._losses.append(loss)
        self._norms.append(math.log(max(norm, 1e-30)))

    def _reach(self, step: int) -> None:
        """Forgets what was before a change of the data."""
        if any(self._seen <= change < step for change in self.changes):
            self._losses.clear()
            self._norms.clear()
            self.high = 0
        self._seen = step


def _deviation(values: Iterable[float], middle: float) -> float:
    """The median distance from the median, as large as the standard deviation would be of a normal distribution."""
    return 1.4826 * statistics.median(abs(value - middle) for value in values)


# --- going back -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detours:
    """Batches that a run leaves out after it went back, kept in a file: the batch of a step stays a function of the step.

    entries: step to which the run went back, first and last batch that are left out, factor of the learning rate.
    """

    path: Path
    entries: tuple[tuple[int, int, int, float], ...] = ()

    @classmethod
    def read(cls, directory: Path) -> Detours:
        path = directory / "detours.json"
        return cls(path, tuple(map(tuple, files.read_json(path))) if path.is_file() else ())

    def plus(self, back: int, first: int, count: int, factor: float) -> Detours:
        """With one more: back to step `back`, and without the batches that `count` steps from `first` on have now."""
        return Detours(self.path, (*self.entries, (back, self.batch(first), self.batch(first + count - 1), factor)))

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


# --- steps that do not end ------------------------------------------------------------------------------------------


class Watch:
    """A thread that looks whether steps still end; where one does not, it prints the stacks of all threads.

    seconds: then it also ends the process, with exit code HANGS, for a launcher to start it anew; 0 = it only tells.
    """

    def __init__(self, events: Events, seconds: float) -> None:
        self._events, self._seconds = events, seconds
        self._took: deque[float] = deque(maxlen=WINDOW)
        self._last: float | None = None  # when a step ended; None while nothing is watched
        self._step, self._told = 0, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """A step has ended."""
        now = time.monotonic()
        if self._last is not None:
            self._took.append(now - self._last)
        self._step, self._last, self._told = step, now, False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside may take long: a save, a scoring."""
        watching, self._last = self._last is not None, None
        yield
        self._last = time.monotonic() if watching else None

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def limit(self) -> float:
        """Seconds after which a step counts as hanging."""
        return self._seconds or max(PATIENCE, LONG * statistics.median(self._took or [0.0]))

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.limit() / 10)):
            last = self._last
            if last is None or self._told or time.monotonic() - last <= self.limit():
                continue
            self._told = True
            with suppress(OSError):  # a full disk must not keep a hanging process alive
                self._events.add("hang", self._step + 1, seconds=round(time.monotonic() - last, 1))
            faulthandler.dump_traceback(all_threads=True)
            if self._seconds:
                os._exit(HANGS)
