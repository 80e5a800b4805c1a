"""One request's rows on the side of the event loop: pieces come in, and a client that leaves lets its rows go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tanuki_jax.serve.jobs import Job, Piece

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest

    from tanuki_jax.serve.answers import Answer
    from tanuki_jax.serve.engine import Engine


class Exchange:
    """A request's jobs, submitted when it is made; an ApiError where the engine takes none."""

    def __init__(self, engine: Engine[Any], jobs: Sequence[Job]) -> None:
        self._engine, self._n_open = engine, len(jobs)
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._rows = engine.submit(jobs, [self._listener(index) for index in range(len(jobs))])

    def _listener(self, index: int) -> Any:
        return lambda piece: self._pieces.put_nowait((index, piece))

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._n_open:
            self._engine.cancel(self._rows)

    async def pieces(self, ping_seconds: float) -> AsyncIterator[tuple[int, Piece | None]]:
        """Row numbers and pieces as they come, until all rows have ended; None after every so many seconds without one."""
        while self._n_open:
            try:
                index, piece = await asyncio.wait_for(self._pieces.get(), ping_seconds)
            except TimeoutError:
                yield -1, None
                continue
            self._n_open -= bool(piece.finish or piece.error)
            yield index, piece

    async def collect(self, answers: Sequence[Answer], http: HttpRequest) -> bool:
        """Fills the answers; False where the client has left.  Raises the ApiError of a row that has failed."""
        leaving = asyncio.create_task(_wait_for_disconnect(http))
        coming: asyncio.Task[tuple[int, Piece]] | None = None
        try:
            while self._n_open:
                coming = asyncio.create_task(self._pieces.get())
                await asyncio.wait({coming, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    return False
                index, piece = coming.result()
                if piece.error:
                    raise piece.error
                answers[index].add(piece)
                self._n_open -= bool(piece.finish)
        finally:  # whoever waits for this answer may be cancelled, too
            leaving.cancel()
            if coming:
                coming.cancel()
        return True


async def _wait_for_disconnect(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
