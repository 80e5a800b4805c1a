"""A place where the process stays too long is told, and ends it where it is to; who is behind is named."""

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


def test_where_it_stays_too_long_is_told_once_and_ends_the_process(exits):
    told = []
    with watchdog.watch_for_hangs(told.append):
        for step in range(4):
            watchdog.enter_phase(f"step {step}", 0.2, 0.2)
        assert eventually(lambda: exits)
        assert exits[0] == watchdog.EXIT_HANG and [found["what"] for found in told] == ["step 3"] and told[0]["seconds"] >= 0.2


def test_it_is_told_before_it_ends(exits):
    told = []
    with watchdog.watch_for_hangs(told.append):
        watchdog.enter_phase("step", 0.1, 0.5)
        assert eventually(lambda: told) and not exits
        assert eventually(lambda: exits) and len(told) == 1


def test_every_place_has_its_time_anew(exits):
    told = []
    with watchdog.watch_for_hangs(told.append):
        for _ in range(8):
            watchdog.enter_phase("step", 0.3, 0.3)
            time.sleep(0.1)
    assert not told and not exits


def test_a_disk_that_is_full_does_not_keep_a_hanging_process_alive(exits):
    def full(found):
        raise OSError(28, "No space left on device")

    with watchdog.watch_for_hangs(full):
        watchdog.enter_phase("step", 0.1, 0.1)
        assert eventually(lambda: exits)


def test_a_single_process_may_take_long_where_no_limit_is_named(exits, monkeypatch):
    """Nobody waits for it; it is told, for it may be a mistake."""
    monkeypatch.setattr(watchdog.peers, "wait_seconds", lambda: 0.1)
    told = []
    with watchdog.watch_for_hangs(told.append):
        watchdog.enter_phase("preparing data")
        assert eventually(lambda: told)
        time.sleep(0.2)
    assert not exits and len(told) == 1


def test_the_inner_one_hears_and_the_place_before_is_the_place_again(exits):
    outer, inner = [], []
    with watchdog.watch_for_hangs(outer.append):
        watchdog.enter_phase("outside", 0.4, 0)
        with watchdog.watch_for_hangs(inner.append):
            watchdog.enter_phase("inside", 0.1, 0)
            assert eventually(lambda: inner) and not outer
        assert eventually(lambda: outer)
    assert [found["what"] for found in (*inner, *outer)] == ["inside", "outside"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watch")]


def test_who_is_behind_is_named(monkeypatch):
    entry = lambda passed, what, host: {"passed": passed, "what": what, "host": host, "own": 0.0}  # noqa: E731
    others = {1: entry(40, "input after step 12", "b"), 2: entry(41, "step after step 12", "c")}
    monkeypatch.setattr(watchdog, "_others", others)
    assert watchdog._processes_behind(watchdog._Phase(41, "step after step 12")) == {
        "waits_for": "process 1 (b) in input after step 12"
    }
    others[1] = entry(41, "step after step 12", "b")
    assert "nobody" in watchdog._processes_behind(watchdog._Phase(41, "step after step 12"))["waits_for"]


def test_the_slowest_process_is_the_one_that_spends_most_beside_its_devices(monkeypatch):
    assert watchdog.slowest_process() == {}
    others = {n: {"own": own, "host": f"h{n}"} for n, own in enumerate((0.1, 0.1, 0.9, 0.2))}
    monkeypatch.setattr(watchdog, "_others", others)
    assert watchdog.slowest_process() == {"process": 2, "host": "h2", "seconds": 0.9, "median": 0.1}


@pytest.mark.parametrize("text", ["0", "-3", "an hour", "nan", "1.5"])
def test_a_time_to_wait_that_is_none_is_an_error(text, monkeypatch):
    monkeypatch.setenv("TANUKI_WAIT_SECONDS", text)
    with pytest.raises(coordination.UserError, match="TANUKI_WAIT_SECONDS"):
        coordination.wait_seconds()
