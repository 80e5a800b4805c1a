"""Items through a chain of questions to rows of training data, with everything that was answered on the disk."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, TypeAlias

from tanuki_jax import files
from tanuki_jax.endpoint import rows
from tanuki_jax.endpoint.asker import Asker, Stopped, recorded_answer
from tanuki_jax.endpoint.budget import Budget, BudgetSpent, Meter
from tanuki_jax.endpoint.client import Client
from tanuki_jax.endpoint.job import Answer, Chain, Drop, Failed, Job
from tanuki_jax.endpoint.log import AnswerLog, LineLog
from tanuki_jax.endpoint.summary import Summary
from tanuki_jax.errors import Preempted, UserError
from tanuki_jax.files import lock
from tanuki_jax.progress import Progress

ANSWERS, FAILED, MODELS, DONE = "answers.jsonl", "failed.jsonl", "models.json", "done.json"
GRACE = 10.0  # seconds that requests under way may take after a signal
SYNC_SECONDS = 1.0
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
Items: TypeAlias = Iterable[tuple[str, Any]]


def run(
    items: Items,
    chain: Chain,
    clients: Mapping[str, Client],
    directory: Path,
    *,
    recipe: str,
    version: str = "",
    budget: Budget | None = None,
    label: str = "synth",
    total: int = 0,
    max_failed: float = 0.0,
    quiet: bool = False,
) -> Summary:
    """Calls `chain(item, ask)` for every item and writes directory/rows.jsonl; the same call goes on where a former one ended.

    Every answer is appended to answers.jsonl at once, and is never asked for again.  When all items are done the chains are
    called again, in the order of the items and with the recorded answers alone, to write the rows: a chain must be a pure
    function of its item and the answers.

    Args:
      items: pairs (id, item), read lazily and twice: a list, or an object whose `__iter__` starts from the beginning.
      chain: returns rows, and `Drop`s for rows that are left out.  A row that does not come from all calls of its item names
        the steps that it comes from in a field `steps`, which is not written.
      clients: the client of each role that jobs name; not started.
      recipe: what jobs' ids depend on beside what is asked; a directory has the answers of one.
      version: fingerprint of all else that decides about the rows: those of another version are written anew, from the answers
        that are there, and what these lack is asked.
      label: of what is made, for messages and the progress line.
      total: number of items where `items` has no length, for the progress line.
      max_failed: share of the items that may have failed when the rows are written; they are then dropped.

    Returns:
      The counts; `complete` is False where items have failed: the same call tries them again.

    Raises:
      UserError: an endpoint does not work, the budget is spent, the disk is full, or another process works in the directory.
      Preempted: a signal came.
    """
    directory = Path(directory)
    items = list(items) if iter(items) is items else items
    cannot = f"{label}: cannot write to {directory}"
    with lock.hold(directory / ".lock", f"{label}: {directory}", cannot), files.disk_errors(directory, label, (OSError,)):
        if (directory / DONE).is_file() and (directory / rows.ROWS).is_file():
            if done := _read_done(directory, recipe, version, label):
                return done
            (directory / DONE).unlink()
        progress = Progress(label, total or (len(items) if isinstance(items, Sized) else 0), "items", quiet=quiet)
        runner = _Runner(items, chain, directory, recipe, version, label, progress)
        try:
            runner.open(clients, budget or Budget())
            with _signals(runner.stop_by_signal):
                asyncio.run(runner.work())
            return runner.finish(max_failed)
        finally:
            runner.close()


class _Runner:
    """One run."""

    def __init__(
        self, items: Items, chain: Chain, directory: Path, recipe: str, version: str, label: str, progress: Progress
    ) -> None:
        self._items, self._chain, self._directory, self._recipe = items, chain, directory, recipe
        self._version, self._label, self._progress = version, label, progress
        self._summary = Summary()
        self._pending: dict[str, asyncio.Task[Answer]] = {}
        self._failed_items: set[int] = set()
        self._began = time.monotonic()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signalled = False
        self._stop: asyncio.Event
        self._hurry: asyncio.Event
        self._stack = contextlib.ExitStack()

    def open(self, clients: Mapping[str, Client], budget: Budget) -> None:
        """Reads what was recorded."""
        self._answers = AnswerLog(self._directory / ANSWERS)
        self._stack.callback(self._answers.close)
        self._failures = LineLog(self._directory / FAILED)
        self._stack.callback(self._failures.close)
        self._meter = Meter(budget)
        for row in self._answers.load():
            self._meter.spent.add(self._summary.add_record(row))
        for _, row in self._failures.rows():
            self._meter.spent.add(self._summary.add_record(row))
        self._spent_before = self._meter.spent.tokens
        _set_models(clients, self._directory / MODELS)
        self._asker = Asker(clients, self._meter, self._answers, self._failures, self._summary)
        self._records = rows.Records(self._answers, self._asker.clients, self._recipe)

    def close(self) -> None:
        self._stack.close()

    def stop_by_signal(self) -> None:
        """Called in the main thread, between any two instructions."""
        self._signalled = True
        if self._loop:
            self._loop.call_soon_threadsafe(self._on_signal)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._end(Preempted(f"{self._label} was told to stop; all answers are saved"))

    def _end(self, error: BaseException) -> None:
        self._error = self._error or error
        self._asker.stopping = True
        self._stop.set()

    async def work(self) -> None:
        """Asks all there is to ask."""
        self._loop, self._stop, self._hurry = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        source = enumerate(self._items)
        workers: list[asyncio.Task[None]] = []
        sync = asyncio.create_task(self._sync())
        try:
            if any(not client.endpoint.model for client in self._asker.clients.values()):
                await self._asker.start()
                _write_models(self._asker.clients, self._directory / MODELS)
            workers += [asyncio.create_task(self._do_items(source)) for _ in range(self._workers())]
            if self._signalled:
                self._on_signal()
            await _wait(workers, self._stop)
            await _wait(self._pending.values(), self._stop)
            if self._stop.is_set():
                await self._end_pending()
        finally:
            for task in (*workers, *self._pending.values(), sync):
                task.cancel()
            await asyncio.gather(*workers, *self._pending.values(), sync, return_exceptions=True)
            await self._asker.close()
        self._summary.spend(self._meter.spent)
        if self._error:
            raise self._error

    def finish(self, max_failed: float) -> Summary:
        """Writes the rows, unless items have failed."""
        summary = self._summary
        summary.answers = len(self._answers)
        if len(self._failed_items) <= max_failed * summary.items:
            rows.assemble(self._items, self._chain, self._records, self._directory, self._failed_items, summary)
            summary.complete = True
        summary.seconds = round(time.monotonic() - self._began, 3)
        if summary.complete:
            files.write_json(
                self._directory / DONE, {"recipe": self._recipe, "version": self._version, "summary": summary.to_json()}
            )
        return summary

    def _workers(self) -> int:
        """Items at a time: more than requests, since an item whose job waits to be tried again needs no place."""
        return 64 + min(8 * self._asker.places(), 4096 + self._asker.places())

    async def _end_pending(self) -> None:
        """After a stop: requests that have been sent may still be answered, the others are given up."""
        tasks = set(self._pending.values())
        sent = tasks & self._asker.under_way if isinstance(self._error, Preempted | BudgetSpent) else set()
        for task in tasks - sent:
            task.cancel()
        await _wait(sent, self._hurry, GRACE if self._signalled else None)

    async def _do_items(self, source: Iterator[tuple[int, tuple[str, Any]]]) -> None:
        """Takes items one by one and calls the chain; any error ends the run."""
        try:
            for number, (item_id, item) in source:
                try:
                    await self._chain(item, functools.partial(self._ask, number, item_id))
                except Drop:
                    pass  # counted when the rows are written
                except Failed as failure:
                    self._failed_items.add(number)
                    self._summary.failed[failure.kind] += 1
                self._summary.items += 1
                self._show()
                await asyncio.sleep(0)
        except (Stopped, asyncio.CancelledError):
            return
        except Exception as error:
            self._end(error)

    async def _ask(self, number: int, item_id: str, job: Job) -> Answer:
        """A chain's `ask`."""
        job, job_id = self._records.identify(job, item_id)
        if recorded := self._answers.get(job_id):
            return recorded_answer(recorded)
        task = self._pending.get(job_id)
        if not task:
            task = asyncio.create_task(self._asker.answer(job, job_id, number))
            self._pending[job_id] = task
            task.add_done_callback(functools.partial(self._forget, job_id))
        return await asyncio.shield(task)

    def _forget(self, job_id: str, task: asyncio.Task[Answer]) -> None:
        del self._pending[job_id]
        error = None if task.cancelled() else task.exception()
        if error and not isinstance(error, Drop | Failed | Stopped):
            self._end(error)
        self._show()

    def _show(self) -> None:
        spent, seconds = self._meter.spent, time.monotonic() - self._began
        rate = (spent.tokens - self._spent_before) / max(seconds, 1e-9)
        money = f", cost {spent.cost:,.2f}" if spent.cost else ""
        self._progress.show(self._summary.items, f"{spent.calls:,} calls, {rate:,.0f} tokens/s{money}")

    async def _sync(self) -> None:
        """Brings the answers onto the disk every second, as long as the directory is this process's."""
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            try:
                lock.check(look=False)
                await asyncio.to_thread(self._answers.log.sync)
            except (OSError, UserError) as error:
                self._end(error)


async def _wait(tasks: Iterable[asyncio.Task[Any]], event: asyncio.Event, seconds: float | None = None) -> None:
    """Waits for tasks, or until an event is set, or the time is over."""
    if waited := set(tasks):
        first: set[asyncio.Task[Any]] = {asyncio.create_task(asyncio.wait(waited)), asyncio.create_task(event.wait())}
        await asyncio.wait(first, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in first:
            task.cancel()


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """While inside, signals that end a process call `stop` instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, lambda *_: stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_done(directory: Path, recipe: str, version: str, label: str) -> Summary | None:
    """The counts of a run that is finished; None where it made rows of another version."""
    done = files.read_json(directory / DONE)
    if done["recipe"] != recipe:
        raise UserError(
            f"{label}: the rows in {directory} were made with other settings ({done['recipe']}, not {recipe}); "
            "rows are made once: name another directory, or remove this one"
        )
    return Summary.from_json(done["summary"]) if done["version"] == version else None


def _set_models(clients: Mapping[str, Client], path: Path) -> None:
    """Names the models of endpoints that name none, as an earlier run found them: a job's id depends on the model."""
    names = files.read_json(path) if path.is_file() else {}
    for role, client in clients.items():
        if not client.endpoint.model and role in names:
            client.set_model(names[role])


def _write_models(clients: Mapping[str, Client], path: Path) -> None:
    files.write_json(path, {role: client.endpoint.model for role, client in clients.items()})
