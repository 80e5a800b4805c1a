"""Profiles by config and by signal."""

import os
import signal

import pytest

from tanuki_jax.train import profile
from tests.train.test_loop import job, run, train_step


@pytest.fixture
def traces(monkeypatch):
    """Where traces began, and after how many steps each ended."""
    found, steps = [], [0]
    monkeypatch.setattr(profile.jax.profiler, "start_trace", lambda place: found.append([place, steps[0]]))
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: found[-1].append(steps[0]))

    def step(state, batch):
        steps[0] += 1
        return train_step(state, batch)

    return found, step


def test_a_window_of_steps(tmp_path, traces):
    found, step = traces
    run(job(tmp_path, profile_start=3, profile_steps=2), step=step)
    assert found == [[str(tmp_path / "profile/step-3"), 2, 4]]


def test_none_where_none_is_asked_for(tmp_path, traces):
    run(job(tmp_path), step=traces[1])
    assert not traces[0]


def test_a_signal_begins_one_and_the_end_of_the_run_ends_it(tmp_path, traces):
    found, step = traces
    before = signal.getsignal(signal.SIGUSR1)

    def batches(first):
        for n in range(first, 1000):
            if n == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
            yield n

    run(job(tmp_path, profile_steps=100), batches, step=step)
    assert found == [[str(tmp_path / "profile/step-5"), 4, 9]]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_real_profile_is_written(tmp_path):
    run(job(tmp_path, profile_start=2, profile_steps=3))
    assert list((tmp_path / "profile/step-2").rglob("*.xplane.pb"))
