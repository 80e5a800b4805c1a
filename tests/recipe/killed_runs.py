"""`tanuki` as processes of its own on one device, which are killed when something has happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from tanuki_jax import checkpoint

ROOT = Path(__file__).parents[2]
SECONDS = 600


def start(config, workdir, *verb):
    """The process of a verb, whose log lies beside the workdir."""
    command = [sys.executable, "-m", "tanuki_jax.cli", *verb, f"--config={config}", f"--workdir={workdir}"]
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    with log_of(workdir).open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def log_of(workdir):
    return workdir.parent / f"{workdir.name}.log"


def run(config, workdir, *verb):
    """Runs a verb to its end."""
    assert start(config, workdir, *verb).wait(SECONDS) == 0, log_of(workdir).read_text()[-3000:]


def kill_run(config, workdir, is_time):
    """Starts `tanuki run`, and kills it with SIGKILL as soon as it is time."""
    process, deadline = start(config, workdir, "run"), time.monotonic() + SECONDS
    while not is_time() and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it was killed:\n" + log_of(workdir).read_text()[-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def lines(path):
    """Whole lines of a file, which need not be there."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def assert_same_bits(stage, *workdirs):
    """Of every parameter of a stage's last checkpoint."""
    first, second = (checkpoint.load(workdir / "stages" / stage).params for workdir in workdirs)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), first, second))
