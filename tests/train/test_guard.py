"""What judges a run: properties of the guard, of events, and of going back."""

import dataclasses
import functools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax import config
from tanuki_jax.checkpoint import Checkpoints
from tanuki_jax.multihost import watchdog
from tanuki_jax.train import loop
from tanuki_jax.train.guard import Events, Guard, read_events
from tanuki_jax.train.loop import run_loop
from tanuki_jax.train.optimizer import make_optimizer
from tanuki_jax.train.step import init_state, make_train_step, make_update
from tests.checkpoint.test_checksums import STATE, state_of

# --- the guard ------------------------------------------------------------------------------------------------------------


def quiet(steps, level=2.0, seed=0):
    """Losses and norms without a spike."""
    rng = np.random.default_rng(seed)
    return [(level + 0.01 * rng.standard_normal(), math.exp(0.1 * rng.standard_normal())) for _ in range(steps)]


def looked(guard, values, first=1):
    return [guard.observe(step, loss, norm) for step, (loss, norm) in enumerate(values, first)]


@pytest.mark.parametrize("spike", [(1000.0, 1.0), (2.0, 1e4), (1e30, 1e30)])
@pytest.mark.parametrize("at", [21, 150, 900])
def test_a_spike_is_found_wherever_it_is(spike, at):
    guard = Guard(config.Guard())
    values = quiet(1000)
    values[at - 1] = spike
    assert [step for step, verdict in enumerate(looked(guard, values), 1) if verdict != "good"] == [at]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_compared_with(bad):
    guard, values = Guard(config.Guard()), quiet(300)
    for n in range(0, 300, 3):
        values[n] = (bad, 1.0) if n % 2 else (1.0, bad)
    verdicts = looked(guard, values)
    assert all((verdict == "not_finite") == (n % 3 == 0) for n, verdict in enumerate(verdicts))
    assert set(verdicts) == {"not_finite", "good"} and guard.nonfinite_count == 0


def test_spikes_in_a_row_are_counted_from_their_first():
    guard = Guard(config.Guard())
    looked(guard, quiet(50))
    assert looked(guard, [(30.0, 1.0)] * 3, 51) == ["spike"] * 3 and (guard.spike_count, guard.spike_start) == (3, 51)
    looked(guard, quiet(1), 54)
    looked(guard, [(30.0, 1.0)], 55)
    assert (guard.spike_count, guard.spike_start) == (1, 55)


@given(st.integers(20, 400), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_a_resumed_run_judges_like_one_that_was_not_interrupted(cut, seed):
    values = quiet(400, seed=seed) + [(2.5, 1.0), (3.0, 1.0), (2.0, 50.0), (2.0, 2.0)]
    whole, resumed = Guard(config.Guard()), Guard(config.Guard())
    looked(whole, values[:cut])
    resumed.replay(dict(step=n, loss=loss, grad_norm=norm) for n, (loss, norm) in enumerate(values[:cut], 1))
    assert looked(whole, values[cut:], cut + 1) == looked(resumed, values[cut:], cut + 1)


def test_a_logged_spike_is_not_compared_with_after_a_restart_either():
    values = [(2.0 + 40 * (n % 3 == 0 and n >= 60), 1.0) for n in range(150)]
    whole, resumed = Guard(config.Guard()), Guard(config.Guard())
    looked(whole, values)
    resumed.replay(dict(step=n, loss=loss, grad_norm=norm) for n, (loss, norm) in enumerate(values, 1))
    assert looked(whole, [(2.9, 1.0)], 151) == looked(resumed, [(2.9, 1.0)], 151)


@pytest.mark.parametrize("log_every", [1, 2, 10])
@pytest.mark.parametrize("change", [40, 45])
def test_a_resumed_run_knows_nothing_of_losses_before_the_data_changed(log_every, change):
    """Whether or not the step of the change was logged."""
    values = quiet(change) + quiet(25, level=4.0)
    resumed = Guard(config.Guard(), (change,))
    logged = [n for n in range(1, len(values) + 1) if n % log_every == 0]
    resumed.replay(dict(step=n, loss=values[n - 1][0], grad_norm=values[n - 1][1]) for n in logged)
    assert all(loss > 3 for loss in resumed._losses)
    assert set(looked(resumed, quiet(60, level=4.0), len(values) + 1)) == {"good"}


# --- events ---------------------------------------------------------------------------------------------------------------


def test_a_last_line_cut_anywhere_costs_that_line_only(tmp_path):
    events = Events(tmp_path)
    events.add("spike", 1, loss=2.0)
    events.add("damaged_checkpoint", 2, what="狸が化けた")
    whole = events.path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) - 1):
        events.path.write_bytes(whole[:cut])
        assert [e["step"] for e in read_events(tmp_path) if e["event"] == "spike"] == [1], cut
        events.add("preempted", 3)  # by the run that goes on
        assert [e["step"] for e in read_events(tmp_path)] == [1, 3], cut


def test_processes_but_the_first_write_no_events(tmp_path):
    Events(tmp_path / "stage", active=False).add("spike", 1)
    assert read_events(tmp_path / "stage") == [] and not (tmp_path / "stage").exists()


# --- going back -----------------------------------------------------------------------------------------------------------


def test_restoring_after_going_back_does_not_hang(tmp_path, monkeypatch):
    exits = []
    monkeypatch.setattr(watchdog.os, "_exit", exits.append)
    restore = Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda *args: time.sleep(1.0) or restore(*args))
    losses = {n: 2.0 + 30 * (41 <= n < 46) for n in range(100)}
    watched(tmp_path, losses, config.Guard(step_timeout_seconds=0.6))
    assert not exits


def watched(directory, losses, options=None, steps=60, **more):
    """The loop with a step that adds its batch, whose number is looked up among `losses`; the batches of its last attempt."""
    seen = []

    def batches(first, number):
        seen.clear()
        for step in range(first, steps):
            seen.append(number(step))
            yield losses[number(step)]

    def step(state, batch):
        return dataclasses.replace(state, step=state.step + 1), {"loss": jnp.float32(batch), "grad_norm": jnp.float32(1)}

    settings = dict(save_every=10, log_every=1, guard=options or config.Guard()) | more
    job = loop.Job("toy", directory, config.Stage(**settings), steps, 10, 1.0, {"model": {}})
    return run_loop(job, STATE, lambda: state_of(0.0), step, batches), seen


def test_two_spikes_soon_after_one_another_leave_out_just_their_batches(tmp_path):
    """The second lies behind the first on the way from the same checkpoint."""
    high = [*range(41, 46), *range(53, 58)]
    losses = {n: 2.0 + 30 * (n in high) for n in range(100)}
    _, seen = watched(tmp_path, losses)
    left = [event["batches_left_out"] for event in read_events(tmp_path) if event["event"] == "rollback"]
    assert left == [[41, 45], [53, 57]]
    trained = [n for n in range(100) if n not in high][:60]
    assert seen == trained[-len(seen) :]


def test_saves_during_a_spike_do_not_push_out_the_one_before_it(tmp_path):
    losses = {n: 2.0 + 30 * (25 <= n < 30) for n in range(100)}
    watched(tmp_path, losses, steps=32, save_every=2, keep_latest=1)
    [back] = [event for event in read_events(tmp_path) if event["event"] == "rollback"]
    assert back["to"] == 24


# --- a real step ----------------------------------------------------------------------------------------------------------


@functools.cache
def regression():
    """A least-squares problem with the real train step; its rows [B, 4] and their targets."""
    truth = jnp.arange(1.0, 5.0)

    def loss_fn(params, batch, balance, key):
        error = (batch @ params["w"] - batch @ truth) ** 2
        return error.sum(), jnp.float32(len(batch)), {"loss": (error.sum(), jnp.float32(len(batch)))}

    optimizer = make_optimizer(config.Optimizer(weight_decay=0.0))
    return optimizer, make_train_step(loss_fn, make_update(optimizer, lambda step: 0.1, clip_norm=1.0))


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_poisoned_batches_are_told_and_the_run_converges(tmp_path, poison):
    """1e30 is finite, but its square is not."""
    optimizer, train_step = regression()
    fresh = lambda: init_state({"w": jnp.zeros(4)}, optimizer, jax.random.key(0))  # noqa: E731
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), fresh())

    def batches(first, number):
        for step in range(first, 300):
            rows = np.random.default_rng(number(step)).standard_normal((8, 4)).astype(np.float32)
            rows[3, 2] = poison if number(step) in (5, 70, 71, 72) else rows[3, 2]
            yield jnp.asarray(rows)

    job = loop.Job("toy", tmp_path, config.Stage(save_every=100, log_every=1), 300, 8, 1.0, {"model": {}})
    state = run_loop(job, abstract, fresh, train_step, batches)
    told = [(event["event"], event["step"]) for event in read_events(tmp_path)]
    assert [step for event, step in told if event == "not_finite"] == [6, 71, 72, 73]
    np.testing.assert_allclose(state.params["w"], np.arange(1.0, 5.0), atol=0.1)
    assert all(math.isfinite(json.loads(line)["loss"]) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
