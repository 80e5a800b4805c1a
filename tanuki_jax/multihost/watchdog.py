"""Watchdog: detects hangs and names the straggling process.

All processes enter the same phases in the same order, so the process that has entered the fewest is the one that the others
wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, TypedDict

import jax

from tanuki_jax.multihost import coordination

EXIT_HANG = 76  # exit code of a process that ended itself
TICK = 1.0  # seconds between two checks
SUSPENDED_SECONDS = 10.0  # seconds between two checks that show that the whole process was suspended

HangReport: TypeAlias = dict[str, object]  # what, seconds, and, with several processes, waits_for


@dataclass(frozen=True)
class _Phase:
    number: int = 0  # phases entered before
    name: str = "the beginning"
    start: float = 0.0  # by time.monotonic
    warn_seconds: float = 0.0  # after which a hang is reported; 0 = never
    exit_seconds: float = 0.0  # after which the process ends; 0 = never


class _ProcessState(TypedDict):
    """What a process publishes about itself."""

    phase_number: int
    phase: str
    host: str
    input_wait: float


class SlowestProcess(TypedDict):
    """The process that waits longest for its input, and how long in a step; `median` is that of the process in the middle."""

    process: int
    host: str
    seconds: float
    median: float


_phase = _Phase()
_input_wait = 0.0  # seconds per step that this process waits for its input
_states: dict[int, _ProcessState] = {}  # by process; replaced, not changed, because threads read it
_callbacks: list[Callable[[HangReport], None]] = []


def enter_phase(name: str, warn_seconds: float | None = None, exit_seconds: float | None = None) -> None:
    """This process begins the phase `name`.  Without limits it may take `coordination.wait_seconds`.

    warn_seconds: after which a hang is reported, with the stacks of all threads; 0 = never.
    exit_seconds: after which the process ends with EXIT_HANG, for a launcher to restart it; 0 = never.
    """
    global _phase
    wait = coordination.wait_seconds() if warn_seconds is None or exit_seconds is None else 0.0
    if warn_seconds is None:
        warn_seconds = wait
    if exit_seconds is None:  # a single process keeps nobody waiting, and preparing data may take long
        exit_seconds = 0.0 if jax.process_count() == 1 else wait
    _phase = _Phase(_phase.number + 1, name, time.monotonic(), warn_seconds, exit_seconds)


def report_input_wait(seconds: float) -> None:
    """Notes how long this process waits per step for its own input."""
    global _input_wait
    _input_wait = seconds


@contextlib.contextmanager
def watch_for_hangs(on_hang: Callable[[HangReport], None]) -> Iterator[None]:
    """While inside, a thread checks whether this process makes progress; `on_hang` is called when it does not.

    May be nested: then the inner callback is called, and afterwards the phase before is entered again.
    """
    global _phase, _input_wait, _states
    outer_phase, _input_wait, _states = _phase, 0.0, {}
    _callbacks.append(on_hang)
    stop, threads = threading.Event(), []
    if len(_callbacks) == 1:
        enter_phase("the beginning")
        loops = [_check_until] + ([_publish_until] if jax.process_count() > 1 else [])
        threads = [threading.Thread(target=loop, args=(stop,), name=f"watch{loop.__name__}", daemon=True) for loop in loops]
        for thread in threads:
            thread.start()
    try:
        yield
    finally:
        _callbacks.pop()
        if _callbacks:
            enter_phase(outer_phase.name, outer_phase.warn_seconds, outer_phase.exit_seconds)
        stop.set()
        for thread in threads:
            thread.join(10)  # the store may not answer


def slowest_process() -> SlowestProcess | None:
    """The process that waits longest for its input in a step, as far as this one has heard; None where it is alone."""
    states = _states
    waits = sorted((state["input_wait"], process) for process, state in states.items())
    if not waits:
        return None
    seconds, process = waits[-1]
    return {
        "process": process,
        "host": states[process]["host"],
        "seconds": seconds,
        "median": waits[(len(waits) - 1) // 2][0],
    }


def _publish_until(stop: threading.Event) -> None:
    """Publishes the state of this process, and reads that of the others."""
    global _states
    host, published = coordination.hostname(), (-1, 0.0)
    while not stop.is_set():
        phase, input_wait = _phase, _input_wait
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # JAX itself reports a store that is gone
            if published != (phase.number, input_wait):
                state = _ProcessState(phase_number=phase.number, phase=phase.name, host=host, input_wait=input_wait)
                coordination.put_value(f"tanuki/at/{jax.process_index()}", json.dumps(state))
                published = (phase.number, input_wait)
            _states = {process: json.loads(text) for process, text in coordination.get_values("tanuki/at/").items()}
        stop.wait(TICK)


def _check_until(stop: threading.Event) -> None:
    reported, last_check = -1, time.monotonic()
    suspended_phase, suspended = -1, 0.0  # seconds of a phase in which the process was suspended
    while not stop.wait(min(TICK, (_phase.warn_seconds or TICK) / 10, (_phase.exit_seconds or TICK) / 10)):
        phase, now = _phase, time.monotonic()
        if suspended_phase != phase.number:
            suspended_phase, suspended = phase.number, 0.0
        if now - last_check > SUSPENDED_SECONDS:  # this thread was suspended as well (Ctrl-Z, a machine asleep): no hang
            suspended += now - last_check
        last_check = now
        seconds = now - phase.start - suspended
        if phase.warn_seconds and seconds > phase.warn_seconds and reported != phase.number:
            reported = phase.number
            _report(phase, seconds)
        if phase.exit_seconds and seconds > phase.exit_seconds:
            if reported != phase.number:
                _report(phase, seconds)
            print(
                f"tanuki: {phase.name} took longer than {phase.exit_seconds:g} s; the process ends", file=sys.stderr, flush=True
            )
            os._exit(EXIT_HANG)


def _report(phase: _Phase, seconds: float) -> None:
    report: HangReport = {"what": phase.name, "seconds": round(seconds, 1), **_processes_behind(phase)}
    with contextlib.suppress(OSError):  # a full disk must not keep a hanging process alive
        for on_hang in _callbacks[-1:]:  # empty where the watch is about to end
            on_hang(report)
    faulthandler.dump_traceback(all_threads=True)


def _processes_behind(phase: _Phase) -> dict[str, str]:
    """Which of several processes are behind the others, as `waits_for`."""
    host, this_process = coordination.hostname(), jax.process_index()
    states = {
        **_states,
        this_process: _ProcessState(phase_number=phase.number, phase=phase.name, host=host, input_wait=_input_wait),
    }
    if len(states) < 2:
        return {}
    numbers = [state["phase_number"] for state in states.values()]
    if min(numbers) == max(numbers):
        return {"waits_for": "nobody: all processes are there"}
    behind = [
        f"process {process} ({state['host']}) in {state['phase']}"
        for process, state in sorted(states.items())
        if state["phase_number"] == min(numbers)
    ]
    return {"waits_for": ", ".join(behind)}
