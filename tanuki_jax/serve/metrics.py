"""Counts of the server in Prometheus's text format."""

from __future__ import annotations

import threading
from collections import Counter

PREFIX = "tanuki_serve"


class Metrics:
    """Counts since the start, and what holds now; the engine's thread and the HTTP side each write their own."""

    def __init__(self) -> None:
        self.prompt_tokens = self.completion_tokens = 0
        self.slots = self.busy = self.waiting = 0
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, route: str, status: int, seconds: float) -> None:
        """Counts a request that has ended.  route: one of the server's own, not what the client wrote."""
        with self._lock:
            self._requests[route, status] += 1
            self._seconds[route] += seconds  # type: ignore[assignment]  # Counter adds floats as well

    def render(self, is_ready: bool) -> str:
        """The page for Prometheus."""
        with self._lock:
            requests, seconds = sorted(self._requests.items()), sorted(self._seconds.items())
        counts = [(f'{{route="{route}",status="{status}"}}', number) for (route, status), number in requests]
        families = [
            ("requests_total", "counter", "requests that have ended", counts),
            ("request_seconds_total", "counter", "seconds that they took", [(f'{{route="{r}"}}', s) for r, s in seconds]),
            ("prompt_tokens_total", "counter", "tokens of prompts", [("", self.prompt_tokens)]),
            ("completion_tokens_total", "counter", "tokens that were made", [("", self.completion_tokens)]),
            ("slots", "gauge", "rows that are decoded together", [("", self.slots)]),
            ("slots_busy", "gauge", "rows that are decoded now", [("", self.busy)]),
            ("queue", "gauge", "rows that wait", [("", self.waiting)]),
            ("ready", "gauge", "1 = requests are taken", [("", int(is_ready))]),
        ]
        lines = []
        for name, kind, text, values in families:
            lines += [f"# HELP {PREFIX}_{name} {text}", f"# TYPE {PREFIX}_{name} {kind}"]
            lines += [f"{PREFIX}_{name}{labels} {value:.15g}" for labels, value in values]
        return "\n".join(lines) + "\n"
