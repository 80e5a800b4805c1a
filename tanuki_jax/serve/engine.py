"""The engine: one thread that owns the device and decodes for all requests together.

Rows of all requests share the decoder's slots (continuous batching): a row is admitted as soon as a slot is free, and leaves it
with its last token.  Every turn starts a block of steps, and then reads the tokens of the block before it, so that detokenising
and the HTTP side work while the device does.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.serve.errors import ApiError, stopping
from tanuki_jax.serve.jobs import Job, Piece
from tanuki_jax.serve.metrics import Metrics
from tanuki_jax.serve.rows import Block, PromptScores, Row, score_prompt

logger = logging.getLogger(__name__)

ADMISSIONS = 2  # programs that admit rows in one turn; more would let the streams stall
LOOKAHEAD = 64  # waiting rows among which those of one width are looked for

Handle = TypeVar("Handle")  # a block of steps that was given to the device
Send = Callable[[Piece], None]


class Decoder(Protocol[Handle]):
    """What the engine needs of a model; `serve/decoder.py` has it for JAX.

    n_slots: rows that live on the device.  n_together: rows that one program admits.  max_steps: of a block.
    """

    n_slots: int
    n_together: int
    max_steps: int

    def width(self, n_tokens: int) -> int:
        """The width of the program that admits a prompt of so many tokens."""

    def admit(self, rows: Sequence[tuple[int, Job]]) -> Sequence[PromptScores] | None:
        """Puts jobs of one width into slots, -1 being none; gives their prompts' scores where one of them asks for them."""

    def start(self, n: int, wants_top: bool) -> Handle:
        """Starts n steps of all slots, with the likeliest tokens of each or without, and does not wait for them."""

    def read(self, block: Handle) -> Block:
        """Waits for the tokens of these steps."""

    def release(self, free: Sequence[int]) -> None:
        """These slots are not in use."""


class _Ended(Exception):
    """The engine is to end while the decoder is being built."""


class Engine(Generic[Handle]):
    """Makes rows until it is stopped.

    Args:
      build: makes the decoder, compiled, in the engine's thread; it gets a function that takes notes on how far it is.
      queue: rows that may wait; more are refused.
    """

    def __init__(
        self,
        build: Callable[[Callable[[str], None]], Decoder[Handle]],
        tokenizer: Tokenizer,
        queue: int,
    ) -> None:
        self.metrics = Metrics()
        # Takes the calls that hand out pieces, to make them in the listeners' thread; as it is they are made at once.
        self.deliver: Callable[[Callable[[], None]], object] = lambda call: call()
        self.state = "loading"  # then "ready", "stopping"; at last "stopped" or "failed"
        self.note = "the model is being loaded"  # what the state is about
        self._build, self._tokenizer, self._queue = build, tokenizer, queue
        self._changed = threading.Condition()
        # Written with _changed held, as are state, note and every is_cancelled.
        self._waiting: deque[Row] = deque()
        self._open: set[Row] = set()  # all rows that were submitted and have not ended
        self._n_slots = self._n_free = 0  # slots of the decoder, and those that no row has
        self._ends_now = False
        # Of the engine's thread alone.
        self._running: dict[int, Row] = {}  # slot -> row
        self._pieces: list[tuple[Send, Piece]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- for other threads ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job], sends: Sequence[Send]) -> list[Row]:
        """Takes all jobs of a request, or none: an ApiError says why."""
        with self._changed:
            self._check_open(len(jobs))
            rows = [Row(job, self._queued(send)) for job, send in zip(jobs, sends, strict=True)]
            self._waiting += rows
            self._open.update(rows)
            self.metrics.waiting = len(self._waiting)
            self._changed.notify()
        return rows

    def _check_open(self, n_rows: int) -> None:
        if self.state == "loading":
            raise ApiError(503, f"the server is not ready: {self.note}", code="loading", retry_after=5)
        if self.state == "failed":
            raise ApiError(500, self.note, code="engine_failed")
        if self.state != "ready":
            raise stopping()
        if n_rows > self._queue + self._n_slots:
            raise ApiError(
                400,
                f"the request asks for {n_rows} rows; this server takes at most {self._queue + self._n_slots} at once; send "
                "several requests",
                code="too_many_rows",
            )
        if len(self._waiting) + n_rows > self._queue + self._n_free:
            raise ApiError(
                429,
                f"{len(self._waiting)} rows are waiting and this request asks for {n_rows}; at most {self._queue} may wait; "
                "try again later",
                code="queue_full",
                retry_after=1,
            )

    def cancel(self, rows: Sequence[Row]) -> None:
        """Nobody reads these rows any more: their slots are free at the next turn."""
        with self._changed:
            for row in rows:
                row.is_cancelled = True
            self._changed.notify()

    def check_ready(self) -> None:
        """An ApiError where nothing can be asked now."""
        with self._changed:
            self._check_open(0)

    def drain(self) -> None:
        """Takes no new jobs; the running and waiting ones go on."""
        with self._changed:
            if self.state in ("ready", "loading"):
                self.state, self.note = "stopping", "the server is stopping"
            self._changed.notify()

    def is_idle(self) -> bool:
        """Whether no row is left."""
        with self._changed:
            return not any(row.is_open for row in self._open) or self.state in ("stopped", "failed")

    def stop(self, seconds: float = 60.0) -> None:
        """Ends the thread: the rows that are left get an error."""
        with self._changed:
            self._ends_now = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)
        elif self.state not in ("stopped", "failed"):
            self.state = "stopped"  # it was never started

    # --- the thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error = stopping()
        state, note = "stopped", "the server has stopped"
        try:
            with contextlib.suppress(_Ended):
                self._decode()
        except Exception as failure:
            logger.exception("the engine has failed")
            reason = (str(failure) or repr(failure)).splitlines()[0]
            state, note = "failed", f"the engine has failed, and the server ends: {reason[:500]}"
            error = ApiError(500, note, code="engine_failed")
        finally:
            with self._changed:
                self.state, self.note = state, note
                rows = [row for row in self._open if row.is_open]
                self._running, self._waiting, self._open = {}, deque(), set()
            for row in rows:
                row.fail(error)
            self._hand_out()

    def _decode(self) -> None:
        """Turns, until the engine is to end."""
        decoder = self._build(self._take_note)
        with self._changed:
            self._n_slots = self._n_free = self.metrics.slots = decoder.n_slots
            if self.state == "loading":
                self.state, self.note = "ready", "ready"
        pending: tuple[Handle, dict[int, Row]] | None = None
        while not self._ends_now:
            self._admit(decoder)
            started = self._start(decoder)
            if pending:
                self._take(decoder.read(pending[0]), pending[1])
            self._hand_out()
            if not pending and not started:
                self._wait()
            pending = started

    def _take_note(self, note: str) -> None:
        with self._changed:
            if self._ends_now:
                raise _Ended
            self.note = note if self.state == "loading" else self.note

    def _wait(self) -> None:
        with self._changed:
            if not self._waiting and not self._ends_now:
                self._changed.wait()

    def _admit(self, decoder: Decoder[Handle]) -> None:
        """Frees the slots of rows that have ended, and gives free ones to rows that wait."""
        with self._changed:
            self._waiting = deque(row for row in self._waiting if row.is_open)
            self._open = {row for row in self._open if row.is_open}
        before = self._running
        self._running = {slot: row for slot, row in before.items() if row.is_open and row.n_missing > 0}
        left = [slot for slot in before if slot not in self._running]
        if not all(before[slot].job.sampling.greedy for slot in left):  # the likeliest token costs nothing in a free slot
            decoder.release(left)
        for _ in range(ADMISSIONS):
            free = [slot for slot in range(decoder.n_slots) if slot not in self._running]
            self._admit_rows(decoder, self._next_rows(decoder, min(len(free), decoder.n_together)), free)
        with self._changed:
            self._n_free = decoder.n_slots - len(self._running)
            self.metrics.busy, self.metrics.waiting = len(self._running), len(self._waiting)

    def _next_rows(self, decoder: Decoder[Handle], limit: int) -> list[Row]:
        """The first waiting row and others of its width, at most `limit`, out of the queue."""
        with self._changed:
            if not self._waiting or limit < 1:
                return []
            width = decoder.width(len(self._waiting[0].job.prompt))
            near = [self._waiting.popleft() for _ in range(min(LOOKAHEAD, len(self._waiting)))]
            rows = [row for row in near if decoder.width(len(row.job.prompt)) == width][:limit]
            self._waiting.extendleft(row for row in reversed(near) if row not in rows)
            self._n_free -= len(rows)
            return rows

    def _admit_rows(self, decoder: Decoder[Handle], rows: Sequence[Row], free: Sequence[int]) -> None:
        """Rows that want no tokens are at their end once their prompt is scored, and get no slot."""
        for slot, row in zip(free, (row for row in rows if row.n_missing), strict=False):
            row.slot = slot
            row.begin(self._tokenizer)
            self._running[slot] = row
        jobs = [(row.slot, row.job) for row in rows if row.n_missing or row.job.score_prompt]
        scores = iter(decoder.admit(jobs) or ()) if jobs else iter(())
        for row in rows:
            self.metrics.prompt_tokens += len(row.job.prompt)
            of_row = next(scores, None) if row.n_missing or row.job.score_prompt else None
            if of_row and row.job.score_prompt:
                row.prompt_scores = score_prompt(self._tokenizer, row.job, of_row)
            if not row.n_missing:
                row.end(Piece(prompt=row.prompt_scores, finish="length"))

    def _queued(self, send: Send) -> Send:
        """Collects pieces, so that a turn wakes the other thread once."""
        return lambda piece: self._pieces.append((send, piece))

    def _start(self, decoder: Decoder[Handle]) -> tuple[Handle, dict[int, Row]] | None:
        """Starts a block of steps for the rows that need more; None where no row does."""
        rows = {slot: row for slot, row in self._running.items() if row.n_missing > 0}
        if not rows:
            return None
        n = self._n_steps(decoder, rows)
        for row in rows.values():
            row.n_dispatched += n
        return decoder.start(n, any(row.job.top for row in rows.values())), rows

    def _n_steps(self, decoder: Decoder[Handle], rows: dict[int, Row]) -> int:
        """1 where a row waits for a free slot or somebody alone reads along, else as many as a block has or a row needs."""
        can_admit = self._waiting and len(self._running) < decoder.n_slots
        if can_admit or (len(rows) == 1 and next(iter(rows.values())).job.streams):
            return 1
        return min(decoder.max_steps, max(row.n_missing for row in rows.values()))

    def _take(self, block: Block, rows: dict[int, Row]) -> None:
        """Hands the tokens of a block to the rows for which it was started."""
        for row in rows.values():
            if row.is_open:
                before = row.n_tokens
                row.take(block)
                self.metrics.completion_tokens += row.n_tokens - before

    def _hand_out(self) -> None:
        pieces, self._pieces = self._pieces, []
        if pieces:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                self.deliver(lambda: _send_all(pieces))


def _send_all(pieces: Sequence[tuple[Send, Piece]]) -> None:
    for send, piece in pieces:
        send(piece)
