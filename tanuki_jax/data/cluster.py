"""`tanuki data prepare` on more than one machine: the same shard function under datatrove's executors.

Why datatrove (pip install 'tanuki-jax[cluster]') and not Ray Data or Beam: its tasks are plain ranks, so the shard function
runs unchanged; it submits Slurm arrays and Ray tasks and repeats failed ranks; and those who make pretraining corpora already
use it.  The output must be on a shared file system; its bytes are those of a run on one machine.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from tanuki_jax.data.prepare import Manifest, Options, Plan, check_workers, finish, plan
from tanuki_jax.data.shards import write_part
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock

SLURM = {"time": "24:00:00", "partition": "", "cpus_per_task": "8", "mem_per_cpu_gb": "2", "qos": "normal"}
SlurmOptions: TypeAlias = Mapping[str, str | int]


# Seven arguments: the flags of `tanuki data prepare`.
def prepare(
    patterns: str, tokenizer: Tokenizer, output: Path, options: Options, workers: int, executor: str, slurm: str = ""
) -> Manifest | None:
    """Prepares a store with `workers` concurrent tasks on Ray or Slurm.

    With Slurm the jobs are submitted and None is returned; a last job that depends on them publishes the store.

    Args:
      slurm: name=value pairs, comma-separated: time, partition (needed), cpus_per_task, mem_per_cpu_gb, qos.
    """
    check_workers(workers)
    slurm_options = _parse_slurm(slurm) if executor == "slurm" else {}
    with lock.output(output):
        return _prepare(patterns, tokenizer, output, options, workers, slurm_options)


def _prepare(
    patterns: str, tokenizer: Tokenizer, output: Path, options: Options, workers: int, slurm_options: SlurmOptions
) -> Manifest | None:
    """Runs on Slurm if there are options for its jobs, else on Ray."""
    corpus = plan(patterns, tokenizer, Path(output).resolve(), options)
    if (corpus.work.directory / "manifest.json").is_file():
        return finish(corpus, tokenizer)
    logs = str(corpus.output.parent / f".{corpus.output.name}.logs")  # not in the work folder, which becomes the store
    common: dict[str, object] = {
        "pipeline": [functools.partial(_write_parts, corpus)],
        "tasks": len(corpus.parts),
        "workers": workers,
        "logging_dir": logs,
        "skip_completed": False,
    }
    try:
        if slurm_options:
            from datatrove.executor.slurm import SlurmPipelineExecutor

            first = SlurmPipelineExecutor(**common, **slurm_options, job_name=f"tokenize-{corpus.output.name}")
            last = [functools.partial(_finish, corpus)]
            SlurmPipelineExecutor(
                pipeline=last, tasks=1, depends=first, logging_dir=f"{logs}-finish", job_name="finish", **slurm_options
            ).run()
            print(f"submitted {len(corpus.parts)} tasks; when they have ended the store is {corpus.output}")
            return None
        from datatrove.executor.ray import RayPipelineExecutor

        RayPipelineExecutor(**common).run()
    except ImportError as error:
        raise UserError(f"--executor: {error}; pip install 'tanuki-jax[cluster]'") from error
    shutil.rmtree(logs, ignore_errors=True)
    return finish(corpus, tokenizer)


def _write_parts(corpus: Plan, data: object, rank: int = 0, world_size: int = 1) -> None:
    """Writes the parts of a rank, except those that are there already."""
    for number in range(rank, len(corpus.parts), world_size):
        write_part(corpus.work, number, corpus.parts[number])


def _finish(corpus: Plan, data: object, rank: int = 0, world_size: int = 1) -> None:
    with lock.output(corpus.output):
        finish(corpus, Tokenizer(corpus.work.tokenizer))


def _parse_slurm(text: str) -> SlurmOptions:
    try:
        pairs = dict(part.split("=", 1) for part in filter(None, text.split(",")))
    except ValueError as error:
        raise UserError(f"--slurm: {text!r} must be like partition=cpu,time=24:00:00") from error
    unknown = set(pairs) - set(SLURM)
    if unknown or not pairs.get("partition"):
        raise UserError(f"--slurm: it takes {', '.join(SLURM)}, and needs the partition; given: {text!r}")
    options: dict[str, str | int] = {**SLURM, **pairs}
    for name in ("cpus_per_task", "mem_per_cpu_gb"):
        if not str(options[name]).isdigit():
            raise UserError(f"--slurm: {name} must be a whole number, not {options[name]!r}")
        options[name] = int(options[name])
    return options
