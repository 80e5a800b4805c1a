"""The loop with a train step of one number, so that only the loop is tested."""

import dataclasses
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import config
from tanuki_jax.errors import Preempted, UserError
from tanuki_jax.train import goodput, loop
from tanuki_jax.train.guard import Guard
from tanuki_jax.train.loop import EvalHook, run_loop
from tanuki_jax.train.step import State


def job(directory, steps=9, **options):
    """Options are keys of a stage, or of a job."""
    of_job = {name: options.pop(name) for name in ("counters", "data_change_steps") if name in options}
    stage = config.Stage(**{**dict(save_every=2, log_every=1, keep_latest=1), **options})
    return loop.Job("toy", directory, stage, steps, 10, 1.0, {"model": {}}, **of_job)


def fresh_state():
    return State(jnp.int32(0), {"w": jnp.zeros(4)}, {"m": jnp.zeros(4)}, jax.random.key(0))


ABSTRACT = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), fresh_state())


def train_step(state, batch):
    """Adds the batch where it is finite, and calls it the loss."""
    good = bool(np.isfinite(batch))
    params = {"w": state.params["w"] + batch} if good else state.params
    metrics = {"loss": jnp.float32(batch), "grad_norm": jnp.float32(1)}
    return dataclasses.replace(state, step=state.step + 1, params=params), metrics


def run(this, batches=lambda first: iter(range(first, 1000)), step=train_step, probes=()):
    return run_loop(
        this, ABSTRACT, fresh_state, step, lambda first, number: batches(first), eval_hooks=[EvalHook(*p) for p in probes]
    )


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def logged(directory):
    return [row["step"] for row in rows(directory)]


def test_a_loss_that_is_not_finite_stops_the_run_and_the_checkpoint_before_is_good(tmp_path):
    poisoned = lambda first: iter([float("nan") if n == 6 else n for n in range(first, 1000)])  # noqa: E731
    with pytest.raises(loop.NotFinite, match="stage toy, step 7: loss nan"):
        run(job(tmp_path, guard=config.Guard(skip_limit=0)), poisoned)
    assert logged(tmp_path) == [1, 2, 3, 4, 5, 6]
    state = run(job(tmp_path))  # the same command with good data goes on from step 6
    np.testing.assert_array_equal(state.params["w"], np.full(4, sum(range(9))))
    assert logged(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_metrics_are_read_only_when_the_next_step_is_under_way(tmp_path):
    events = []

    class Value:
        """A metric that notes when it is looked at."""

        def __init__(self, step):
            self.step = step

        def __float__(self):
            events.append(("read", self.step))
            return 1.0

    def step(state, batch):
        events.append(("start", batch + 1))
        state, _ = train_step(state, batch)
        return state, {"loss": Value(batch + 1), "grad_norm": 1.0}

    run(job(tmp_path, steps=5, save_every=100, log_every=100), step=lambda s, b: step(s, b) if b < 4 else train_step(s, b))
    for n in range(1, 4):
        assert events.index(("start", n + 1)) < events.index(("read", n))


def test_a_finished_stage_has_nothing_to_do(tmp_path):
    run(job(tmp_path))
    assert run(job(tmp_path), batches=lambda first: pytest.fail("no batch is needed") if first < 9 else iter(())).step == 9


def test_metrics_after_the_checkpoint_are_written_anew_when_the_run_goes_on(tmp_path):
    def dies(first):
        yield from range(first, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path), dies)
    run(job(tmp_path))
    assert logged(tmp_path) == list(range(1, 10))
    assert loop.summarize(job(tmp_path)).tokens == 90


def test_the_final_loss_is_the_last_one_and_no_mean(tmp_path):
    for step, loss in enumerate((3.0, 2.0, 1.23456, None), 1):
        row = {"step": step, "loss": loss, "seconds": 1.0, "goodput": 1.0, "seconds_by_phase": {}}
        with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
    assert loop.summarize(job(tmp_path)).final_loss == 1.2346  # of the last step that was finite


def test_counters_of_a_step_are_logged_with_it(tmp_path):
    run(job(tmp_path, log_every=4, counters=lambda step: {"data/ja/tokens": 7 * step, "data/ja/epoch": step / 2}))
    assert [(row["data/ja/tokens"], row["data/ja/epoch"]) for row in rows(tmp_path)] == [(28, 2.0), (56, 4.0), (63, 4.5)]


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, list(range(1, 10))), (4, [4, 8, 9]), (100, [9])])
def test_validation_is_of_the_parameters_after_its_step_and_always_of_the_last(tmp_path, every, steps):
    probes = [(every, lambda params: {"validation/w": float(params["w"][0])})] if every else []
    run(job(tmp_path, log_every=5), probes=probes)
    found = {row["step"]: row["validation/w"] for row in rows(tmp_path) if "validation/w" in row}
    assert found == {step: sum(range(step)) for step in steps}
    assert logged(tmp_path) == sorted({5, 9, *steps})


def test_a_resumed_run_validates_the_steps_that_are_left(tmp_path):
    def dies(first):
        yield from range(first, 5)
        raise KeyboardInterrupt

    seen = []
    validate = lambda params: seen.append(float(params["w"][0])) or {"validation/w": seen[-1]}  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path), dies, probes=[(2, validate)])
    run(job(tmp_path), probes=[(2, validate)])
    assert seen == [sum(range(step)) for step in (2, 4, 6, 8, 9)]
    run(job(tmp_path), probes=[(2, lambda params: pytest.fail("nothing is left to validate"))])
    assert [row["step"] for row in rows(tmp_path) if "validation/w" in row] == [2, 4, 6, 8, 9]


def test_the_time_that_steps_wait_for_input_is_logged(tmp_path):
    def slow(first):
        for n in range(first, 1000):
            time.sleep(0.05)
            yield n

    run(job(tmp_path / "slow", steps=4, log_every=2), slow)
    run(job(tmp_path / "quick", steps=4, log_every=2))
    assert all(0.05 <= row["input_wait"] < 0.5 for row in rows(tmp_path / "slow"))
    assert all(0 <= row["input_wait"] < 0.05 for row in rows(tmp_path / "quick"))


def test_no_batch_is_taken_beyond_the_last_step(tmp_path):
    taken = []
    run(job(tmp_path), lambda first: (taken.append(n) or n for n in range(first, 1000)))
    assert taken == list(range(9))


# --- steps that go wrong --------------------------------------------------------------------------------------------------


def events(directory):
    path = directory / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def noisy(seed, bad=None):
    """Losses around 2 by the number of the batch; `bad` gives those of some batches."""
    values = 2 + 0.02 * np.random.default_rng(seed).standard_normal(1000)
    return {**dict(enumerate(values.tolist())), **(bad or {})}


def watched(this, losses):
    """Runs with batches that are losses; says which batches each step got."""
    seen = []

    def batches(first, number):
        for step in range(first, 1000):
            yield losses[number(step)]

    def step(state, batch):
        seen.append(next(n for n, value in losses.items() if value == batch or value != value and batch != batch))
        return train_step(state, batch)

    return run_loop(this, ABSTRACT, fresh_state, step, batches), seen


def test_a_step_that_is_not_finite_is_left_out_and_told(tmp_path):
    state, _ = watched(job(tmp_path, steps=12), noisy(0, {4: float("nan"), 8: float("inf")}))
    assert [(e["event"], e["step"], e["batch"]) for e in events(tmp_path)] == [("not_finite", 5, 4), ("not_finite", 9, 8)]
    assert logged(tmp_path) == [1, 2, 3, 4, 6, 7, 8, 10, 11, 12]
    expected = sum(noisy(0)[n] for n in range(12) if n not in (4, 8))
    np.testing.assert_allclose(state.params["w"], expected, rtol=1e-6)


def test_so_many_in_a_row_end_the_run(tmp_path):
    losses = noisy(0, dict.fromkeys(range(4, 9), float("nan")))
    with pytest.raises(loop.NotFinite, match="step 8: loss nan.*4 steps in a row"):
        watched(job(tmp_path, steps=12, guard=config.Guard(skip_limit=3)), losses)
    assert watched(job(tmp_path, steps=12), losses)[0].step == 12  # the same command with more patience goes on


def test_a_spike_that_lasts_is_gone_around(tmp_path):
    """The run goes back to the checkpoint before it, and leaves out the batches from there to where it noticed."""
    losses = noisy(1, {n: 20.0 + n for n in range(41, 46)})
    state, seen = watched(job(tmp_path, steps=60, save_every=10, keep_latest=2), losses)
    assert [(e["event"], e["step"]) for e in events(tmp_path)] == [("spike", 42), ("rollback", 46), ("resumed", 40)]
    assert events(tmp_path)[1]["to"] == 40 and events(tmp_path)[1]["batches_left_out"] == [41, 45]
    assert seen[-20:] == [40, *range(46, 65)]
    trained = [*range(41), *range(46, 65)]
    np.testing.assert_allclose(state.params["w"], sum(losses[n] for n in trained), rtol=1e-5)
    assert logged(tmp_path) == list(range(1, 61))


def test_a_run_killed_after_it_went_back_knows_the_batches_to_leave_out(tmp_path):
    losses = noisy(1, {n: 20.0 + n for n in range(41, 46)})
    whole, _ = watched(job(tmp_path / "whole", steps=60, save_every=10, keep_latest=2), losses)
    with pytest.raises(KeyError):
        watched(job(tmp_path / "cut", steps=60, save_every=10, keep_latest=2), {n: v for n, v in losses.items() if n < 50})
    state, seen = watched(job(tmp_path / "cut", steps=60, save_every=10, keep_latest=2), losses)
    np.testing.assert_array_equal(state.params["w"], whole.params["w"])
    assert set(seen).isdisjoint(range(41, 46))


def test_one_high_step_is_told_and_nothing_else_happens(tmp_path):
    state, seen = watched(job(tmp_path, steps=60), noisy(2, {41: 20.0}))
    assert [(e["event"], e["step"]) for e in events(tmp_path)] == [("spike", 42)] and seen == list(range(60))


def test_going_back_ends_after_so_many_times(tmp_path):
    losses = noisy(1, {n: 20.0 + n for n in range(41, 100)})
    with pytest.raises(UserError, match="step 42: the loss rises again after going back 2 times"):
        watched(job(tmp_path, steps=60, save_every=10, guard=config.Guard(rollbacks=2)), losses)
    assert [e["event"] for e in events(tmp_path)].count("rollback") == 2


def test_the_rate_falls_each_time_from_where_the_run_went_back_to(tmp_path):
    rates = {}

    def step(state, batch):
        rates[int(state.step)] = float(state.lr_scale)
        return train_step(state, batch)

    losses = noisy(1, {n: 20.0 + n for n in range(41, 46)})
    this = job(tmp_path, steps=60, save_every=10, guard=config.Guard(rollback_lr_scale=0.5))
    run_loop(this, ABSTRACT, fresh_state, step, lambda first, number: (losses[number(s)] for s in range(first, 1000)))
    assert [rates[n] for n in (39, 40, 59)] == [1.0, 0.5, 0.5]


def test_a_change_of_the_data_is_no_spike(tmp_path):
    losses = {n: value + 8.0 * (n >= 40) for n, value in noisy(3).items()}
    state, seen = watched(job(tmp_path, steps=80, data_change_steps=(40,)), losses)
    assert events(tmp_path) == [] and seen == list(range(80))


@pytest.mark.parametrize("seed", range(5))
def test_there_is_no_false_alarm_in_noise_that_falls(tmp_path, seed):
    """Heavier tails than training has, over a loss that falls by half."""
    rng = np.random.default_rng(seed)
    guard = Guard(config.Guard())
    for step in range(1, 2001):
        loss = 3 / (1 + step / 1000) + 0.05 * rng.standard_t(5)
        norm = np.exp(0.3 * rng.standard_t(5) - step / 1000)
        assert guard.observe(step, loss, norm) == "good", step


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(tmp_path):
    run(job(tmp_path, steps=4, keep_latest=2))
    whole = run(job(tmp_path / "whole", steps=8))
    for path in (tmp_path / "checkpoints/4/params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    began = []
    state = run(job(tmp_path, steps=8, keep_latest=2), lambda first: began.append(first) or iter(range(first, 1000)))
    assert began == [2] and [e["event"] for e in events(tmp_path)] == ["damaged_checkpoint", "resumed"]
    np.testing.assert_array_equal(state.params["w"], whole.params["w"])
    assert (tmp_path / "checkpoints/damaged-4").is_dir()


# --- being told to stop ---------------------------------------------------------------------------------------------------


def test_sigterm_saves_the_step_and_the_same_command_goes_on(tmp_path):
    def step(state, batch):
        if batch == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state, batch)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="saved at step 5"):
        run(job(tmp_path, save_every=100), step=step)
    assert signal.getsignal(signal.SIGTERM) == before
    assert events(tmp_path)[-1]["event"] == "preempted" and logged(tmp_path) == [1, 2, 3, 4, 5]
    began = []
    state = run(job(tmp_path), lambda first: began.append(first) or iter(range(first, 1000)))
    assert began == [5] and state.step == 9
    np.testing.assert_array_equal(state.params["w"], np.full(4, sum(range(9))))


def test_a_step_that_hangs_is_told_with_all_stacks(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(goodput, "MIN_HANG_SECONDS", 0.5)

    def step(state, batch):
        if batch == 5:
            time.sleep(1.5)
        return train_step(state, batch)

    run(job(tmp_path), step=step)
    assert [(e["event"], e["step"]) for e in events(tmp_path)] == [("hang", 5)]  # the last that is known to have ended is 4
    assert "Thread" in capfd.readouterr().err
