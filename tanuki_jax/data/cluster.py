"""`tanuki data prepare` on more than one machine: the same shard function under datatrove's executors.

datatrove (pip install 'tanuki-jax[cluster]') rather than Ray Data or Beam: a task there is a rank and nothing else, so the
shard function runs as it is; it submits Slurm arrays as well as Ray tasks, repeats failed ranks, and is what people who make
pretraining corpora have.  The output lies on a file system that all machines share, and has the same bytes as a local one.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tanuki_jax.data.prepare import Manifest, Options, Plan, check_workers, finish, plan
from tanuki_jax.data.shards import write_part
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock

SLURM = {"time": "24:00:00", "partition": "", "cpus_per_task": "8", "mem_per_cpu_gb": "2", "qos": "normal"}


def prepare(
    patterns: str, tokenizer: Tokenizer, output: Path, options: Options, workers: int, executor: str, slurm: str = ""
) -> Manifest | None:
    """Prepares a store with `workers` tasks at one time on Ray or Slurm.

    With Slurm the jobs are submitted and None is returned; a last job that depends on them gives the store its name.

    Args:
      slurm: name=value pairs, comma-separated: time, partition (needed), cpus_per_task, mem_per_cpu_gb, qos.
    """
    check_workers(workers)
    job = _slurm(slurm) if executor == "slurm" else {}
    with lock.output(output):
        return _prepare(patterns, tokenizer, output, options, workers, job)


def _prepare(
    patterns: str, tokenizer: Tokenizer, output: Path, options: Options, workers: int, job: Mapping[str, Any]
) -> Manifest | None:
    """On Slurm where there are options of its jobs."""
    made = plan(patterns, tokenizer, Path(output).resolve(), options)
    if (made.work.directory / "manifest.json").is_file():
        return finish(made, tokenizer)
    logs = str(made.output.parent / f".{made.output.name}.logs")  # beside the work, whose folder becomes the store
    step = functools.partial(_task, made)
    common: dict[str, Any] = dict(
        pipeline=[step], tasks=len(made.parts), workers=workers, logging_dir=logs, skip_completed=False
    )
    try:
        if job:
            from datatrove.executor.slurm import SlurmPipelineExecutor

            first = SlurmPipelineExecutor(**common, **job, job_name=f"tokenize-{made.output.name}")
            last = [functools.partial(_finish, made)]
            SlurmPipelineExecutor(
                pipeline=last, tasks=1, depends=first, logging_dir=f"{logs}-finish", job_name="finish", **job
            ).run()
            print(f"submitted {len(made.parts)} tasks; when they have ended the store is {made.output}")
            return None
        from datatrove.executor.ray import RayPipelineExecutor

        RayPipelineExecutor(**common).run()
    except ImportError as error:
        raise UserError(f"--executor: {error}; pip install 'tanuki-jax[cluster]'") from error
    shutil.rmtree(logs, ignore_errors=True)
    return finish(made, tokenizer)


def _task(made: Plan, data: Any, rank: int = 0, world_size: int = 1) -> None:
    """A rank writes its parts; those that are there already cost nothing."""
    for number in range(rank, len(made.parts), world_size):
        write_part(made.work, number, made.parts[number])


def _finish(made: Plan, data: Any, rank: int = 0, world_size: int = 1) -> None:
    with lock.output(made.output):
        finish(made, Tokenizer(made.work.tokenizer))


def _slurm(text: str) -> Mapping[str, Any]:
    try:
        given = dict(part.split("=", 1) for part in filter(None, text.split(",")))
    except ValueError as error:
        raise UserError(f"--slurm: {text!r} must be like partition=cpu,time=24:00:00") from error
    unknown = set(given) - set(SLURM)
    if unknown or not given.get("partition"):
        raise UserError(f"--slurm: it takes {', '.join(SLURM)}, and needs the partition; given: {text!r}")
    options: dict[str, Any] = {**SLURM, **given}
    for name in ("cpus_per_task", "mem_per_cpu_gb"):
        if not str(options[name]).isdigit():
            raise UserError(f"--slurm: {name} must be a whole number, not {options[name]!r}")
        options[name] = int(options[name])
    return options
