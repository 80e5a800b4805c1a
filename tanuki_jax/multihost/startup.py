"""Several processes: joining them, and the request to stop."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeAlias

import jax
import numpy as np
from jax.experimental import multihost_utils

from tanuki_jax.errors import UserError
from tanuki_jax.multihost import coordination

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None
_outer_handlers: list[_Handler] = []  # the handler of SIGTERM before
_sigterm_received, _sync_points = threading.Event(), itertools.count(1)  # the service counts over the whole run
VARIABLES = ("TANUKI_COORDINATOR", "TANUKI_PROCESSES", "TANUKI_PROCESS_ID")


def initialize() -> None:
    """Joins the other processes of the run, before any device is used.

    On TPU pods, Slurm and GKE, JAX finds them by itself where TANUKI_COORDINATOR=auto.  Elsewhere set
    TANUKI_COORDINATOR=host:port, TANUKI_PROCESSES and TANUKI_PROCESS_ID.  Without these there is one process.

    When a process dies, or its machine stops, JAX ends all others within the heartbeat timeout, and names it.
    """
    coordinator, processes, process = (os.environ.get(v) for v in VARIABLES)
    if not coordinator:
        return
    limits = coordination.timeout_seconds("TANUKI_JOIN_SECONDS"), coordination.timeout_seconds("TANUKI_HEARTBEAT_SECONDS")
    if coordinator == "auto":
        _join(limits)
        return
    if not (processes or "").isdigit() or not (process or "").isdigit():
        raise UserError(
            "TANUKI_COORDINATOR is set; set TANUKI_PROCESSES and TANUKI_PROCESS_ID to whole numbers too, "
            "or TANUKI_COORDINATOR=auto"
        )
    _join(limits, coordinator, int(processes or 0), int(process or 0))


def _join(
    limits: tuple[int, int], coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    join, heartbeat = limits
    message = f"{coordination.hostname()} waits for the other processes of the run, at most {join} s (TANUKI_JOIN_SECONDS)"
    timer = threading.Timer(10, print, (message,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    jax.distributed.initialize(
        coordinator, processes, process, initialization_timeout=join, heartbeat_timeout_seconds=heartbeat
    )
    timer.cancel()
    coordination.publish_hostname()


@contextlib.contextmanager
def handle_sigterm() -> Iterator[None]:
    """While inside, SIGTERM does not end the process but makes `preemption_requested` true; may be nested.

    With several processes JAX's preemption service handles it instead, and agrees on the step.
    """
    if _outer_handlers or jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    _sigterm_received.clear()
    _outer_handlers.append(signal.signal(signal.SIGTERM, lambda *_: _sigterm_received.set()))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, _outer_handlers.pop())


def preemption_requested() -> bool:
    """Whether the run is to stop, after SIGTERM, the same on every process.

    Collective: every process must call this after every step.
    """
    if jax.process_count() > 1:
        return bool(multihost_utils.reached_preemption_sync_point(next(_sync_points)))
    return _sigterm_received.is_set()


def to_host(array: jax.Array) -> np.ndarray:
    """The whole value of a global array, on every process."""
    if jax.process_count() == 1 or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
