"""A recipe on the GPUs of a Slurm cluster: one job that requeues itself until the run says that it is done.

The batch script (slurm_job.sh under a head of settings) starts one process for each GPU and decides by their exit codes whether
the job ends or goes on.  What a job leaves in WORKDIR/launch/slurm: NAME.sh (the script), NAME.env (environment of the run,
readable by the user alone), JOB.log (of all its starts), JOB/ended (why it ended) and JOB/exits-START/PROCESS (exit codes).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tanuki_jax.errors import UserError
from tanuki_jax.launch import worker
from tanuki_jax.launch.commands import Commands
from tanuki_jax.launch.settings import Settings, environment, hide, require, run_flags

ACTIONS = {
    "run": "submit the job, which requeues itself until the recipe is done",
    "script": "print the batch script",
    "status": "how job and run stand",
    "logs": "the end of the job's log",
    "stop": "tell the run to stop, which saves first; a job that waits is cancelled",
}
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(sys.executable).with_name("tanuki")
LINES = 200  # of the log
# worker.is_done for a script: whether every stage of the recipe is in its summary.
CHECK = """import json, sys
with open(sys.argv[1], encoding="utf-8") as f:
    summary = json.load(f)
sys.exit({stage["name"] for stage in summary["stages"]} != set(summary["config"]["stages"]))"""


def launch(action: str, settings: Settings, commands: Commands) -> None:
    """One of ACTIONS."""
    actions: dict[str, Callable[[Settings, Commands], None]] = {
        "run": run,
        "script": lambda settings, commands: print(batch_script(settings), end=""),
        "status": status,
        "logs": logs,
        "stop": stop,
    }
    require(settings, "name", "workdir")
    actions[action](settings, commands)


def run(settings: Settings, commands: Commands) -> None:
    """Submits the job, unless one of the same name is queued or running."""
    script, environ = batch_script(settings), environment(settings, _platform(settings))
    if waiting := _jobs(settings, commands):
        job, state = waiting[0]
        raise UserError(f"launch: job {job} ({state}) is called {settings.name}; wait for it, `stop` it, or take another name")
    folder = _folder(settings)
    script_file, env_file = folder / f"{settings.name}.sh", _env_file(settings)
    if commands.dry_run:
        print(f"mkdir -p {shlex.quote(str(folder))}")
        print(f"# {env_file}, mode 600:\n{_comment(_assignments(hide(environ, settings)))}")
        print(f"# {script_file}:\n{_comment(script)}")
    else:
        _check_program(settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(env_file, _assignments(environ))
            _write(script_file, script)
        except OSError as error:
            raise UserError(f"launch: {folder} cannot be written: {error.strerror}; is workdir mounted here?") from error
    submitted = commands.require(["sbatch", "--parsable", str(script_file)])
    if not commands.dry_run:
        job = submitted.out.strip().partition(";")[0]
        print(f"launch: job {job} is submitted; its log is {folder}/{job}.log")


def status(settings: Settings, commands: Commands) -> None:
    """Prints how the job stands in Slurm, and what the run itself left."""
    columns = "--format=%i %T %r start=%S left=%L nodes=%N"
    queued = commands.require(["squeue", "--me", "--noheader", f"--name={settings.name}", columns]).out.strip()
    if commands.dry_run:
        return
    print(f"job: {queued or f'none called {settings.name} is queued or running'}")
    ended = _newest(settings, "*/ended")
    if ended and not queued:
        print(f"job {ended.parent.name} ended: {ended.read_text(encoding='utf-8').strip()}")
    workdir = Path(settings.workdir)
    stages = sorted(path.parent.name for path in workdir.glob("stages/*/done.json"))
    steps = [path for path in workdir.glob("stages/*/checkpoints/*") if path.name.isdigit()]
    newest = max(steps, key=lambda path: path.stat().st_mtime, default=None)
    print(f"run: {'done' if worker.is_done(workdir) else 'not done'}; stages done: {', '.join(stages) or 'none'}", end="")
    print(f"; newest checkpoint: {newest.parent.parent.name}, step {int(newest.name)}" if newest else "; no checkpoint")


def logs(settings: Settings, commands: Commands) -> None:
    """Prints the end of the newest job's log."""
    log = _newest(settings, "*.log")
    if not log and not commands.dry_run:
        raise UserError(f"launch: there is no log in {_folder(settings)}: no job has started, or workdir is not mounted here")
    commands.show(["tail", "-n", str(LINES), str(log or _folder(settings) / "JOB.log")])


def stop(settings: Settings, commands: Commands) -> None:
    """Cancels a job that waits; one that runs is told to stop, has the time it needs to save, and is not requeued."""
    jobs = _jobs(settings, commands) or ([("JOB", "RUNNING")] if commands.dry_run else [])
    if not jobs:
        raise UserError(f"launch: no job called {settings.name} is queued or running")
    for job, state in jobs:
        mark = _folder(settings) / job / "stop"
        if commands.dry_run:
            print(f"touch {shlex.quote(str(mark))}")
        else:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        waits = state == "PENDING"
        if waits:
            commands.run(["scancel", "--state=PENDING", job])
            waits = job not in dict(_jobs(settings, commands))
        if not waits:
            done = commands.run(["scancel", "--signal=TERM", job])
            if done.code and job in dict(_jobs(settings, commands)):
                raise UserError(f"launch: scancel --signal=TERM {job} failed: {done.last_line}")
        elif not commands.dry_run:
            mark.unlink()
        if not commands.dry_run:
            print(f"launch: job {job} {'is cancelled' if waits else 'is told to stop; `status` shows when it has ended'}")


# --- the batch script


def batch_script(settings: Settings) -> str:
    """The whole script: sbatch's flags, the settings, and slurm_job.sh."""
    require(settings, "config")
    flags = [*_job_flags(settings), *settings.sbatch]
    container = bool(settings.container_image)
    head: dict[str, str | list[str]] = {
        "workdir": settings.workdir,
        "environment": str(_env_file(settings)),
        "python": "python3" if container else sys.executable,
        "check": CHECK,
        "command": ["tanuki" if container else str(PROGRAM), "run", *run_flags(settings)],
        "srun": _srun_flags(settings),
        "max_requeues": str(settings.max_requeues),
        "max_restarts": str(settings.max_restarts),
        "margin": str(min(30, settings.signal_seconds // 2)),
    }
    lines = [f"#SBATCH {shlex.quote(flag)}" for flag in flags]
    lines.append("# shellcheck disable=SC2016,SC2089,SC2090  # quoted here, and again by `declare -p`")
    lines += [f"{name}={_shell(value)}" for name, value in head.items()]
    return "\n".join(["#!/bin/bash", *lines, Path(__file__).with_name("slurm_job.sh").read_text(encoding="utf-8")])


def _job_flags(settings: Settings) -> list[str]:
    """Slurm sends SIGTERM to the processes, not to the script, before the limit; names of files have their % doubled."""
    log = str(_folder(settings)).replace("%", "%%") + "/%j.log"
    return [
        f"--job-name={settings.name}",
        f"--nodes={settings.nodes}",
        f"--ntasks-per-node={settings.gpus or 1}",
        f"--cpus-per-task={settings.cpus_per_gpu}",
        *([f"--gpus-per-node={settings.gpus}"] if settings.gpus else []),
        f"--time={settings.time}",
        *([f"--partition={settings.partition}"] if settings.partition else []),
        *([f"--account={settings.account}"] if settings.account else []),
        f"--signal=TERM@{settings.signal_seconds}",
        "--requeue",
        "--dependency=singleton",
        f"--chdir={settings.workdir if settings.container_image else ROOT}",
        f"--output={log}",
        "--open-mode=append",
    ]


def _srun_flags(settings: Settings) -> list[str]:
    """One process for each GPU.  Each sees all GPUs of its node, of which JAX takes that of the process's number there.

    srun does not take --cpus-per-task over from sbatch since Slurm 22.05.
    """
    tasks = settings.gpus or 1
    flags = [
        f"--nodes={settings.nodes}",
        f"--ntasks={settings.nodes * tasks}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={settings.cpus_per_gpu}",
        *(["--gpu-bind=none"] if settings.gpus else []),
        "--kill-on-bad-exit=1",
    ]
    if settings.container_image:
        flags += [f"--container-image={settings.container_image}", f"--container-mounts={_mounts(settings)}"]
    return flags


def _mounts(settings: Settings) -> str:
    """The user's mounts, and the workdir where none of them has it; an error where one has another directory in its place.

    The batch script reads the workdir outside the container, and the processes write it inside.
    """
    mounts = [mount for mount in settings.container_mounts.split(",") if mount]
    workdir, mounted = Path(settings.workdir), False
    for parts in (mount.split(":") for mount in mounts):
        source, target = Path(parts[0]), Path(parts[min(1, len(parts) - 1)])
        if not workdir.is_relative_to(target):
            continue
        mounted = True
        if source.resolve() != target.resolve():
            outside = source / workdir.relative_to(target)
            raise UserError(
                f"launch: container_mounts shows {source} as {target}, so that workdir {workdir} is one directory for the run "
                f"and another for the job's script; set workdir={outside} and mount {source}:{source}"
            )
    if not mounted:
        if re.search(r"[:,\s]", settings.workdir):
            raise UserError(f"launch: workdir is {settings.workdir!r}; pyxis cannot mount a path with ':', ',' or a space")
        mounts.append(f"{workdir}:{workdir}")
    return ",".join(mounts)


def _platform(settings: Settings) -> str:
    return "cuda" if settings.gpus else "cpu"


def _check_program(settings: Settings) -> None:
    if not settings.container_image and not PROGRAM.is_file():
        raise UserError(f"launch: there is no {PROGRAM}; install the project with `make setup`, or set container_image")


# --- what the actions share


def _folder(settings: Settings) -> Path:
    return Path(settings.workdir) / "launch" / "slurm"


def _env_file(settings: Settings) -> Path:
    return _folder(settings) / f"{settings.name}.env"


def _jobs(settings: Settings, commands: Commands) -> list[tuple[str, str]]:
    """Number and state of the user's jobs of this name that have not ended."""
    out = commands.require(["squeue", "--me", "--noheader", f"--name={settings.name}", "--format=%i %T"]).out
    return [(words[0], words[1]) for words in map(str.split, out.splitlines()) if len(words) == 2]


def _newest(settings: Settings, pattern: str) -> Path | None:
    return max(_folder(settings).glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def _shell(value: str | list[str]) -> str:
    return shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"


def _assignments(environ: Mapping[str, str]) -> str:
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in environ.items())


def _comment(text: str) -> str:
    return "\n".join(f"#   {line}" for line in text.splitlines())


def _write(path: Path, text: str) -> None:
    """Replaces a file by one that only the user can read; never is it readable by others."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.touch(0o600, exist_ok=False)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
