"""The loop of every stage: batches in, steps, checkpoints, metrics.  It knows no model and never waits for the current step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, files, multihost
from tanuki_jax.checkpoint import Checkpoints, Meta
from tanuki_jax.errors import Preempted, UserError
from tanuki_jax.progress import Progress
from tanuki_jax.train.goodput import Clock
from tanuki_jax.train.guard import Events, Guard, read_events
from tanuki_jax.train.metrics import MetricsWriter, mfu, read_metrics, to_plain, validation_loss
from tanuki_jax.train.profile import Profile, handle_sigusr1
from tanuki_jax.train.rollback import SkippedBatches
from tanuki_jax.train.step import State

SLOW_FACTOR = 0.2  # share of a step for which a process that waits for its input holds the others up


@dataclass(frozen=True)
class Job:
    """One stage, ready to run."""

    name: str
    directory: Path
    options: config.Stage  # what is saved, kept, logged, profiled, and what the guard does
    steps: int
    tokens_per_step: int
    flops_per_token: float
    meta: Meta  # saved in every checkpoint
    tensorboard: bool = False
    counters: Callable[[int], dict[str, float]] = lambda batches: {}  # of so many batches; logged beside a step's metrics
    observe: Callable[[dict[str, Any]], None] = lambda row: None  # sees every row of metrics.jsonl
    changes: tuple[int, ...] = ()  # steps after which the data change, and with them the loss


class NotFinite(UserError):
    """The loss or its gradient was NaN or Inf too often; nothing of these steps was kept."""


class _Rollback(Exception):
    """A spike that lasts."""


def run_loop(
    job: Job,
    abstract_state: State,
    fresh_state: Callable[[], State],
    train_step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]],
    batches: Callable[[int, Callable[[int], int]], Iterator[Any]],
    check_meta: Callable[[Meta], None] = lambda meta: None,
    probes: Sequence[tuple[int, Callable[[Any], dict[str, Any]]]] = (),
) -> State:
    """Runs or resumes a stage to its last step and returns the state.

    Args:
      abstract_state: shapes and shardings of the state.
      fresh_state: makes the state before step 0.
      batches: (first step, the number of the batch of each step) -> iterator of the global batches from there on.
      check_meta: sees the meta of the checkpoint that is resumed, and may refuse it.
      probes: pairs of (every so many steps and at the end, parameters -> figures that are logged with the step).

    Raises:
      Preempted: SIGTERM or the platform's notice came, and the step is saved.
      NotFinite: more steps in a row than the guard allows were not finite.
    """
    options = job.options
    checkpoints = Checkpoints(job.directory, options.keep_latest)
    events = Events(job.directory, jax.process_index() == 0)
    clock = Clock(job.tokens_per_step, options.guard.step_timeout_seconds)
    profile = Profile(job.directory, options.profile_start, options.profile_steps)
    whole = _Context(job, checkpoints, events, clock, profile)

    def damaged(step: int, wrong: str) -> None:
        events.add("damaged_checkpoint", step, what=wrong)

    def hangs(found: dict[str, Any]) -> None:
        events.add("hang", clock.step + 1, **found)

    try:
        with multihost.handle_sigterm(), handle_sigusr1(), multihost.watch_for_hangs(hangs):
            while True:
                detours, guard = SkippedBatches.read(job.directory), Guard(options.guard, job.changes)
                with clock.of("restore"):
                    start, state = checkpoints.resume(abstract_state, check_meta, damaged) or (0, None)
                    state = state or fresh_state()
                attempt = _Attempt(whole, guard, detours, start)
                try:
                    return attempt.run(state, train_step, batches(start, detours.batch), probes)
                except OSError:  # of metrics or events; a device out of memory is no full disk
                    with files.disk_errors(job.directory):
                        raise
                except _Rollback:
                    del state
                    with clock.of("save"):
                        _roll_back(whole, guard, detours, attempt.reported)
    finally:
        profile.close()
        with clock.of("save"):
            checkpoints.close()


@dataclass(frozen=True)
class _Context:
    """What lasts over all attempts."""

    job: Job
    checkpoints: Checkpoints
    events: Events
    clock: Clock
    profile: Profile


def _roll_back(run: _Context, guard: Guard, detours: SkippedBatches, step: int) -> None:
    """To the checkpoint before the spike; its batches are left out when the run comes there again."""
    job = run.job
    if len(detours.entries) >= job.options.guard.rollbacks:
        raise UserError(
            f"stage {job.name}, step {guard.first_high}: the loss rises again after going back {len(detours.entries)} times "
            f"(guard.rollbacks); lower the learning rate, or look at the batches that events.jsonl names"
        )
    good = run.checkpoints.go_back(guard.first_high - 1)
    count = step - guard.first_high + 1
    new = detours.plus(good, guard.first_high - 1, count, job.options.guard.rollback_lr_scale)
    multihost.on_process_zero(new.write, "detours")
    batches = [detours.batch(guard.first_high - 1), detours.batch(step - 1)]
    run.events.add("rollback", step, to=good, batches_left_out=batches, learning_rate_times=new.rate(good))


class _Attempt:
    """The steps from one start on, until the end or until the run has to go back."""

    def __init__(self, run: _Context, guard: Guard, detours: SkippedBatches, start: int) -> None:
        self.job, self.checkpoints, self.events, self.clock = run.job, run.checkpoints, run.events, run.clock
        self.profile, self.guard, self.detours, self.start = run.profile, guard, detours, start
        job = run.job
        self.writer = MetricsWriter(job.directory, start, job.tensorboard) if jax.process_index() == 0 else None
        rows = self.writer.kept if self.writer else read_metrics(job.directory)
        guard.remember(row for row in rows if row["step"] <= start)
        if self.writer and self.writer.lost:
            run.events.add("resumed", start, lost_seconds=round(self.writer.lost, 3))
        lost = sum(event.get("lost_seconds", 0.0) for event in read_events(job.directory))
        run.clock.resume(start, self.writer.last if self.writer else {}, lost)
        self.progress = Progress(job.name, job.steps, quiet=jax.process_index() != 0)
        self.reported, self.slow = start, False
        self.validated = {row["step"]: loss for row in rows if (loss := validation_loss(row)) is not None}

    def run(self, state: State, train_step: Any, batches: Iterator[Any], probes: Any) -> State:
        job, clock = self.job, self.clock
        late: tuple[Any, ...] | None = None
        rate = 1.0
        try:
            for step, batch in zip(range(self.start, job.steps), clock.waiting(batches), strict=False):
                if rate != (rate := self.detours.rate(step)):
                    state = dataclasses.replace(state, rate=jnp.full_like(state.rate, rate))
                self.profile.before(step + 1)
                with clock.of("compile" if step == self.start else "step"):
                    state, metrics = train_step(state, batch)
                self.profile.after(step + 1, metrics)
                if late:
                    self.report(*late)
                number, ends = step + 1, step + 1 == job.steps
                stop = multihost.preemption_requested()
                self.checkpoints.check()
                due = [probe for every, probe in probes if number % every == 0 or ends]
                probed: dict[str, Any] = {}
                if due:
                    with clock.of("score"):
                        probed = {name: value for probe in due for name, value in probe(state.model).items()}
                late = (number, metrics, probed, batch)
                if number % job.options.save_every == 0 or ends or stop:
                    self.report(*late)
                    late = None
                    # What is saved in a spike would push out what was before it, and the run might go back there.
                    if not (self.guard.high and job.options.guard.spike_steps) or ends or stop:
                        with clock.of("save"):
                            self.checkpoints.save(number, state, job.meta, self.worth_keeping(number, probed))
                if stop:
                    with clock.of("save"):
                        self.checkpoints.close()
                    self.events.add("preempted", number)
                    raise Preempted(f"stage {job.name} was told to stop, and is saved at step {number}")
            if late:
                self.report(*late)
        finally:
            if self.writer:
                self.writer.close()
        return state

    def worth_keeping(self, number: int, probed: dict[str, Any]) -> set[int]:
        """Of all steps up to this one, those whose checkpoints are kept however old they are."""
        options = self.job.options
        if (loss := validation_loss(probed)) is not None:
            self.validated[number] = loss
        there = {*self.checkpoints.steps(), number}
        best = sorted(there.intersection(self.validated), key=lambda step: (self.validated[step], step))
        every = range(0, number + 1, options.keep_every) if options.keep_every else ()
        return {*best[: options.keep_best], *every}

    def report(self, number: int, metrics: dict[str, jax.Array], probed: dict[str, Any], batch: Any) -> None:
        """Judges a step that has ended, and logs it."""
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        verdict = self.guard.look(number, loss, norm)
        self.reported = number
        self.clock.done(number)
        if verdict == "not_finite":
            self._not_finite(number, loss, norm, batch)
            if probed:  # its parameters are those of the step before, and count
                self._log(number, loss, {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}, probed)
            return
        if verdict == "spike" and self.guard.high == 1:
            self.events.add("spike", number, loss=round(loss, 4), grad_norm=round(norm, 4))
        if self.job.options.guard.spike_steps and self.guard.high >= self.job.options.guard.spike_steps:
            raise _Rollback
        self._log(number, loss, metrics, probed)

    def _log(self, number: int, loss: float, metrics: dict[str, jax.Array], probed: dict[str, Any]) -> None:
        job, clock = self.job, self.clock
        rate = clock.tokens_per_second
        self.progress.show(number, f"loss {loss:.3f}" + (f"  {rate:,.0f} tokens/s" if rate else ""))
        if not (number % job.options.log_every == 0 or number == job.steps or probed):
            return
        waited = clock.mean_wait()
        multihost.report_input_wait(waited)
        if self.writer:
            how = {
                "tokens_per_second": round(rate, 1),
                "mfu": mfu(rate, job.flops_per_token),
                "input_wait": round(waited, 6),
                "goodput": clock.goodput(),
                "seconds": round(clock.seconds, 3),
                "seconds_by_phase": clock.times(),
            }
            first = {"step": number, "tokens": number * job.tokens_per_step}
            seen = job.counters(self.detours.batch(number - 1) + 1)
            row = {**first, **to_plain(metrics), **seen, **to_plain(probed), **how, **self._slowest(number)}
            self.writer.write(row)
            job.observe(row)

    def _slowest(self, number: int) -> dict[str, Any]:
        """The process that waits longest for its input, of several; an event where it begins to hold the others up."""
        found = multihost.slowest_process()
        if not found:
            return {}
        slow = found["seconds"] > max(2 * found["median"], SLOW_FACTOR * self.clock.seconds_per_step())
        if slow and not self.slow:
            self.events.add("slow_host", number, **found)
        self.slow = slow
        return {"slowest_process": found["process"], "slowest_input_wait": round(found["seconds"], 6)}

    def _not_finite(self, number: int, loss: float, norm: float, batch: Any) -> None:
        batch_number = self.detours.batch(number - 1)
        path = self.job.directory / "events" / f"batch-{batch_number}-{jax.process_index()}.npz"
        _make_row(path, batch)
        self.events.add("not_finite", number, loss=str(loss), grad_norm=str(norm), batch=batch_number, kept_in=path.name)
        limit = self.job.options.guard.skip_limit
        if self.guard.bad > limit:
            raise NotFinite(
                f"stage {self.job.name}, step {number}: loss {loss}, gradient norm {norm}, {self.guard.bad} steps in a row "
                f"(guard.skip_limit {limit}); nothing of them was kept, the last checkpoint is good; lower the learning rate "
                f"or look at the batches in {path.parent}"
            )


def _make_row(path: Path, batch: Any) -> None:
    """Keeps this process's rows of a batch."""
    if not isinstance(batch, dict):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, array in batch.items():
        parts = [np.asarray(part.data) for part in array.addressable_shards if part.replica_id == 0]
        if parts:
            found[name] = np.concatenate(parts)
    np.savez(path, **found)


def summarize(job: Job) -> dict[str, Any]:
    """Steps, tokens, seconds, rate and final loss (of the last step that was finite) of a finished stage, from its metrics."""
    rows = read_metrics(job.directory)
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    seconds = rows[-1]["seconds"] if rows else 0.0
    tokens = job.steps * job.tokens_per_step
    return {
        "steps": job.steps,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "goodput": rows[-1]["goodput"] if rows else None,
        "seconds_by_phase": rows[-1]["seconds_by_phase"] if rows else {},
        "final_loss": round(losses[-1], 4) if losses else None,
    }
