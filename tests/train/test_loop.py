"""The loop with a train step of one number, so that only the loop is tested."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import config
from tanuki_jax.train import loop
from tanuki_jax.train.step import State


def job(directory, steps=9, **options):
    values = dict(save_every=2, log_every=1, keep=1, tensorboard=False, meta={"model": {}})
    return loop.Job("toy", directory, steps, tokens_per_step=10, flops_per_token=1.0, **{**values, **options})


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
    return loop.run(this, ABSTRACT, fresh_state, step, lambda first, number: batches(first), probes=probes)


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
    assert loop.summary(job(tmp_path))["tokens"] == 90


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
