"""The loop with a train step of one number, so that only the loop is tested."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax.train import loop
from tanuki_jax.train.step import State


def job(directory, steps=9, **options):
    values = dict(save_every=2, log_every=1, keep=1, tensorboard=False, meta={"model": {}})
    return loop.Job("toy", directory, steps, tokens_per_step=10, flops_per_token=1.0, **{**values, **options})


def fresh_state():
    return State(jnp.int32(0), {"w": jnp.zeros(4)}, {"m": jnp.zeros(4)}, jax.random.key(0))


ABSTRACT = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), fresh_state())


def train_step(state, batch):
    params = {"w": state.params["w"] + batch}
    metrics = {"loss": jnp.float32(batch), "grad_norm": jnp.float32(1)}
    return State(state.step + 1, params, state.opt_state, state.key), metrics


def run(this, batches=lambda first: iter(range(first, 1000)), step=train_step):
    return loop.run(this, ABSTRACT, fresh_state, step, batches)


def logged(directory):
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_loss_that_is_not_finite_stops_the_run_and_the_checkpoint_before_is_good(tmp_path):
    poisoned = lambda first: iter([float("nan") if n == 6 else n for n in range(first, 1000)])  # noqa: E731
    with pytest.raises(loop.NotFinite, match="stage toy, step 7: loss nan"):
        run(job(tmp_path), poisoned)
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
