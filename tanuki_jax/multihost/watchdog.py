"""Where this process is in the program, whether it gets on, and which process is behind when it does not.

All processes come to the same places in the same order, so that the one that has come to the fewest is the one that the
others wait for.
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
from typing import Any

import jax

from tanuki_jax.multihost import coordination

EXIT_HANG = 76  # exit code of a process that ended itself
TICK = 1.0  # seconds between two looks
SUSPENDED_SECONDS = 10.0  # seconds between two looks that say that the whole process was stopped


@dataclass(frozen=True)
class _Phase:
    passed: int = 0  # places that were come to before
    what: str = "the beginning"
    since: float = 0.0  # of time.monotonic
    tell: float = 0.0  # seconds after which it is told that it takes long; 0 = never
    end: float = 0.0  # seconds after which the process ends; 0 = never


_phase = _Phase()
_input_wait = 0.0  # seconds of a step that this process waits for its input
_others: dict[int, dict[str, Any]] = {}  # what the store says of all processes; a new one each time, for threads read it
_callbacks: list[Callable[[dict[str, Any]], None]] = []


def enter_phase(what: str, tell: float | None = None, end: float | None = None) -> None:
    """This process has come to `what`.  Without limits of its own it may stay there for `coordination.wait_seconds`.

    tell: seconds after which it is said, with the stacks of all threads, that it takes long; 0 = never.
    end: seconds after which the process ends with EXIT_HANG, for a launcher to start it anew; 0 = never.
    """
    global _phase
    wait = coordination.wait_seconds() if tell is None or end is None else 0.0
    alone = jax.process_count() == 1  # nobody waits for it, and preparing data may take long
    tell = wait if tell is None else tell
    end = (0.0 if alone else wait) if end is None else end
    _phase = _Phase(_phase.passed + 1, what, time.monotonic(), tell, end)


def report_input_wait(seconds: float) -> None:
    """Notes how long this process waits for the input of a step, which no other does in its place."""
    global _input_wait
    _input_wait = seconds


@contextlib.contextmanager
def watch_for_hangs(tell: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """While inside, a thread looks whether this process gets on; `tell` hears where it does not.

    May be nested: then the inner one hears, and the place before is the place again.
    """
    global _phase, _input_wait, _others
    before, _input_wait, _others = _phase, 0.0, {}
    _callbacks.append(tell)
    stop, threads = threading.Event(), []
    if len(_callbacks) == 1:
        enter_phase("the beginning")
        work = [_check_once] + ([_publish] if jax.process_count() > 1 else [])
        threads = [threading.Thread(target=f, args=(stop,), name=f"watch{f.__name__}", daemon=True) for f in work]
        for thread in threads:
            thread.start()
    try:
        yield
    finally:
        _callbacks.pop()
        if _callbacks:
            enter_phase(before.what, before.tell, before.end)
        stop.set()
        for thread in threads:
            thread.join(10)  # the store may not answer


def slowest_process() -> dict[str, Any]:
    """The process that waits longest for its input in a step, as far as this one has heard; empty where it is alone.

    `process`, `host`, `seconds` of each step, and `median`, those of the process in the middle.
    """
    others = _others
    spent = sorted((place["own"], process) for process, place in others.items())
    if not spent:
        return {}
    seconds, process = spent[-1]
    return {
        "process": process,
        "host": others[process]["host"],
        "seconds": seconds,
        "median": spent[(len(spent) - 1) // 2][0],
    }


def _publish(stop: threading.Event) -> None:
    """Tells the others where this process is, and hears where they are."""
    global _others
    host, told = coordination.hostname(), (-1, 0.0)
    while not stop.is_set():
        place, own = _phase, _input_wait
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # a store that is gone is told by JAX itself
            if told != (place.passed, own):
                entry = {"passed": place.passed, "what": place.what, "host": host, "own": own}
                coordination.put_value().key_value_set(
                    f"tanuki/at/{jax.process_index()}", json.dumps(entry), allow_overwrite=True
                )
                told = (place.passed, own)
            _others = {process: json.loads(text) for process, text in coordination.get_value("tanuki/at/").items()}
        stop.wait(TICK)


def _check_once(stop: threading.Event) -> None:
    told, last, asleep = -1, time.monotonic(), (-1, 0.0)
    while not stop.wait(min(TICK, (_phase.tell or TICK) / 10, (_phase.end or TICK) / 10)):
        place, now = _phase, time.monotonic()
        if now - last > SUSPENDED_SECONDS:  # this thread was stopped as well (Ctrl-Z, a machine asleep): that is no hang
            asleep = (place.passed, now - last + (asleep[1] if asleep[0] == place.passed else 0.0))
        last = now
        took = now - place.since - (asleep[1] if asleep[0] == place.passed else 0.0)
        if place.tell and took > place.tell and told != place.passed:
            told = place.passed
            _notify(place, took)
        if place.end and took > place.end:
            if told != place.passed:
                _notify(place, took)
            print(f"tanuki: {place.what} took longer than {place.end:g} s; the process ends", file=sys.stderr, flush=True)
            os._exit(EXIT_HANG)


def _notify(place: _Phase, took: float) -> None:
    found = {"what": place.what, "seconds": round(took, 1), **_processes_behind(place)}
    with contextlib.suppress(OSError):  # a full disk must not keep a hanging process alive
        for tell in _callbacks[-1:]:  # none where the watch is about to end
            tell(found)
    faulthandler.dump_traceback(all_threads=True)


def _processes_behind(place: _Phase) -> dict[str, Any]:
    """Who is behind the others, of several processes."""
    places = {**_others, jax.process_index(): {"passed": place.passed, "what": place.what, "host": coordination.hostname()}}
    if len(places) < 2:
        return {}
    first, last = (pick(p["passed"] for p in places.values()) for pick in (min, max))
    if first == last:
        return {"waits_for": "nobody: all processes are there"}
    late = [f"process {n} ({p['host']}) in {p['what']}" for n, p in sorted(places.items()) if p["passed"] == first]
    return {"waits_for": ", ".join(late)}
