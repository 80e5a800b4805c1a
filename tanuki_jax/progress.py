"""How far long work has come, on stderr."""

from __future__ import annotations

import math
import sys
import time


class Progress:
    """Work done, rate and time left: one line that renews itself on a terminal, else a line now and then.

    unit: what is counted, divided by `scale` (1e6 and "MB" for bytes).
    """

    def __init__(self, name: str, total: int, unit: str = "", scale: float = 1, quiet: bool = False) -> None:
        self.name, self.total, self.unit, self.scale, self.quiet = name, total, unit, scale, quiet
        self._live = sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start + (0.0 if self._live else 10.0)
        self._ended = False
        self._first: tuple[float, int] | None = None

    def show(self, done: int, text: str = "") -> None:
        """Reports that `done` of `total` is done."""
        now, finished = time.monotonic(), done >= self.total
        if self._first is None:
            self._first = (now, done)
        if self._ended:  # the last line has been shown
            return
        short = finished and now - self._start < 1.0  # what took no time needs no line
        if self.quiet or short or (now < self._next and not finished):
            return
        since, at = self._first
        rate = (done - at) / (now - since) if done > at and now > since else 0.0
        left = duration((self.total - done) / rate) if rate else "?"
        count = f"{done / self.scale:,.0f}/{self.total / self.scale:,.0f}{self.unit and ' ' + self.unit}"
        line = f"{self.name}  {count}  {text}{text and '  '}{duration(now - self._start)} gone, {left} left"
        start, end = ("\r\033[K", "\n" if finished else "") if self._live else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)
        self._ended = finished
        self._next = now + (0.5 if self._live else 10.0)


def duration(seconds: float) -> str:
    """4s, 3m20s, 2h05m, 3d4h."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{minutes}m{s:02d}s" if minutes else f"{s}s"
