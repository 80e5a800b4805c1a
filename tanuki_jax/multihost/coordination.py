"""Short texts between the processes of a run, and doing shared work once.

They go through JAX's coordination service (the key-value store of process 0), not through the devices, so that every wait has
a time-out and names the process that is missing.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import jax
from jax._src import distributed  # the store has no public name; Orbax and multihost_utils use it in the same way

from tanuki_jax.errors import PeerLost, UserError

Result = TypeVar("Result")
# Seconds that processes wait: where they meet, to join at the start, and to hear of each other at all.
TIMEOUTS = {"TANUKI_WAIT_SECONDS": 3600, "TANUKI_JOIN_SECONDS": 300, "TANUKI_HEARTBEAT_SECONDS": 100}
_exchanges = itertools.count()


class _Store(Protocol):
    """What is used of JAX's client of the coordination service."""

    def key_value_set(self, key: str, value: str, *, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...

    def key_value_delete(self, key: str) -> None: ...

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None: ...


def timeout_seconds(name: str) -> int:
    """One of TIMEOUTS, or the environment variable of its name."""
    text = os.environ.get(name, "") or str(TIMEOUTS[name])
    if not text.isdecimal() or not int(text):
        raise UserError(f"{name} is {text!r}; set it to a whole number of seconds above 0")
    return int(text)


def wait_seconds() -> int:
    """How long processes wait where they meet."""
    return timeout_seconds("TANUKI_WAIT_SECONDS")


def process_slice() -> tuple[int, int]:
    """This process's index and the number of processes: its part of work that is split evenly."""
    return jax.process_index(), jax.process_count()


def hostname() -> str:
    """The name of this machine."""
    return socket.gethostname()


def all_gather_text(text: str, purpose: str) -> list[str]:
    """The texts of all processes, in their order.  Collective: every process must call this with the same `purpose`.

    Raises:
      PeerLost: not all processes came within `wait_seconds`; the message names those that did not, and the purpose.
    """
    if jax.process_count() == 1:
        return [text]
    store, number, seconds = _store(), next(_exchanges), wait_seconds()
    key, process = f"tanuki/{number}/{purpose}", jax.process_index()
    try:
        store.key_value_set(f"{key}/{process}", text)
        store.wait_at_barrier(key, 1000 * seconds)
        texts = get_values(f"{key}/")
    except jax.errors.JaxRuntimeError as error:
        raise PeerLost(f"{purpose}: {_describe_missing(key, seconds)}") from error
    if process == 0 and number:
        store.key_value_delete(f"tanuki/{number - 1}/")  # all have read it, for they are here
    return [texts[other] for other in range(jax.process_count())]


def _describe_missing(key: str, seconds: int) -> str:
    try:
        present = get_values(f"{key}/")
        missing = [process_label(process) for process in range(jax.process_count()) if process not in present]
    except jax.errors.JaxRuntimeError:
        return "process 0, which the others meet at, does not answer"
    who = ", ".join(missing) or "a process"
    return f"{who} did not come within {seconds} s (TANUKI_WAIT_SECONDS), or is gone"


def _store() -> _Store:
    return cast(_Store, distributed.global_state.client)


def put_value(key: str, value: str) -> None:
    """Puts a value into the store, or replaces it."""
    _store().key_value_set(key, value, allow_overwrite=True)


def get_values(directory: str) -> dict[int, str]:
    """What processes have put below `directory` of the store, by process."""
    return {int(key.rpartition("/")[2]): value for key, value in _store().key_value_dir_get(directory)}


def process_label(process: int) -> str:
    """A process and its machine, for messages."""
    hosts = get_values("tanuki/host/") if jax.process_count() > 1 else {}
    return f"process {process} ({hosts[process]})" if process in hosts else f"process {process}"


def publish_hostname() -> None:
    """Tells the others the name of this machine."""
    put_value(f"tanuki/host/{jax.process_index()}", hostname())


def first_error(error: str, purpose: str = "a check") -> str:
    """The first text that is not empty, of those of all processes, the same on each of them; a collective."""
    return next(filter(None, all_gather_text(error, purpose)), "")


def assert_equal_across_processes(name: str, text: str) -> None:
    """Raises an error that names the process whose text differs from that of process 0; a collective."""
    texts = all_gather_text(text, name)
    for process, other in enumerate(texts):
        if other != texts[0]:
            raise UserError(
                f"{name}: {process_label(process)} has {other}, {process_label(0)} has {texts[0]}; all must be the same"
            )


def on_process_zero(work: Callable[[], Result], purpose: str = "work done once") -> Result | None:
    """Runs work on process 0 while the others wait; its result there, None elsewhere.  If it fails, all fail."""
    if jax.process_count() == 1:
        return work()
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = work()
        except Exception as raised:  # raised again once the others know
            error = raised
    failed = first_error("failed" if error else "", purpose)
    if error is not None:
        raise error
    if failed:
        raise UserError(f"the first process could not go on ({purpose}); its message says why")
    return result


def first_then_all(work: Callable[[], Result], purpose: str = "work done once") -> Result:
    """Runs idempotent work on process 0, then on the others, who find it done (on a shared file system)."""
    result = on_process_zero(work, purpose)
    return cast(Result, result) if jax.process_index() == 0 else work()
