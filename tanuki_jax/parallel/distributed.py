"""Several processes: bring-up, and doing shared work once."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from tanuki_jax.errors import UserError

T = TypeVar("T")
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


def to_host(array: jax.Array) -> np.ndarray:
    """The whole value of a global array, on every process."""
    if jax.process_count() == 1 or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
