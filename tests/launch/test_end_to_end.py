"""`tanuki launch tpu run` as a user types it: a program `gcloud` on PATH, machines that run commands, a preemption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tanuki_jax import checkpoint
from tests.launch import machines
from tests.tiny_recipe import trained

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_preempted_launch_ends_with_the_report_and_the_bits_of_a_run_that_was_left_alone(tmp_path, tmp_path_factory):
    workdir = tmp_path / "work"
    path = machines.make(tmp_path / "cloud")
    words = [sys.executable, "-m", "tanuki_jax.cli", "launch", "tpu", "run", "--name=tanuki", "--zone=z", "--type=v5p-8"]
    words += [f"--workdir={workdir}", "--config=tests/tiny_recipe.py", "--poll=0.5", "--allow_boot_disk=true"]
    words += ["--env=JAX_PLATFORMS=cpu", "--env=TANUKI_COORDINATOR="]
    words += [f"--compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}"]
    words += [f"--env=XLA_FLAGS={os.environ['XLA_FLAGS']}"]  # as many devices as here
    environ = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    launch = subprocess.Popen(words, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        limit = time.monotonic() + 300
        while not list(workdir.glob("stages/continued/checkpoints/[0-9]*")):
            assert time.monotonic() < limit and launch.poll() is None, launch.communicate()
            time.sleep(0.1)
        (tmp_path / "cloud" / "next").write_text("preempted")
        _, said = launch.communicate(timeout=600)
    finally:
        if launch.poll() is None:
            launch.send_signal(signal.SIGKILL)
    assert launch.returncode == 0, said
    assert "deleting what is left" in said and f"done; the report is {workdir}/report.html" in said
    assert (workdir / "report.html").is_file()
    assert sorted(path.name for path in (tmp_path / "cloud" / "machines").iterdir()) == ["1-tanuki-w-0", "2-tanuki-w-0"]
    alone = trained(tmp_path_factory.getbasetemp())
    for stage in ("continued", "dpo"):
        arrays = [jax.tree.leaves(checkpoint.load(base / "stages" / stage).params) for base in (workdir, alone)]
        assert all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True)), stage
