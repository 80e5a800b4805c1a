"""The loop of every stage: batches in, steps, checkpoints, metrics.  It never waits for the step that is under way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, files, multihost
from tanuki_jax.checkpoint import Checkpoints, Meta
from tanuki_jax.errors import Preempted, UserError
from tanuki_jax.progress import Progress
from tanuki_jax.train.contract import Batch, Params
from tanuki_jax.train.goodput import Clock
from tanuki_jax.train.guard import Events, Guard, read_events
from tanuki_jax.train.metrics import MetricsWriter, Row, mfu, read_metrics, to_plain, validation_loss
from tanuki_jax.train.profile import Profile, handle_sigusr1
from tanuki_jax.train.retention import steps_to_keep
from tanuki_jax.train.rollback import SkippedBatches
from tanuki_jax.train.step import State, StepMetrics, TrainStep

SLOW_FACTOR = 0.2  # share of a step for which a process that waits for its input holds the others up


class EvalHook(NamedTuple):
    """Figures of the parameters that are logged with a step."""

    every_steps: int  # and after the last step
    evaluate: Callable[[Params], Mapping[str, Any]]


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
    counters: Callable[[int], dict[str, float]] = lambda batches: {}  # of so many batches; logged with the metrics of a step
    on_metrics: Callable[[Row], None] = lambda row: None  # sees every row of metrics.jsonl
    data_change_steps: tuple[int, ...] = ()  # steps after which the data change, and with them the loss


class NotFinite(UserError):
    """The loss or its gradient was NaN or Inf too often; nothing of these steps was kept."""


class _Rollback(Exception):
    """A spike that lasts."""


@dataclass(frozen=True)
class _Context:
    """What lasts over all attempts."""

    job: Job
    checkpoints: Checkpoints
    events: Events
    clock: Clock
    profile: Profile


def run_loop(
    job: Job,
    abstract_state: State,
    fresh_state: Callable[[], State],
    train_step: TrainStep,
    batches: Callable[[int, Callable[[int], int]], Iterator[Batch]],
    check_meta: Callable[[Meta], None] = lambda meta: None,
    eval_hooks: Sequence[EvalHook] = (),
) -> State:  # Seven arguments: a job, its state three ways, its data, and two callbacks.
    """Runs or resumes a stage to its last step and returns the state.

    Args:
      abstract_state: shapes and shardings of the state.
      fresh_state: makes the state before step 0.
      batches: (first step, the number of the batch of each step) -> iterator of the global batches from there on.
      check_meta: sees the meta of the checkpoint that is resumed, and may refuse it.

    Raises:
      Preempted: SIGTERM came, and the step is saved.
      NotFinite: more steps in a row than the guard allows were not finite.
    """
    context = _Context(
        job,
        Checkpoints(job.directory, job.options.keep_latest),
        Events(job.directory, jax.process_index() == 0),
        Clock(job.tokens_per_step, job.options.guard.step_timeout_seconds),
        Profile(job.directory, job.options.profile_start, job.options.profile_steps),
    )
    checkpoints, events, clock = context.checkpoints, context.events, context.clock

    def on_damage(step: int, reason: str) -> None:
        events.add("damaged_checkpoint", step, what=reason)

    def on_hang(details: dict[str, Any]) -> None:
        events.add("hang", clock.step + 1, **details)

    try:
        with multihost.handle_sigterm(), handle_sigusr1(), multihost.watch_for_hangs(on_hang):
            while True:
                skipped, guard = SkippedBatches.read(job.directory), Guard(job.options.guard, job.data_change_steps)
                with clock.phase("restore"):
                    start, state = checkpoints.resume(abstract_state, check_meta, on_damage) or (0, None)
                    state = state or fresh_state()
                attempt = _Attempt(context, guard, skipped, start)
                try:
                    with files.disk_errors(job.directory, kinds=(OSError,)):  # a device out of memory is no full disk
                        return attempt.run(state, train_step, batches(start, skipped.batch), eval_hooks)
                except _Rollback:
                    del state
                    with clock.phase("save"):
                        _roll_back(context, guard, skipped, attempt.reported_step)
    finally:
        context.profile.close()
        with clock.phase("save"):
            checkpoints.close()


def _roll_back(context: _Context, guard: Guard, skipped: SkippedBatches, step: int) -> None:
    """To the checkpoint before the spike; its batches are left out when the run comes there again."""
    job, options = context.job, context.job.options.guard
    if len(skipped.rollbacks) >= options.rollbacks:
        raise UserError(
            f"stage {job.name}, step {guard.spike_start}: the loss rises again after going back {len(skipped.rollbacks)} times "
            f"(guard.rollbacks); lower the learning rate, or look at the batches that events.jsonl names"
        )
    to_step = context.checkpoints.go_back(guard.spike_start - 1)
    count = step - guard.spike_start + 1
    new = skipped.with_rollback(to_step, guard.spike_start - 1, count, options.rollback_lr_scale)
    multihost.on_process_zero(new.write, "rollbacks")
    batches = [skipped.batch(guard.spike_start - 1), skipped.batch(step - 1)]
    context.events.add("rollback", step, to=to_step, batches_left_out=batches, learning_rate_times=new.lr_scale(to_step))


class _Step(NamedTuple):
    """A step that has been handed to the devices and is not reported yet."""

    number: int  # counted from 1
    metrics: StepMetrics
    evaluated: dict[str, Any]  # what the eval hooks gave
    batch: Batch


class _Attempt:
    """The steps from one start on, until the end or a rollback."""

    def __init__(self, context: _Context, guard: Guard, skipped: SkippedBatches, start: int) -> None:
        self._context, self._guard, self._skipped, self._start = context, guard, skipped, start
        job = context.job
        self._writer = MetricsWriter(job.directory, start, job.tensorboard) if jax.process_index() == 0 else None
        rows = self._writer.rows if self._writer else read_metrics(job.directory)
        guard.replay(row for row in rows if row["step"] <= start)
        if self._writer and self._writer.replayed_seconds:
            context.events.add("resumed", start, replayed_seconds=round(self._writer.replayed_seconds, 3))
        replayed = sum(event.get("replayed_seconds", 0.0) for event in read_events(job.directory))
        context.clock.resume(start, rows[-1] if self._writer and rows else {}, replayed)
        self._progress = Progress(job.name, job.steps, quiet=jax.process_index() != 0)
        self._has_slow_host = False
        self._validation_losses = {row["step"]: loss for row in rows if (loss := validation_loss(row)) is not None}
        self.reported_step = start

    def run(self, state: State, train_step: TrainStep, batches: Iterator[Batch], eval_hooks: Sequence[EvalHook]) -> State:
        """To the last step of the job.  A step is reported after the next one has been handed to the devices."""
        clock, profile, last_step = self._context.clock, self._context.profile, self._context.job.steps
        pending: _Step | None = None
        try:
            for step, batch in zip(range(self._start, last_step), clock.time_input(batches), strict=False):
                state = self._with_lr_scale(state, step)
                profile.before(step + 1)
                with clock.phase("compile" if step == self._start else "step"):
                    state, metrics = train_step(state, batch)
                profile.after(step + 1, metrics)
                if pending:
                    self._report(pending)
                stop = multihost.preemption_requested()
                self._context.checkpoints.check()
                pending = _Step(step + 1, metrics, self._evaluate(state, step + 1, eval_hooks), batch)
                if (step + 1) % self._context.job.options.save_every == 0 or step + 1 == last_step or stop:
                    self._report(pending)
                    self._save(state, pending, final=stop or step + 1 == last_step)
                    pending = None
                if stop:
                    self._stop(step + 1)
            if pending:
                self._report(pending)
        finally:
            if self._writer:
                self._writer.close()
        return state

    def _with_lr_scale(self, state: State, step: int) -> State:
        """The state with the factor of the learning rate that rollbacks have left, where it changes with this step."""
        lr_scale = self._skipped.lr_scale(step)
        if lr_scale == (self._skipped.lr_scale(step - 1) if step > self._start else 1.0):
            return state
        return dataclasses.replace(state, lr_scale=jnp.full_like(state.lr_scale, lr_scale))

    def _evaluate(self, state: State, step: int, eval_hooks: Sequence[EvalHook]) -> dict[str, Any]:
        """What the hooks that are due after a step give."""
        is_last = step == self._context.job.steps
        due = [hook for hook in eval_hooks if step % hook.every_steps == 0 or is_last]
        if not due:
            return {}
        with self._context.clock.phase("score"):
            return {name: value for hook in due for name, value in hook.evaluate(state.all_params).items()}

    def _save(self, state: State, step: _Step, final: bool) -> None:
        """A checkpoint; not in a spike, for it would push out what was before it, and the run might go back there."""
        if self._guard.spike_count and self._context.job.options.guard.spike_steps and not final:
            return
        context, losses = self._context, self._validation_losses
        loss = validation_loss(step.evaluated)
        if loss is not None:
            losses[step.number] = loss
        keep = steps_to_keep(context.job.options, {*context.checkpoints.steps(), step.number}, losses)
        with context.clock.phase("save"):
            context.checkpoints.save(step.number, state, context.job.meta, keep)

    def _stop(self, step: int) -> None:
        """Ends a run that was told to stop, whose last step is saved."""
        context = self._context
        with context.clock.phase("save"):
            context.checkpoints.close()
        context.events.add("preempted", step)
        raise Preempted(f"stage {context.job.name} was told to stop, and is saved at step {step}")

    def _report(self, step: _Step) -> None:
        """Judges a step that has ended, and logs it."""
        context, options = self._context, self._context.job.options.guard
        loss, norm = float(step.metrics["loss"]), float(step.metrics["grad_norm"])
        verdict = self._guard.observe(step.number, loss, norm)
        self.reported_step = step.number
        context.clock.end_step(step.number)
        if verdict == "not_finite":
            self._report_not_finite(step, loss, norm)
            if step.evaluated:  # its parameters are those of the step before, and count
                self._log(step._replace(metrics={name: step.metrics[name] for name in ("loss", "grad_norm")}), loss)
            return
        if verdict == "spike" and self._guard.spike_count == 1:
            context.events.add("spike", step.number, loss=round(loss, 4), grad_norm=round(norm, 4))
        if options.spike_steps and self._guard.spike_count >= options.spike_steps:
            raise _Rollback
        self._log(step, loss)

    def _log(self, step: _Step, loss: float) -> None:
        job, clock = self._context.job, self._context.clock
        rate = clock.tokens_per_second
        self._progress.show(step.number, f"loss {loss:.3f}" + (f"  {rate:,.0f} tokens/s" if rate else ""))
        if not (step.number % job.options.log_every == 0 or step.number == job.steps or step.evaluated):
            return
        input_wait = clock.mean_wait()
        multihost.report_input_wait(input_wait)
        if not self._writer:
            return
        row = {
            "step": step.number,
            "tokens": step.number * job.tokens_per_step,
            **to_plain(step.metrics),
            **job.counters(self._skipped.batch(step.number - 1) + 1),
            **to_plain(step.evaluated),
            "tokens_per_second": round(rate, 1),
            "mfu": mfu(rate, job.flops_per_token),
            "input_wait": round(input_wait, 6),
            "goodput": clock.goodput(),
            "seconds": round(clock.seconds, 3),
            "seconds_by_phase": clock.seconds_by_phase(),
            **self._slowest_process(step.number),
        }
        self._writer.write(row)
        job.on_metrics(row)

    def _slowest_process(self, step: int) -> dict[str, Any]:
        """The process that waits longest for its input, of several; an event where it begins to hold the others up."""
        slowest = multihost.slowest_process()
        if not slowest:
            return {}
        is_slow = slowest["seconds"] > max(2 * slowest["median"], SLOW_FACTOR * self._context.clock.seconds_per_step())
        if is_slow and not self._has_slow_host:
            self._context.events.add("slow_host", step, **slowest)
        self._has_slow_host = is_slow
        return {"slowest_process": slowest["process"], "slowest_input_wait": round(slowest["seconds"], 6)}

    def _report_not_finite(self, step: _Step, loss: float, norm: float) -> None:
        """An event, and the batch in a file; an error where there were too many in a row."""
        job, number = self._context.job, self._skipped.batch(step.number - 1)
        path = job.directory / "events" / f"batch-{number}-{jax.process_index()}.npz"
        _save_batch(path, step.batch)
        self._context.events.add(
            "not_finite", step.number, loss=str(loss), grad_norm=str(norm), batch=number, kept_in=path.name
        )
        count, limit = self._guard.nonfinite_count, job.options.guard.skip_limit
        if count > limit:
            raise NotFinite(
                f"stage {job.name}, step {step.number}: loss {loss}, gradient norm {norm}, {count} steps in a row "
                f"(guard.skip_limit {limit}); nothing of them was kept, the last checkpoint is good; lower the learning rate "
                f"or look at the batches in {path.parent}"
            )


def _save_batch(path: Path, batch: Batch) -> None:
    """Keeps this process's rows of a batch."""
    if not isinstance(batch, dict):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for name, array in batch.items():
        parts = [np.asarray(part.data) for part in array.addressable_shards if part.replica_id == 0]
        if parts:
            arrays[name] = np.concatenate(parts)
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy takes the names for its own options


@dataclass(frozen=True)
class StageSummary:
    """What a finished stage came to: its part of summary.json."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float | None = None
    goodput: float | None = None
    seconds_by_phase: dict[str, float] = dataclasses.field(default_factory=dict)
    final_loss: float | None = None  # of the last step that was finite


def summarize(job: Job) -> StageSummary:
    """The summary of a finished stage, from its metrics."""
    rows = read_metrics(job.directory)
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    seconds = rows[-1]["seconds"] if rows else 0.0
    tokens = job.steps * job.tokens_per_step
    return StageSummary(
        steps=job.steps,
        tokens=tokens,
        seconds=round(seconds, 1),
        tokens_per_second=round(tokens / seconds, 1) if seconds else None,
        goodput=rows[-1]["goodput"] if rows else None,
        seconds_by_phase=rows[-1]["seconds_by_phase"] if rows else {},
        final_loss=round(losses[-1], 4) if losses else None,
    )
