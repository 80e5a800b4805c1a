"""What judges a run: steps that are not finite, spikes of loss and gradient norm; and the events of a stage.

All of it looks at metrics that the loop has read anyway, one step late.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tanuki_jax import config

WINDOW = 200  # steps whose median a step is compared with
MIN_HISTORY = 20  # steps without which there is no judgement
LOSS_FLOOR, NORM_FLOOR = 0.02, 0.2  # least deviation: of the loss as a share of its median, of the norm's logarithm


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
        details = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in more.items())
        print(f"step {step}: {event.replace('_', ' ')}{details and ': '}{details}", file=sys.stderr, flush=True)


def read_events(directory: Path) -> list[dict[str, Any]]:
    """The events of a stage; lines cut short by a kill are left out."""
    path, events = Path(directory) / "events.jsonl", []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            events.append(json.loads(line))
    return events


# --- steps that are not finite, and spikes --------------------------------------------------------------------------


@dataclass
class Guard:
    """Judges one step after another."""

    options: config.Guard
    data_change_steps: tuple[int, ...] = ()  # steps after which the data change, and losses of before say nothing
    nonfinite_count: int = 0  # steps in a row that were not finite
    spike_count: int = 0  # steps in a row that were spikes
    spike_start: int = 0  # the first of them
    _last_step: int = 0
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def replay(self, rows: Iterable[dict[str, Any]]) -> None:
        """Takes up the logged steps of an interrupted run."""
        for row in rows:
            self._move_to(row["step"])
            if row.get("loss") is not None and row.get("grad_norm"):
                self._add(row["loss"], row["grad_norm"])

    def observe(self, step: int, loss: float, norm: float) -> str:
        """`good`, `not_finite` or `spike`; only good steps count in what later ones are compared with."""
        self._move_to(step)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.nonfinite_count += 1
            return "not_finite"
        self.nonfinite_count = 0
        if self.options.spike_sigma and len(self._losses) >= MIN_HISTORY and self._is_spike(loss, norm):
            self.spike_start = self.spike_start if self.spike_count else step
            self.spike_count += 1
            return "spike"
        self.spike_count = 0
        self._add(loss, norm)
        return "good"

    def _is_spike(self, loss: float, norm: float) -> bool:
        limit = self.options.spike_sigma
        middle = statistics.median(self._losses)
        if loss > middle + limit * max(_deviation(self._losses, middle), LOSS_FLOOR * abs(middle)):
            return True
        middle = statistics.median(self._norms)
        return math.log(max(norm, 1e-30)) > middle + limit * max(_deviation(self._norms, middle), NORM_FLOOR)

    def _add(self, loss: float, norm: float) -> None:
        self._losses.append(loss)
        self._norms.append(math.log(max(norm, 1e-30)))

    def _move_to(self, step: int) -> None:
        """Forgets what was before a change of the data."""
        if any(self._last_step <= change < step for change in self.data_change_steps):
            self._losses.clear()
            self._norms.clear()
            self.spike_count = 0
        self._last_step = step


def _deviation(values: Iterable[float], middle: float) -> float:
    """The median distance from the median, as large as the standard deviation would be of a normal distribution."""
    return 1.4826 * statistics.median(abs(value - middle) for value in values)
