"""Short texts between the processes of a run, and doing shared work once.

They go through JAX's coordination service (the key-value store of process 0), not through the devices, so that every wait has
a time-out and names the process that did not come.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax._src import distributed  # the store has no public name; Orbax and multihost_utils reach it the same way

from tanuki_jax.errors import PeerLost, UserError

T = TypeVar("T")
# Seconds that processes wait: where they meet, to join at the start, and to hear of each other at all.
TIMEOUTS = {"TANUKI_WAIT_SECONDS": 3600, "TANUKI_JOIN_SECONDS": 300, "TANUKI_HEARTBEAT_SECONDS": 100}
_numbers = itertools.count()


def timeout_seconds(name: str) -> int:
    """One of LIMITS, or what the environment says in its place."""
    text = os.environ.get(name, "") or str(TIMEOUTS[name])
    if not text.isdecimal() or not int(text):
        raise UserError(f"{name} is {text!r}; set it to a whole number of seconds above 0")
    return int(text)


def wait_seconds() -> int:
    """How long processes wait where they meet."""
    return timeout_seconds("TANUKI_WAIT_SECONDS")


def process_slice() -> tuple[int, int]:
    """This process's number and how many there are: its part of work that is cut evenly."""
    return jax.process_index(), jax.process_count()


def hostname() -> str:
    """The name of this machine."""
    return socket.gethostname()


def all_gather_text(text: str, what: str) -> list[str]:
    """The texts of all processes, in their order; each must come here, with the same `what`, within `wait_seconds`.

    Raises:
      PeerLost: not all came; the message says who did not, and that it was for `what`.
    """
    if jax.process_count() == 1:
        return [text]
    client, number, seconds = put_value(), next(_numbers), wait_seconds()
    key, me = f"tanuki/{number}/{what}", jax.process_index()
    try:
        client.key_value_set(f"{key}/{me}", text)
        client.wait_at_barrier(key, 1000 * seconds)
        found = get_value(f"{key}/")
    except jax.errors.JaxRuntimeError as error:
        raise PeerLost(f"{what}: {_missing(key, seconds)}") from error
    if me == 0 and number:
        client.key_value_delete(f"tanuki/{number - 1}/")  # all have read it, for they are here
    return [found[process] for process in range(jax.process_count())]


def _missing(key: str, seconds: int) -> str:
    try:
        came = get_value(f"{key}/")
        named = [process_label(process) for process in range(jax.process_count()) if process not in came]
    except jax.errors.JaxRuntimeError:
        return "process 0, which the others meet at, does not answer"
    who = ", ".join(named) or "a process"
    return f"{who} did not come within {seconds} s (TANUKI_WAIT_SECONDS), or is gone"


def put_value() -> Any:
    """The client of the coordination service."""
    return distributed.global_state.client


def get_value(directory: str) -> dict[int, str]:
    """What processes have put below `directory` of the store, by process."""
    return {int(key.rpartition("/")[2]): value for key, value in put_value().key_value_dir_get(directory)}


def process_label(process: int) -> str:
    """A process and its machine, for messages."""
    known = get_value("tanuki/host/") if jax.process_count() > 1 else {}
    return f"process {process} ({known[process]})" if process in known else f"process {process}"


def publish_hostname() -> None:
    """Tells the others the name of this machine."""
    put_value().key_value_set(f"tanuki/host/{jax.process_index()}", hostname(), allow_overwrite=True)


def first_error(found: str, what: str = "a check") -> str:
    """The first text that is not empty, of those of all processes, the same on each of them."""
    return next(filter(None, all_gather_text(found, what)), "")


def assert_equal_across_processes(what: str, text: str) -> None:
    """An error that names the process whose text is another than that of process 0."""
    texts = all_gather_text(text, what)
    for process, other in enumerate(texts):
        if other != texts[0]:
            raise UserError(
                f"{what}: {process_label(process)} has {other}, {process_label(0)} has {texts[0]}; all must be the same"
            )


def on_process_zero(work: Callable[[], T], what: str = "work done once") -> T | None:
    """Runs work on the first process while the others wait; its result there, None elsewhere.  If it fails, all fail."""
    if jax.process_count() == 1:
        return work()
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = work()
        except Exception as raised:  # the others must hear of it before it goes on
            error = raised
    failed = first_error("failed" if error else "", what)
    if error is not None:
        raise error
    if failed:
        raise UserError(f"the first process could not go on ({what}); its message says why")
    return result


def first_then_all(work: Callable[[], T], what: str = "work done once") -> T:
    """Runs idempotent work on the first process, then on the others, who find it done (on a shared file system)."""
    result = on_process_zero(work, what)
    return cast(T, result) if jax.process_index() == 0 else work()
