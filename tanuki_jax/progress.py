"""Progress of long work, on stderr."""

from __future__ import annotations

import math
import sys
import time

SIZES = (("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))  # a smaller unit where the whole is under ten of the larger


class Progress:
    """Work done and time left: one line that renews itself on a terminal, else a line every ten seconds.

    total: the amount of work; 0 where it is unknown, or nothing: lines then show no total.  Work beyond it becomes the new
      total, since a file may have grown.
    unit: of the amount divided by `scale` (1e6 and "MB" for bytes; small amounts are shown in a smaller unit).
    """

    def __init__(self, name: str, total: int, unit: str = "", scale: float = 1, quiet: bool = False) -> None:
        self.name, self.total, self.unit, self.scale, self.quiet = name, max(total, 0), unit, scale, quiet
        if (unit, scale) == SIZES[0] and total:
            self.unit, self.scale = next((size for size in SIZES if self.total >= 10 * size[1]), SIZES[-1])
        self._live = sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start + (0.0 if self._live else 10.0)
        self._ended = False
        self._first: tuple[float, int] | None = None

    def show(self, done: int, text: str = "") -> None:
        """Reports that `done` of `total` is done; `text` is shown besides."""
        now, has_total = time.monotonic(), self.total > 0
        if has_total:
            self.total = max(self.total, done)
        finished = has_total and done >= self.total
        if self._first is None:
            self._first = (now, done)
        if self._ended or not (has_total or done > 0):  # the last line has been shown, or there is nothing to do
            return
        short = finished and now - self._start < 1.0  # quick work needs no line
        if self.quiet or short or (now < self._next and not finished):
            return
        line = f"{self.name}  {self._count(done)}  {text}{text and '  '}{duration(now - self._start)} gone"
        if has_total:
            line += f", {self._left(done, now, self._first)} left"
        renews = self._live and has_total  # else the line would stay open, since the end is unknown
        start, end = ("\r\033[K", "\n" if finished else "") if renews else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)
        self._ended = finished
        self._next = now + (0.5 if renews else 10.0)

    def _count(self, done: int) -> str:
        of_total = f"/{self.total / self.scale:,.0f}" if self.total else ""
        return f"{done / self.scale:,.0f}{of_total}{self.unit and ' ' + self.unit}"

    def _left(self, done: int, now: float, first: tuple[float, int]) -> str:
        if done >= self.total:
            return duration(0)
        start, start_done = first
        if done <= start_done or now <= start:
            return "?"
        return duration((self.total - done) * (now - start) / (done - start_done))


def duration(seconds: float) -> str:
    """4s, 3m20s, 2h05m, 3d4h."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(int(max(seconds, 0)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{minutes}m{s:02d}s" if minutes else f"{s}s"
