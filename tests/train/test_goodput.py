"""Seconds by phase: they add up, and those of steps that are repeated are counted as replayed."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax.train import goodput
from tanuki_jax.train.goodput import Clock
from tests.train.test_loop import events, job, rows, run, train_step


@given(st.lists(st.tuples(st.sampled_from(goodput.PHASES[:-1]), st.floats(0.1, 50)), min_size=1, max_size=30))
@settings(deadline=None)
def test_times_add_up_to_all_seconds(parts):
    with pytest.MonkeyPatch.context() as patch:
        now = [100.0]
        patch.setattr(goodput.time, "monotonic", lambda: now[0])
        clock = Clock(10)
        for step, (kind, seconds) in enumerate(parts):
            with clock.phase(kind):
                now[0] += seconds
            clock.end_step(step)
        times = clock.seconds_by_phase()
    assert sum(times.values()) == pytest.approx(clock.seconds, abs=0.01)
    assert 0 <= clock.goodput() <= 1.01  # both are rounded


def test_time_lost_in_several_kills_without_a_save_between_is_all_told(tmp_path):
    """A run that dies twice after the same checkpoint lost both times."""
    dies, lost = [14, 17], 0.0

    def step(state, batch):
        time.sleep(0.02)
        if dies and batch == dies[0]:
            raise RuntimeError(dies.pop(0))
        return train_step(state, batch)

    for _ in range(2):
        with pytest.raises(RuntimeError):
            run(job(tmp_path, steps=20, save_every=10), step=step)
        lost += rows(tmp_path)[-1]["seconds"] - rows(tmp_path)[9]["seconds"]
    run(job(tmp_path, steps=20, save_every=10), step=step)
    replayed = rows(tmp_path)[-1]["seconds_by_phase"]["replayed"]
    assert replayed == pytest.approx(lost, abs=5e-3)
    assert replayed == pytest.approx(sum(event["replayed_seconds"] for event in events(tmp_path)), abs=5e-3)


def test_the_times_add_up_and_lost_ones_are_told(tmp_path):
    def step(state, batch):
        time.sleep(0.02)
        if batch == 7:
            raise RuntimeError("replayed")
        return train_step(state, batch)

    with pytest.raises(RuntimeError, match="replayed"):
        run(job(tmp_path, save_every=4), step=step)
    first = rows(tmp_path)[-1]
    assert first["step"] == 6 and first["seconds_by_phase"]["replayed"] == 0
    run(job(tmp_path, save_every=4))
    last = rows(tmp_path)[-1]
    times, [event] = last["seconds_by_phase"], events(tmp_path)
    assert event["event"] == "resumed" and times["replayed"] == event["replayed_seconds"]
    assert times["replayed"] == pytest.approx(first["seconds"] - rows(tmp_path)[3]["seconds"], abs=2e-3)
    assert sum(times.values()) - times["replayed"] == pytest.approx(last["seconds"], abs=1e-2)
    assert 0 < last["goodput"] < 1 and all(value >= 0 for value in times.values())
