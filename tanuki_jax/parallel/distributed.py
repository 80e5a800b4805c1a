"""Several processes: bring-up, and doing shared work once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from tanuki_jax.errors import UserError

T = TypeVar("T")
TEXT = 256  # bytes of a text that all processes hear
VARIABLES = ("TANUKI_COORDINATOR", "TANUKI_PROCESSES", "TANUKI_PROCESS_ID")


def initialize() -> None:
    """Joins the other processes of the run, before any device is used.

    On TPU pods, Slurm and GKE, JAX finds them by itself where TANUKI_COORDINATOR=auto.  Elsewhere set
    TANUKI_COORDINATOR=host:port, TANUKI_PROCESSES and TANUKI_PROCESS_ID.  Without these there is one process.
    """
    coordinator, processes, process = (os.environ.get(v) for v in VARIABLES)
    if not coordinator:
        return
    if coordinator == "auto":
        jax.distributed.initialize()
        return
    if not (processes or "").isdigit() or not (process or "").isdigit():
        raise UserError(
            "TANUKI_COORDINATOR is set; set TANUKI_PROCESSES and TANUKI_PROCESS_ID to whole numbers too, "
            "or TANUKI_COORDINATOR=auto"
        )
    jax.distributed.initialize(coordinator, int(processes or 0), int(process or 0))


def on_first(work: Callable[[], T]) -> T | None:
    """Runs work on the first process while the others wait; its result there, None elsewhere.  If it fails, all fail."""
    if jax.process_count() == 1:
        return work()
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = work()
        except Exception as raised:  # the others must hear of it before it goes on
            error = raised
    failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
    if error is not None:
        raise error
    if failed:
        raise UserError("the first process could not go on; its message says why")
    return result


def once(work: Callable[[], T]) -> T:
    """Runs idempotent work on the first process, then on the others, who find it done (on a shared file system)."""
    result = on_first(work)
    return cast(T, result) if jax.process_index() == 0 else work()


def share() -> tuple[int, int]:
    """This process's number and how many there are: its part of work that is cut evenly."""
    return jax.process_index(), jax.process_count()


def first_of(found: str) -> str:
    """The first text that is not empty, of those of all processes, the same on each of them."""
    if jax.process_count() == 1:
        return found
    own = np.zeros(TEXT, np.uint8)
    data = found.encode()[:TEXT]
    own[: len(data)] = np.frombuffer(data, np.uint8)
    texts = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(own)]
    return next(filter(None, texts), "")


@contextlib.contextmanager
def stop_notice() -> Iterator[Callable[[int], bool]]:
    """Asks after every step whether the run is to stop: SIGTERM came, or the platform's notice; all processes hear the same.

    With several processes JAX's preemption service listens, and agrees on the step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    noticed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    try:
        yield lambda step: noticed.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def to_host(array: jax.Array) -> np.ndarray:
    """The whole value of a global array, on every process."""
    if jax.process_count() == 1 or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
