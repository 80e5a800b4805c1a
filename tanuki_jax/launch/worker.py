"""What runs on a TPU VM: prepares it, starts the run detached, and says how it stands.

A file of its own for any Python from 3.8 on, with the standard library alone: an image's Python may be older than the
project's.
It lies in ~/tanuki_launch beside launch.json (what to run) and tanuki_jax.tar.gz (the project).  Every action may be repeated,
since gcloud repeats a command whose connection broke, and it ends with one line of JSON after MARK: gcloud's own exit code says
little about many workers.

What a run leaves in WORKDIR/launch/ATTEMPT: HOST.log, and HOST.exit with its exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MARK = "##tanuki "
HERE = Path(__file__).resolve().parent
PROJECT = Path.home() / "tanuki_jax"
HOST = os.environ.get("TANUKI_LAUNCH_HOST") or socket.gethostname()
LINES = 15  # of a log that go into an answer
LETTERS = 6_000  # of an answer's text: those of many workers come through one pipe
STOP_SECONDS = 240  # a run that is told to stop saves first
SETUP_SECONDS, INSTALL_SECONDS = 1200, 2400  # for the setup command, and for each step of the installation
NO_PROGRAM = 127  # exit code of a run that cannot be started, as a shell's


class Failed(Exception):
    """What went wrong, in words for the user."""


def setup(launch: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Checks that this bundle is the one that was sent, and runs the user's command; the workdir must then be there."""
    del options
    if launch["setup"]:
        with _locked("setup"):
            _call(["bash", "-euo", "pipefail", "-c", launch["setup"]], "the setup command", seconds=SETUP_SECONDS)
    workdir = Path(launch["workdir"])
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{HOST}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise Failed(f"workdir {workdir} cannot be written: {error.strerror}; mount it in `setup`") from error
    if not launch["allow_boot_disk"] and workdir.stat().st_dev == Path("/").stat().st_dev:
        raise Failed(
            f"workdir {workdir} lies on the boot disk, which is deleted with the VM; mount a bucket or a file share in "
            "`setup`, or set allow_boot_disk=true"
        )
    return {}


def install(launch: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Unpacks the project and installs it, once for each bundle."""
    del options
    with _locked("install"):
        done = PROJECT / ".venv" / "installed"
        if done.is_file() and done.read_text() == launch["project"]:
            return {"again": False}
        if _alive(_current()):
            raise Failed("a run of other code is alive here; `stop` ends it")
        PROJECT.mkdir(exist_ok=True)
        for path in PROJECT.iterdir():  # files of an earlier state; the environment stays
            if path.name != ".venv":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        _call(["tar", "-xzf", str(HERE / "tanuki_jax.tar.gz"), "-C", str(PROJECT)], "unpacking the project")
        python = str(PROJECT / ".venv" / "bin" / "python")
        if not _runs([python, "-m", "pip", "--version"]):
            shutil.rmtree(PROJECT / ".venv", ignore_errors=True)
            _make_environment(launch["python"])
        lock = ["--constraint", "requirements.lock"]
        _call([python, "-m", "pip", "install", "--quiet", *lock, "--editable", ".[tpu]"], "the installation", PROJECT)
        _call([python, "-c", "import tanuki_jax, jax"], "importing the project", PROJECT)
        done.write_text(launch["project"])
    return {"again": True}


def _make_environment(version: str) -> None:
    """By the image's Python where it is new enough, else by one that uv brings."""
    target = str(PROJECT / ".venv")
    if sys.version_info >= (3, 11) and _runs([sys.executable, "-m", "venv", target]):
        return
    shutil.rmtree(target, ignore_errors=True)
    uv = HERE / "uv"
    if not _runs([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(uv), "uv"]):
        raise Failed("uv, which brings a newer Python, cannot be installed: `python3 -m pip install uv` fails on this image")
    _call([str(uv / "bin" / "uv"), "venv", "--python", version, "--seed", target], f"making an environment of Python {version}")


def start(launch: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Starts the run detached, unless this attempt has been started here."""
    with _locked("start"):
        current = _current()
        if current.get("attempt") == options.attempt:
            return {"again": False}
        if _alive(current):
            raise Failed(f"attempt {current['attempt']} still runs here; `stop` ends it")
        directory = Path(launch["workdir"]) / "launch" / str(options.attempt)
        directory.mkdir(parents=True, exist_ok=True)
        log = (HERE / "supervisor.log").open("ab")
        words = [sys.executable, str(Path(__file__).resolve()), "supervise", f"--attempt={options.attempt}"]
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=str(PROJECT)
        )
        state = {"attempt": options.attempt, "pid": process.pid, "started": _started(process.pid), "launch": _digest()}
        _write(HERE / "current.json", json.dumps(state))
    return {"again": True}


def supervise(launch: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The detached process: the run, its log, and its exit code at the end."""
    directory = Path(launch["workdir"]) / "launch" / str(options.attempt)
    environ = dict(os.environ)
    environ.update(launch["env"])
    with (directory / f"{HOST}.log").open("ab") as log:
        words = [str(PROJECT / ".venv/bin/tanuki"), "run"] + launch["run"]
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=str(PROJECT), env=environ
            )
            signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
            code = process.wait()
        except OSError as error:
            log.write(f"{words[0]} cannot be started: {error.strerror}\n".encode())
            code = NO_PROGRAM
    _write(directory / f"{HOST}.exit", str(128 - code if code < 0 else code))
    return {}


def status(launch: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """How the newest attempt stands, as any worker sees it in the workdir, and this worker itself."""
    del options
    workdir = Path(launch["workdir"])
    attempts = sorted(int(path.name) for path in (workdir / "launch").glob("[0-9]*") if path.name.isdigit())
    current = _current()
    result: dict[str, Any] = {"attempt": attempts[-1] if attempts else 0, "exits": {}, "started": [], "done": is_done(workdir)}
    if attempts:
        directory = workdir / "launch" / str(attempts[-1])
        result["started"] = sorted(path.name[:-4] for path in directory.glob("*.log"))
        for path in directory.glob("*.exit"):
            with contextlib.suppress(OSError, ValueError):
                result["exits"][path.name[:-5]] = int(path.read_text())
    result["alive"] = _alive(current)
    result["stopped"] = (workdir / "launch" / str(result["attempt"]) / "stop").exists()
    result["here"] = current.get("attempt", 0)
    installed = PROJECT / ".venv" / "installed"
    result["installed"] = installed.read_text() if installed.is_file() else ""
    result["launch"] = current.get("launch", "") if result["alive"] else _digest()
    result["progress"] = _progress(workdir)
    result["last"] = _tail(_log(workdir, result["attempt"]), 1)
    failed = [host for host, code in sorted(result["exits"].items()) if code in (1, NO_PROGRAM)]
    if failed:
        result["message"] = _tail(workdir / "launch" / str(result["attempt"]) / f"{failed[0]}.log", LINES)[-LETTERS:]
    return result


def logs(launch: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The end of this worker's log."""
    workdir = Path(launch["workdir"])
    attempt = status(launch, options)["attempt"]
    print(_tail(_log(workdir, attempt), options.lines))
    return {"attempt": attempt}


def stop(launch: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Tells the run to stop, which saves first, and waits for its end.  A mark says that it is not to be started again."""
    current = _current()
    if options.mark and current:
        (Path(launch["workdir"]) / "launch" / str(current["attempt"]) / "stop").touch()
    if not _alive(current):
        return {"was_running": False}
    leader = _started(current["pid"]) == current["started"]
    _signal([current["pid"]] if leader else _session(current["pid"]), signal.SIGTERM)
    limit = time.monotonic() + STOP_SECONDS
    while _alive(current) and time.monotonic() < limit:
        time.sleep(0.2)
    _signal(_session(current["pid"]) if _alive(current) else [], signal.SIGKILL)
    return {"was_running": True}


# --- what the actions share -------------------------------------------------------------------------------------------


def lists_every_stage(summary: Any) -> bool:
    """Whether a summary.json, parsed, has every stage of its recipe."""
    try:
        return {entry["name"] for entry in summary["stages"]} == set(summary["config"]["stages"])
    except (KeyError, TypeError):
        return False


def is_done(workdir: Path) -> bool:
    """Whether the run itself says that every stage of its recipe is finished: summary.json, which it writes at its end."""
    try:
        return lists_every_stage(json.loads((workdir / "summary.json").read_text()))
    except (OSError, ValueError):
        return False


def _progress(workdir: Path) -> list[Any]:
    """Something that changes with every checkpoint and every finished stage."""
    steps = [path for path in workdir.glob("stages/*/checkpoints/*") if path.name.isdigit()]
    newest = sorted(f"{path.parent.parent.name}/{int(path.name):012d}" for path in steps)
    return [len(list(workdir.glob("stages/*/done.json"))), newest[-1:], len(newest)]


def _log(workdir: Path, attempt: int) -> Path:
    path = workdir / "launch" / str(attempt) / f"{HOST}.log"
    logs = sorted((workdir / "launch" / str(attempt)).glob("*.log"))
    return path if path.is_file() or not logs else logs[0]


def _tail(path: Path, lines: int) -> str:
    try:
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - 65_536))
            text = f.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(re.split(r"[\r\n]+", text.strip())[-lines:])


def _current() -> dict[str, Any]:
    """The attempt that was last started here."""
    try:
        return json.loads((HERE / "current.json").read_text())
    except (OSError, ValueError):
        return {}


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks: process numbers are reused."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        return ""


def _alive(current: dict[str, Any]) -> bool:
    """Whether the attempt's supervisor runs, or anything that it started: a run may outlive it."""
    if not current:
        return False
    started = _started(current["pid"])
    return started == current["started"] if started else bool(_session(current["pid"]))


def _session(leader: int) -> list[int]:
    """The processes of a session."""
    result = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[3] == str(leader) and fields[0] != "Z":
                result.append(int(path.parent.name))
    return result


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _digest() -> str:
    return hashlib.sha256((HERE / "launch.json").read_bytes()).hexdigest()


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """One process at a time: gcloud may repeat a command beside the first."""
    with (HERE / f"{name}.lock").open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _runs(words: Sequence[str]) -> bool:
    try:
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    except OSError:
        return False


def _call(words: Sequence[str], action: str, cwd: Path | None = None, seconds: float = INSTALL_SECONDS) -> None:
    """Runs a command; its output goes to a file, for a process that it leaves in the background would keep a pipe open."""
    with tempfile.TemporaryFile() as output:
        try:
            code = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=cwd, timeout=seconds
            ).returncode
            end = f"{action} ended with exit code {code}"
        except subprocess.TimeoutExpired:
            code, end = 1, f"{action} did not end in {seconds:.0f} s"
        if code:
            output.seek(0)
            text = output.read().decode("utf-8", "replace").strip().splitlines()[-LINES:]
            raise Failed("\n".join([end, *text]))


ACTIONS = {f.__name__: f for f in (setup, install, start, supervise, status, logs, stop)}


def main() -> int:
    """One action; its answer is the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--attempt", type=int, default=0)
    parser.add_argument("--lines", type=int, default=100)
    parser.add_argument("--mark", action="store_true")
    parser.add_argument("--digest", default="", help="SHA-256 of launch.json, which must be the one that is here")
    options = parser.parse_args()
    answer: dict[str, Any] = {"host": HOST, "action": options.action, "ok": True}
    try:
        text = (HERE / "launch.json").read_bytes()
        if options.digest and hashlib.sha256(text).hexdigest() != options.digest:
            raise Failed("another launch.json is here: nothing was copied; does ssh-agent hold the key (ssh-add -l)?")
        answer.update(ACTIONS[options.action](json.loads(text.decode("utf-8")), options))
    except Exception as error:  # whatever it is, no answer would look like a lost connection
        answer.update(ok=False, error=(str(error) if isinstance(error, Failed) else repr(error))[-LETTERS:])
    if options.action != "supervise":
        print(MARK + json.dumps(answer), flush=True)
    return 0  # gcloud leaves out further workers after one that fails


if __name__ == "__main__":
    sys.exit(main())
