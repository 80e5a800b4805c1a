"""What is copied to every TPU VM, in one file: worker.py, what it is to run, and the committed state of this checkout."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

from tanuki_jax.errors import UserError
from tanuki_jax.launch import worker
from tanuki_jax.launch.settings import Settings, environment, hide, run_flags

ROOT = Path(__file__).resolve().parents[2]


def launch_json(settings: Settings) -> bytes:
    """What worker.py reads; the same bytes for the same settings and commit.  `project` says what is installed."""
    launch = {
        "project": f"{_git('rev-parse', 'HEAD').decode().strip()} python {settings.python}",
        "workdir": settings.workdir,
        "setup": settings.setup,
        "python": settings.python,
        "allow_boot_disk": settings.allow_boot_disk,
        "run": run_flags(settings),
        "env": environment(settings, "tpu"),
    }
    return json.dumps(launch, indent=1, sort_keys=True).encode()


def archive() -> bytes:
    """The committed state of this checkout, nothing else, as a .tar.gz."""
    return _git("archive", "--format=tar.gz", "HEAD")


def uncommitted() -> int:
    """Files that differ from the committed state, which the workers get."""
    return len(_git("status", "--porcelain").splitlines())


def check_config(settings: Settings) -> None:
    """An error where the recipe's file is none of the committed ones; one with an absolute path is on the workers."""
    path = settings.config.partition(":")[0]
    if Path(path).is_absolute() or not path:
        return
    if not _git("ls-tree", "--name-only", "HEAD", "--", path).strip():
        raise UserError(f"launch: config: there is no {path} in the committed state of {ROOT}, which is what the workers get")


def write(path: Path, settings: bytes, project: bytes) -> None:
    """Writes the file; settings: of `launch_json`, project: of `archive`.  Nobody else may read what it unpacks to."""
    path.touch(0o600)  # scp copies the mode, too
    files = {"worker.py": Path(worker.__file__).read_bytes(), "launch.json": settings, "tanuki_jax.tar.gz": project}
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o600
            tar.addfile(member, io.BytesIO(content))


def explain(settings: Settings) -> str:
    """What is in it, for a dry run, as comments of a shell; the user's variables without their values."""
    launch = json.loads(launch_json(settings))
    launch["env"] = hide(launch["env"], settings)
    lines = json.dumps(launch, indent=1, sort_keys=True).splitlines()
    first = "# tanuki_launch.tar: worker.py, tanuki_jax.tar.gz (git archive HEAD), and launch.json:"
    return "\n".join([first, *(f"#   {line}" for line in lines)])


def _git(*words: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True)
    except OSError as error:
        raise UserError(f"launch: git is not installed, which packs this checkout: {error.strerror}") from error
    if done.returncode:
        raise UserError(f"launch: {ROOT} is no git checkout, which is what is sent: {done.stderr.decode().strip()}")
    return done.stdout
