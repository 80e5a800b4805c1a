"""The job through a real Slurm: what it does with signals, limits, requeues, logs and CPUs."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tanuki_jax import checkpoint
from tanuki_jax.errors import UserError
from tanuki_jax.launch import slurm
from tanuki_jax.launch.commands import Commands
from tests.launch.fake_slurm import TANUKI, read_settings, write_program
from tests.launch.real_slurm import start_slurm

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "upcycle", "continued", "sft", "dpo")
TRAINED = [stage for stage in STAGES if stage != "upcycle"]
# configs/nano.py, cut to what compiles and trains in a few seconds.
SMALLER = ["n_layers=1", "d_model=32", "d_ff=64", "n_heads=1", "n_kv_heads=1", "n_experts=4"]
FLAGS = [
    *(f"--config.model.{change}" for change in SMALLER),
    *(f"--config.{change}" for change in ("rules.documents=200", "rules.dialogues=200", "rules.pairs=40", "tensorboard=False")),
    *(f"--config.scoring.{key}=0" for key in ("prompts", "pairs")),
    *(f"--config.stages.{stage}.tokens=5000" for stage in TRAINED if stage != "dpo"),
    *(f"--config.stages.{stage}.phase_start_tokens=(0,2500)" for stage in ("pretrain", "continued")),
    "--config.stages.dpo.steps=6",
    *(f"--config.stages.{stage}.{change}" for stage in TRAINED for change in ("batch_size=4", "save_every=4", "log_every=1")),
]


@pytest.fixture(scope="module")
def cluster():
    with start_slurm() as running:
        yield running


@pytest.fixture
def nano(cluster, tmp_path, monkeypatch):
    """Submits a job by `launch`, whose `tanuki` ends as `fake` says; its number and its workdir."""
    for name, value in cluster.environ.items():
        monkeypatch.setenv(name, value)

    def submit(fake, *flags, name="nano", program=TANUKI):
        workdir = tmp_path / f"{name}'s 狸 100% #run"
        monkeypatch.setattr(slurm, "PROGRAM", write_program(tmp_path / "tanuki", program))
        basic = ["--gpus=0", "--cpus_per_gpu=2", "--time=5", f"--name={name}", f"--env=FAKE={fake}", "--env=SECRET=a b"]
        return Job(cluster, read_settings(workdir, *basic, *flags))

    return submit


class Job:
    """A job that was submitted."""

    def __init__(self, cluster, settings):
        self.cluster, self.settings, self.workdir = cluster, settings, Path(settings.workdir)
        slurm.launch("run", settings, Commands())
        [(self.number, _)] = slurm._jobs(settings, Commands())
        self.folder = self.workdir / "launch" / "slurm"

    def wait(self, *states, seconds=90):
        return self.cluster.wait(self.number, *states, seconds=seconds)

    def wait_until(self, reached, seconds=90):
        limit = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < limit and "would come again" not in self.log, self.log
            time.sleep(0.1)

    def wait_until_ready(self, start):
        self.wait_until((self.workdir / f"ready-{start}").exists)

    @property
    def log(self):
        path = self.folder / f"{self.number}.log"
        return path.read_text() if path.is_file() else ""

    @property
    def ended(self):
        return (self.folder / self.number / "ended").read_text()


def test_a_job_is_preempted_requeued_resumed_and_ends(nano, cluster):
    """Workdir missing at first; requeued by an administrator, then by itself after SIGTERM; one log of all starts."""
    job = nano("save save 0")
    with pytest.raises(UserError, match=f"job {job.number} .* is called nano"):
        slurm.launch("run", job.settings, Commands())
    job.wait_until_ready(0)
    cluster.call("scontrol", "requeue", job.number)
    job.wait_until_ready(1)
    cluster.call("scancel", "--signal=TERM", job.number)
    state = job.wait("COMPLETED")
    assert state["Restarts"] == "2" and state["ExitCode"] == "0:0"
    assert [f"start {start}, process 0, cpu auto a b, CPUs 2" in job.log for start in range(3)] == [True] * 3
    assert "start 2: ended with exit code 75; requeued" in job.log and job.ended.startswith("done; the report is")
    assert sorted(path.name for path in (job.workdir / "stages" / "first" / "checkpoints").iterdir()) == ["0", "1"]


def test_the_time_limit_tells_the_run_to_save_and_the_job_goes_on(nano):
    job = nano("save 0", "--time=1", "--signal_seconds=40")
    assert job.wait("COMPLETED", seconds=120)["Restarts"] == "1"
    assert "start 1: ended with exit code 75; requeued" in job.log


def test_after_bad_input_nothing_goes_on(nano, cluster):
    jobs = [nano("1", name="bad"), nano("empty", name="empty"), nano("save-75", "--max_requeues=1", name="often")]
    for job in jobs:
        job.wait("FAILED")
    assert [cluster.job(job.number)["Restarts"] for job in jobs] == ["0", "0", "1"]
    assert not cluster.call("squeue", "--noheader")
    assert "exit code 1, which would come again" in jobs[0].ended and "does not list every stage" in jobs[1].log
    assert "as often as max_requeues allows" in jobs[2].ended


def test_stop_saves_and_the_job_is_not_requeued(nano, capsys):
    job = nano("save")
    job.wait_until_ready(0)
    slurm.launch("stop", job.settings, Commands())
    assert job.wait("COMPLETED")["Restarts"] == "0" and job.ended.startswith("stopped")
    capsys.readouterr()
    slurm.launch("status", job.settings, Commands())
    assert f"job {job.number} ended: stopped" in capsys.readouterr().out


def test_stop_cancels_a_job_that_waits(nano):
    job = nano("0", "--sbatch=--begin=now+1hour")
    slurm.launch("stop", job.settings, Commands())
    job.wait("CANCELLED")


def test_several_processes_have_their_cpus_and_bad_input_of_one_ends_the_job(nano, cluster, monkeypatch):
    """As with two GPUs, which this cluster has not."""
    script = slurm.batch_script
    monkeypatch.setattr(slurm, "batch_script", lambda values: re.sub(r"(#SBATCH )?--gpu\S*", "", script(values)))
    job = nano("0:75,1:1", "--gpus=2", "--cpus_per_gpu=3")
    state = job.wait("FAILED")
    assert state["NumCPUs"] == "6" and state["Restarts"] == "0" and "exit code 1, which would come again" in job.ended
    assert all(f"process {process}, cuda auto a b, CPUs 3" in job.log for process in (0, 1)), job.log


def test_sbatch_reads_the_flags_of_a_job_with_gpus(cluster, tmp_path):
    """It refuses this one for the lack of GPUs alone."""
    script = write_program(tmp_path / "job", slurm.batch_script(read_settings(tmp_path, "--gpus=8", "--nodes=1")))
    words = ["sbatch", "--test-only", str(script)]
    done = subprocess.run(words, env=os.environ | cluster.environ, capture_output=True, text=True)
    assert "Requested node configuration is not available" in done.stderr, done.stderr


# --- a real run


def digests(workdir):
    """SHA-256 of every array of every stage's last checkpoint."""
    result = {}
    for stage in STAGES:
        for path, array in jax.tree_util.tree_leaves_with_path(checkpoint.load(workdir / "stages" / stage).params):
            result[stage + jax.tree_util.keystr(path)] = hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
    return result


def steps(workdir, stage):
    path = workdir / "stages" / stage / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_the_nano_recipe_requeued_twice_has_the_bits_of_one_that_was_not(nano, cluster, tmp_path, request):
    env = {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1"),
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
        "PYTHONPATH": str(ROOT),
    }
    config, whole = f"--config={ROOT}/tests/launch/nano_by_rules.py", tmp_path / "whole"
    errors = (tmp_path / "errors").open("w+")
    words = [sys.executable, "-m", "tanuki_jax.cli", "run", config, f"--workdir={whole}", *FLAGS]
    process = subprocess.Popen(words, env=os.environ | env, stdout=errors, stderr=errors)
    request.addfinalizer(process.kill)
    program = f'#!/bin/bash\nexec "{sys.executable}" -m tanuki_jax.cli "$@"\n'
    launch = [f"--flags={' '.join(FLAGS)}", f"--compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}"]
    job = nano("", config, *launch, *(f"--env={name}={value}" for name, value in env.items()), program=program)
    job.wait_until(lambda: steps(job.workdir, "pretrain") >= 3)
    cluster.call("scancel", "--signal=TERM", job.number)  # as before the limit: the job requeues itself
    job.wait_until(lambda: steps(job.workdir, "sft") >= 2)
    cluster.call("scontrol", "requeue", job.number)  # as a preemption
    assert job.wait("COMPLETED", seconds=180)["Restarts"] == "2"
    assert "start 1: ended with exit code 75; requeued" in job.log
    events = "".join(path.read_text() for path in job.workdir.glob("stages/*/events.jsonl"))
    assert '"preempted"' in events or "before stage" in job.log, events
    assert process.wait(180) == 0, (tmp_path / "errors").read_text()[-3000:]
    assert digests(job.workdir) == digests(whole)
    summaries = [json.loads((workdir / "summary.json").read_text())["stages"] for workdir in (whole, job.workdir)]
    assert [s["final_loss"] for s in summaries[0]] == [s["final_loss"] for s in summaries[1]]
