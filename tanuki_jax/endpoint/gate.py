"""Who may send a request to an endpoint now: a number of places, and one pause for all."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random

MAX_BACK_OFF = {"server_error": 16.0, "busy": 16.0}  # seconds between two tries of a job, by the kind of failure
OTHER_BACK_OFF = 2.0  # of a broken answer, which says little about the next one
MAX_PAUSE = 60.0  # of all jobs, unless the server asks for more
MAX_RETRY_AFTER = 600.0
FIRST_PAUSE = 0.5


class Gate:
    """Places for requests under way; the lowest number that waits gets the next one.

    A pause holds back all requests that have not been sent.  Calls that fail without an answer in between make up rounds: what
    fails because of one and the same trouble begins one pause, not many.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._until = self._paused_at = float("-inf")
        self.failures = self.rounds = 0  # since the last answer: calls that failed, and pauses because of that

    async def acquire(self, number: int) -> None:
        """Waits for a place, and for the end of a pause."""
        loop = asyncio.get_running_loop()
        if self._free and not self._waiting:
            self._free -= 1
        else:
            place = loop.create_future()
            heapq.heappush(self._waiting, (number, next(self._order), place))
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():
                    self.release()
                raise
        try:
            while (seconds := self._until - loop.time()) > 0:
                # not all at once: it would be the next burst that is too much
                await asyncio.sleep(seconds + random.uniform(0, min(1.0, 0.5 * (self._until - self._paused_at))))
        except asyncio.CancelledError:
            self.release()
            raise

    def release(self) -> None:
        """Gives the place to the next one."""
        while self._waiting:
            place = heapq.heappop(self._waiting)[2]
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

    def reset(self) -> None:
        """There was an answer."""
        self.failures = self.rounds = 0

    def pause(self, began: float, retry_after: float | None) -> int:
        """Holds everyone back after a failed call that began at `began` (the loop's time); returns the number of rounds.

        retry_after: seconds that the server asks for; None = growing pauses.
        """
        now = asyncio.get_running_loop().time()
        if began >= self._paused_at:
            self.rounds += 1
            self._paused_at = now
            if retry_after is None:
                self._until = max(self._until, now + min(MAX_PAUSE, FIRST_PAUSE * 2.0 ** min(self.rounds - 1, 30)))
        if retry_after is not None:
            self._until = max(self._until, now + min(retry_after, MAX_RETRY_AFTER))
        return self.rounds


def back_off(failures: int, kind: str) -> float:
    """Seconds before the next try of a job: exponential with full jitter."""
    return random.uniform(0, min(MAX_BACK_OFF.get(kind, OTHER_BACK_OFF), FIRST_PAUSE * 2.0 ** min(failures, 30)))
