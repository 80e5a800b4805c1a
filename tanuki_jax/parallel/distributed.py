"""Several processes: bring-up, and doing shared work once."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from tanuki_jax.errors import UserError

T = TypeVar("T")
_listening: list[Any] = []  # the handler of SIGTERM before
_noticed, _asked = threading.Event(), itertools.count(1)  # the service counts over the whole run
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
def listening() -> Iterator[None]:
    """While inside, SIGTERM does not end the process but is noticed by `told_to_stop`; may be nested.

    With several processes JAX's preemption service listens instead, and agrees on the step.
    """
    if _listening or jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    _noticed.clear()
    _listening.append(signal.signal(signal.SIGTERM, lambda *_: _noticed.set()))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, _listening.pop())


def told_to_stop() -> bool:
    """Whether the run is to stop: SIGTERM came, or the platform's notice; to be asked by all processes, after every step.

    All hear the same.
    """
    if jax.process_count() > 1:
        return bool(multihost_utils.reached_preemption_sync_point(next(_asked)))
    return _noticed.is_set()


def to_host(array: jax.Array) -> np.ndarray:
    """The whole value of a global array, on every process."""
    if jax.process_count() == 1 or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
