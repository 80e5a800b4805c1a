"""What a killed run, another number of devices or another number of processes may change: nothing."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tanuki_jax import checkpoint
from tests.tiny_recipe import CONFIG, STAGES

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 30, 4
LONGER = [
    f"--config.stages.{stage}.{key}={value}"
    for stage in STAGES
    if stage != "upcycle"
    for key, value in (("steps", STEPS), ("save_every", SAVE_EVERY), ("log_every", 1))
]


def start(workdir, *flags, devices=1, verb="run", **env):
    """`tanuki run` of the tiny recipe, in a process of its own."""
    env = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}"),
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
        "PYTHONPATH": str(ROOT),
        **env,
    }
    command = [sys.executable, "-m", "tanuki_jax.cli", verb, CONFIG, f"--workdir={workdir}", *LONGER, *flags]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


def metrics(workdir, stage):
    path = workdir / "stages" / stage / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def kill_when(process, reached):
    """kill -9 as soon as `reached()`; the work must not be over by then."""
    while not reached():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


PRETRAIN = ("--stage=pretrain", "--config.scoring.prompts=0", f"--config.stages.pretrain.keep_latest={STEPS}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The whole recipe."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(start(workdir))
    return workdir


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Its first stage."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    finish(start(workdir, *PRETRAIN, verb="train"))
    return workdir


def same_weights(one, other):
    for a, b in zip(*(jax.tree.leaves(checkpoint.load(w).params) for w in (one, other)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_kill_9_in_every_stage_changes_no_bit(uninterrupted, tmp_path):
    workdir, rng = tmp_path / "run", random.Random(4)
    for stage in STAGES:
        home, steps = workdir / "stages" / stage, rng.randrange(2, STEPS)
        if stage == "upcycle":  # it has no steps: killed while it writes its checkpoint
            kill_when(start(workdir), lambda home=home: (home / "checkpoints").is_dir() or (home / "tokenizer").is_dir())
        else:
            kill_when(start(workdir), lambda stage=stage, steps=steps: len(metrics(workdir, stage)) >= steps)
    finish(start(workdir))
    for stage in STAGES:
        same_weights(workdir / "stages" / stage, uninterrupted / "stages" / stage)
        mine, theirs = metrics(workdir, stage), metrics(uninterrupted, stage)
        assert [(r["step"], r["loss"]) for r in mine] == [(r["step"], r["loss"]) for r in theirs]
    assert not list(workdir.rglob(".*.tmp"))


def test_kill_9_while_a_checkpoint_is_written_loses_at_most_that_one(pretrained, tmp_path):
    workdir = tmp_path / "run"
    written = workdir / "stages" / "pretrain" / "checkpoints"
    kill_when(
        start(workdir, *PRETRAIN, verb="train"),
        lambda: any("tmp" in p.name for p in written.glob("*")) and len(metrics(workdir, "pretrain")) > SAVE_EVERY,
    )
    finish(start(workdir, *PRETRAIN, verb="train"))
    same_weights(workdir / "stages" / "pretrain", pretrained / "stages" / "pretrain")
    ours, theirs = metrics(workdir, "pretrain"), metrics(pretrained, "pretrain")
    assert [(r["step"], r["loss"]) for r in ours] == [(r["step"], r["loss"]) for r in theirs]
    assert not list(workdir.rglob(".*.tmp"))


def two_processes(workdir, *flags, **options):
    """Two processes of two devices each, as one run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(NPROC="16", TANUKI_COORDINATOR=f"127.0.0.1:{port}", TANUKI_PROCESSES="2")
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    return [start(workdir, *mesh, *flags, devices=2, TANUKI_PROCESS_ID=str(i), **env, **options) for i in range(2)]


def test_other_devices_and_processes_go_on_with_the_same_losses(pretrained, tmp_path):
    """What one device began, of which the first steps are left, two processes of two devices each end."""
    workdir = shutil.copytree(pretrained, tmp_path / "run")
    home, steps = workdir / "stages" / "pretrain", 2 * SAVE_EVERY
    (home / "done.json").unlink()
    for written in (home / "checkpoints").iterdir():
        if int(written.name) > steps:
            shutil.rmtree(written)
    first = (home / "metrics.jsonl").read_text().splitlines(keepends=True)[:steps]
    (home / "metrics.jsonl").write_text("".join(first))
    for process in two_processes(workdir, *PRETRAIN, verb="train"):
        finish(process)
    found, wanted = ([r["loss"] for r in metrics(w, "pretrain")] for w in (workdir, pretrained))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.slow
def test_another_number_of_devices_goes_on_with_the_same_losses(pretrained, tmp_path):
    workdir = tmp_path / "run"
    for devices, mesh in ((1, (1, 1)), (4, (2, 2)), (2, (1, 2))):
        flags = [f"--config.mesh.data={mesh[0]}", f"--config.mesh.fsdp={mesh[1]}", *PRETRAIN]
        process = start(workdir, *flags, devices=devices, verb="train", NPROC="16")
        if devices == 2:
            finish(process)
        else:
            done = len(metrics(workdir, "pretrain"))
            kill_when(process, lambda done=done: len(metrics(workdir, "pretrain")) >= done + 8)
    found, wanted = ([r["loss"] for r in metrics(w, "pretrain")] for w in (workdir, pretrained))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_of_two_devices_run_the_recipe_like_one(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    for process in two_processes(workdir):
        finish(process)
    for stage in STAGES:
        found, wanted = ([r["loss"] for r in metrics(w, stage)] for w in (workdir, uninterrupted))
        # A router's choice is a step: a difference in the last bit may send a token to another expert, and grows from there.
        np.testing.assert_allclose(found, wanted, rtol=1e-5 if stage == "pretrain" else 2e-3, err_msg=stage)
    ours, theirs = (json.loads((w / "summary.json").read_text())["stages"] for w in (workdir, uninterrupted))
    assert [s["name"] for s in ours] == [s["name"] for s in theirs]
