"""The platform of cloud.py as a program `gcloud`, whose machines are directories in which commands really run.

    python -m tests.launch.machines DIRECTORY [python of the project]      makes DIRECTORY/bin/gcloud

With DIRECTORY/bin on PATH, `tanuki launch tpu` works from the request to the report.  On a "VM" pip installs nothing: the
project's files come from the launch, its libraries from the Python that is named.  `echo preempted > DIRECTORY/next` lets
something happen at the next look.
"""

import os
import pickle
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from tests.launch.cloud import Cloud

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/bash
[[ "$*" == *"pip install"* ]] && exit 0
PYTHONPATH="$HOME/tanuki_jax" exec {python} "$@"
"""
TANUKI = """#!/bin/bash
PYTHONPATH="$HOME/tanuki_jax" exec {python} -m tanuki_jax.cli "$@"
"""


class Machines(Cloud):
    """A platform whose workers are directories."""

    def __init__(self, directory: Path, python: str, kind: str = "v5p-8", count: int = 1) -> None:
        super().__init__(kind=kind, count=count)
        self.directory, self.python = directory, python

    def happens(self, event):
        path = self.directory / "next"
        if path.is_file() and path.read_text().strip() == event:
            path.unlink()
            return True
        return False

    def run(self, words, text="", seconds=300.0):
        if "describe" in words:
            self.sleep(60)
        if "create" in words:
            flags = dict(word[2:].split("=", 1) for word in words if "=" in word)
            self.count = int(flags.get("node-count", 1))
        return super().run(words, text, seconds)

    def _boot(self):
        super()._boot()
        for worker in self.workers:
            scripts = self._home(worker) / "tanuki_jax" / ".venv" / "bin"
            scripts.mkdir(parents=True)
            for name, text in (("python", PYTHON), ("tanuki", TANUKI)):
                (scripts / name).write_text(text.format(python=shlex.quote(self.python)))
                (scripts / name).chmod(0o755)

    def _home(self, worker):
        return self.directory / "machines" / f"{self.counts['granted']}-{worker.host}"

    def _train(self):
        """The run is a process of its own."""

    def _end_all(self, code=134, lost=False, but=None):
        """Machines that are lost take their processes with them."""
        for worker in self.workers:
            for pid in (self._home(worker) / "tanuki_launch").glob("current.json"):
                subprocess.run(["pkill", "-9", "-s", pid.read_text().split('"pid": ')[1].split(",")[0]])

    def _scp(self, noun, words):
        for worker in self._reached("all"):
            subprocess.run(["cp", words[0], str(self._home(worker))], check=True)
        return super()._scp(noun, words)

    def _execute(self, worker, command):
        home = self._home(worker)
        env = {"HOME": str(home), "TANUKI_LAUNCH_HOST": worker.host, "PATH": os.environ["PATH"]}
        done = subprocess.run(
            ["bash", "-c", command], cwd=home, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        return (done.stdout + done.stderr).splitlines()


def main() -> int:
    """One command of gcloud, on the state that the directory holds."""
    directory, *words = sys.argv[1:]
    path = Path(directory) / "state"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cloud = pickle.loads(path.read_bytes())
    done = cloud.run(["gcloud", *words])
    path.write_bytes(pickle.dumps(cloud))
    print(done.out, end="")
    print(done.err, end="", file=sys.stderr)
    return done.code


def make(directory: Path, python: str = sys.executable) -> Path:
    """Makes the program; returns the directory for PATH."""
    (directory / "bin").mkdir(parents=True)
    python = str(Path(python).absolute())  # not resolved: an environment's Python is a link
    (directory / "state").write_bytes(pickle.dumps(Machines(directory.absolute(), python)))
    program = directory / "bin" / "gcloud"
    words = [sys.executable, "-c", "import sys; from tests.launch import machines; sys.exit(machines.main())"]
    program.write_text(
        f'#!/bin/bash\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.join(words)} {shlex.quote(str(directory))} "$@"\n'
    )
    program.chmod(0o755)
    return program.parent


if __name__ == "__main__":
    from tests.launch import machines

    print(machines.make(Path(sys.argv[1]).absolute(), *sys.argv[2:]))
