"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Passes a text on up to the first stop string; what may be the beginning of one waits for the next piece.

    Of several the one that is complete first ends the text, so that the size of the pieces changes nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._waiting = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """The text that is sure to stand before any stop string, and whether one has come."""
        text = self._waiting + piece
        if not self._stops:
            return text, False
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if ends:
            self._waiting = ""
            return text[: min(ends)[1]], True
        size = max(_overlap(text, stop) for stop in self._stops)
        self._waiting = text[len(text) - size :]
        return text[: len(text) - size], False

    def finish(self) -> str:
        """What has waited, when no more text comes."""
        text, self._waiting = self._waiting, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text with which the stop string begins."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
