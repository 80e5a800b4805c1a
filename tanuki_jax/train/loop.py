"""The loop of every stage: batches in, steps, checkpoints, metrics.  It knows no model and never waits for the current step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tanuki_jax.checkpoint import Checkpoints
from tanuki_jax.errors import UserError
from tanuki_jax.progress import Progress
from tanuki_jax.train.metrics import MetricsWriter, mfu, plain, read_metrics
from tanuki_jax.train.step import State


@dataclass(frozen=True)
class Job:
    """One stage, ready to run."""

    name: str
    directory: Path
    steps: int
    tokens_per_step: int
    flops_per_token: float
    save_every: int
    log_every: int
    keep: int
    tensorboard: bool
    meta: dict[str, Any]  # saved in every checkpoint
    counters: Callable[[int], dict[str, float]] = lambda step: {}  # logged beside a step's metrics


class NotFinite(UserError):
    """The loss or its gradient became NaN or Inf; the step before is the last good one."""


def run(
    job: Job,
    abstract_state: State,
    fresh_state: Callable[[], State],
    train_step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]],
    batches: Callable[[int], Iterator[Any]],
    check_meta: Callable[[dict[str, Any]], None] = lambda meta: None,
    probes: Sequence[tuple[int, Callable[[Any], dict[str, Any]]]] = (),
) -> State:
    """Runs or resumes a stage to its last step and returns the state.

    Args:
      abstract_state: shapes and shardings of the state.
      fresh_state: makes the state before step 0.
      batches: first step -> iterator of the global batches from there on.
      check_meta: sees the meta of the checkpoint that is resumed, and may refuse it.
      probes: pairs of (every so many steps and at the end, parameters -> figures that are logged with the step).
    """
    checkpoints = Checkpoints(job.directory, job.keep)
    start = checkpoints.latest() or 0
    if start:
        check_meta(checkpoints.meta(start))
        state = checkpoints.restore(start, abstract_state)
    else:
        state = fresh_state()
    writer = MetricsWriter(job.directory, start, job.tensorboard) if jax.process_index() == 0 else None
    progress = Progress(job.name, job.steps, quiet=jax.process_index() != 0)
    clock = _Clock(job, writer.seconds if writer else 0.0)
    late: tuple[int, dict[str, jax.Array], dict[str, Any]] | None = None

    def report(number: int, metrics: dict[str, jax.Array], probed: dict[str, Any]) -> None:
        loss = float(metrics["loss"])
        if not np.isfinite(loss) or not np.isfinite(float(metrics["grad_norm"])):
            raise NotFinite(
                f"stage {job.name}, step {number}: loss {loss}, gradient norm {float(metrics['grad_norm'])}; nothing of this "
                f"step was kept, the last checkpoint is good; lower the learning rate or look at the batch of this step"
            )
        clock.done(number)
        rate = clock.tokens_per_second
        progress.show(number, f"loss {loss:.3f}  {rate:,.0f} tokens/s")
        if writer and (number % job.log_every == 0 or number == job.steps or probed):
            mean = {
                "tokens_per_second": round(rate, 1),
                "mfu": mfu(rate, job.flops_per_token),
                "input_wait": round(clock.mean_wait(), 6),
                "seconds": round(clock.seconds, 3),
            }
            first = {"step": number, "tokens": number * job.tokens_per_step}
            writer.write({**first, **plain(metrics), **job.counters(number), **plain(probed), **mean})

    try:
        for step, batch in zip(range(start, job.steps), clock.waiting(batches(start)), strict=False):
            state, metrics = train_step(state, batch)
            if late:
                report(*late)
            due = [probe for every, probe in probes if (step + 1) % every == 0 or step + 1 == job.steps]
            late = (step + 1, metrics, {name: value for probe in due for name, value in probe(state.model).items()})
            if (step + 1) % job.save_every == 0 or step + 1 == job.steps:
                report(*late)
                late = None
                checkpoints.save(step + 1, state, job.meta)
        if late:
            report(*late)
    finally:
        if writer:
            writer.close()
        checkpoints.close()
    return state


def summary(job: Job) -> dict[str, Any]:
    """Steps, tokens, seconds, rate and final loss of a finished stage, from its metrics."""
    rows = read_metrics(job.directory)
    last = rows[-max(1, min(len(rows), 10)) :]
    seconds = rows[-1]["seconds"] if rows else 0.0
    tokens = job.steps * job.tokens_per_step
    return {
        "steps": job.steps,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "final_loss": round(float(np.mean([row["loss"] for row in last])), 4) if rows else None,
    }


class _Clock:
    """Time spent in steps, the first one's compilation included, the recent rate, and the time that steps waited for input."""

    def __init__(self, job: Job, seconds: float) -> None:
        self._job, self.seconds = job, seconds
        self._last = time.monotonic()
        self._recent: list[tuple[float, int]] = []
        self.tokens_per_second = 0.0
        self._waits: list[float] = []

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, with the time that each made the loop wait."""
        while True:
            since = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waits.append(time.monotonic() - since)
            yield batch

    def mean_wait(self) -> float:
        """Seconds a step that input was waited for, since the last call."""
        waits, self._waits = self._waits, []
        return sum(waits) / max(1, len(waits))

    def done(self, step: int) -> None:
        now = time.monotonic()
        self.seconds += now - self._last
        self._last = now
        self._recent = [*self._recent[-20:], (now, step)]
        (since, first), (until, last) = self._recent[0], self._recent[-1]
        if until > since:
            self.tokens_per_second = (last - first) * self._job.tokens_per_step / (until - since)
