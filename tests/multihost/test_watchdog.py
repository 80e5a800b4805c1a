"""A phase that takes too long is reported, and ends the process where it has a limit; the process behind is named."""

import threading
import time

import pytest

from tanuki_jax.multihost import coordination, watchdog


@pytest.fixture
def exits(monkeypatch):
    found = []
    monkeypatch.setattr(watchdog.os, "_exit", found.append)
    return found


def eventually(true, seconds=1.5):
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.02)
    return true()


def test_a_phase_that_takes_too_long_is_reported_once_and_ends_the_process(exits):
    reports = []
    with watchdog.watch_for_hangs(reports.append):
        for step in range(4):
            watchdog.enter_phase(f"step {step}", 0.2, 0.2)
        assert eventually(lambda: exits)
        assert (
            exits[0] == watchdog.EXIT_HANG
            and [report["what"] for report in reports] == ["step 3"]
            and reports[0]["seconds"] >= 0.2
        )


def test_a_hang_is_reported_before_the_process_ends(exits):
    reports = []
    with watchdog.watch_for_hangs(reports.append):
        watchdog.enter_phase("step", 0.1, 0.5)
        assert eventually(lambda: reports) and not exits
        assert eventually(lambda: exits) and len(reports) == 1


def test_every_phase_has_its_own_time(exits):
    reports = []
    with watchdog.watch_for_hangs(reports.append):
        for _ in range(8):
            watchdog.enter_phase("step", 0.3, 0.3)
            time.sleep(0.1)
    assert not reports and not exits


def test_a_disk_that_is_full_does_not_keep_a_hanging_process_alive(exits):
    def full(found):
        raise OSError(28, "No space left on device")

    with watchdog.watch_for_hangs(full):
        watchdog.enter_phase("step", 0.1, 0.1)
        assert eventually(lambda: exits)


def test_a_single_process_may_take_long_where_no_limit_is_named(exits, monkeypatch):
    """Nobody waits for it; it is told, for it may be a mistake."""
    monkeypatch.setattr(watchdog.coordination, "wait_seconds", lambda: 0.1)
    reports = []
    with watchdog.watch_for_hangs(reports.append):
        watchdog.enter_phase("preparing data")
        assert eventually(lambda: reports)
        time.sleep(0.2)
    assert not exits and len(reports) == 1


def test_the_inner_watch_is_called_and_the_outer_phase_is_entered_again(exits):
    outer, inner = [], []
    with watchdog.watch_for_hangs(outer.append):
        watchdog.enter_phase("outside", 0.4, 0)
        with watchdog.watch_for_hangs(inner.append):
            watchdog.enter_phase("inside", 0.1, 0)
            assert eventually(lambda: inner) and not outer
        assert eventually(lambda: outer)
    assert [found["what"] for found in (*inner, *outer)] == ["inside", "outside"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watch")]


def test_the_process_behind_is_named(monkeypatch):
    state = lambda number, phase, host: dict(phase_number=number, phase=phase, host=host, input_wait=0.0)  # noqa: E731
    states = {1: state(40, "input after step 12", "b"), 2: state(41, "step after step 12", "c")}
    monkeypatch.setattr(watchdog, "_states", states)
    assert watchdog._processes_behind(watchdog._Phase(41, "step after step 12")) == {
        "waits_for": "process 1 (b) in input after step 12"
    }
    states[1] = state(41, "step after step 12", "b")
    assert "nobody" in watchdog._processes_behind(watchdog._Phase(41, "step after step 12"))["waits_for"]


def test_the_slowest_process_waits_longest_for_its_input(monkeypatch):
    assert watchdog.slowest_process() is None
    states = {n: {"input_wait": wait, "host": f"h{n}"} for n, wait in enumerate((0.1, 0.1, 0.9, 0.2))}
    monkeypatch.setattr(watchdog, "_states", states)
    assert watchdog.slowest_process() == {"process": 2, "host": "h2", "seconds": 0.9, "median": 0.1}


@pytest.mark.parametrize("text", ["0", "-3", "an hour", "nan", "1.5"])
def test_a_timeout_that_is_no_number_of_seconds_is_an_error(text, monkeypatch):
    monkeypatch.setenv("TANUKI_WAIT_SECONDS", text)
    with pytest.raises(coordination.UserError, match="TANUKI_WAIT_SECONDS"):
        coordination.wait_seconds()
