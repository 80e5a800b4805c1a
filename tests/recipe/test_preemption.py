"""SIGTERM during a run in processes of its own: how it ends, and that the same command goes on as if nothing had happened."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tanuki_jax import checkpoint
from tanuki_jax.cli.main import PREEMPTED, main
from tanuki_jax.recipe import run as run_module
from tanuki_jax.recipe.stage import run_stage
from tests.recipe.test_resume import ROOT, metrics, same_weights
from tests.tiny_recipe import CONFIG

STEPS = {1: 160, 2: 60}  # of so many processes; long enough to be in the middle of


def start(workdir, processes=1):
    """One stage of the tiny recipe, in so many processes with four devices together."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    keys = {"steps": STEPS[processes], "save_every": 100, "log_every": 1}
    flags = [f"--config.stages.pretrain.{key}={value}" for key, value in keys.items()]
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--stage=pretrain"]
    started = []
    for process in range(processes):
        many = {
            "TANUKI_COORDINATOR": f"127.0.0.1:{port}",
            "TANUKI_PROCESSES": str(processes),
            "TANUKI_PROCESS_ID": str(process),
        }
        own = {
            **os.environ,
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={4 // processes}"),
            "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
            "PYTHONPATH": str(ROOT),
            **(many if processes > 1 else {}),
        }
        command = [sys.executable, "-m", "tanuki_jax.cli", "train", CONFIG, f"--workdir={workdir}", *flags, *mesh]
        with (workdir.parent / f"{workdir.name}-{process}.txt").open("a") as said:
            started.append(subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=said))
    return started


def until(reached, process, seconds=240):
    end = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def codes(processes, seconds):
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def told(workdir):
    """The events of a stage, but for processes that wait: on a busy machine any may."""
    lines = (workdir / "stages/pretrain/events.jsonl").read_text().splitlines()
    return [event for event in (json.loads(line)["event"] for line in lines) if event != "slow_host"]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """The workdir of a run of so many processes that nobody disturbs."""

    @functools.cache
    def run(processes):
        workdir = tmp_path_factory.mktemp(f"{processes}") / "whole"
        assert codes(start(workdir, processes), 240) == [0] * processes
        return workdir

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "signalled"), [(1, [0]), (2, [0]), (2, [1]), (2, [0, 1])])
def test_sigterm_ends_a_run_within_ten_seconds_and_it_goes_on(tmp_path, left_alone, processes, signalled):
    workdir, whole = tmp_path / "run", left_alone(processes)
    running = start(workdir, processes)
    until(lambda: len(metrics(workdir, "pretrain")) >= 20, running[0])
    for n in signalled:
        running[n].send_signal(signal.SIGTERM)
    assert codes(running, 10) == [75] * processes
    assert told(workdir) == ["preempted"]
    [saved] = (int(p.name) for p in (workdir / "stages/pretrain/checkpoints").iterdir())
    assert saved == len(metrics(workdir, "pretrain")) < STEPS[processes]  # nothing is lost
    assert codes(start(workdir, processes), 240) == [0] * processes
    same_weights(workdir / "stages/pretrain", whole / "stages/pretrain")
    mine, theirs = metrics(workdir, "pretrain"), metrics(whole, "pretrain")
    assert [(r["step"], r["loss"]) for r in mine] == [(r["step"], r["loss"]) for r in theirs]


@pytest.mark.slow
def test_a_process_whose_peer_was_killed_ends_and_asks_to_be_started_again(tmp_path):
    """Its exit code must not be that of bad input, for which a launcher would ask a person."""
    running = start(tmp_path / "run", 2)
    until(lambda: len(metrics(tmp_path / "run", "pretrain")) >= 10, running[0])
    running[1].kill()
    [code, _] = codes(running, 30)
    assert code not in (0, 1)


def test_a_notice_in_the_last_save_of_a_stage_is_not_forgotten(tmp_path, monkeypatch):
    """Saved all is by then, so the run may end before the next stage, but not go on as if nothing had been said."""
    save, run = checkpoint.Checkpoints.save, run_stage

    def told_while_saving(self, step, *rest):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, step, *rest)

    def first_only(loaded, name, *rest):
        assert name == "pretrain", "the next stage began"
        return run(loaded, name, *rest)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", told_while_saving)
    monkeypatch.setattr(run_module, "run_stage", first_only)
    assert main(["run", CONFIG, f"--workdir={tmp_path / 'run'}"]) == PREEMPTED


TWO = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, dataclasses
jax.config.update("jax_cpu_enable_async_dispatch", False)
from tanuki_jax import config, multihost, parallel
from tanuki_jax.train import loop
from tanuki_jax.train.step import State
multihost.initialize()
mesh = parallel.make_mesh(config.Mesh(data=2))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
fresh = jax.jit(lambda: State(jnp.int32(0), {"w": jnp.zeros(4)}, {"m": jnp.zeros(4)}, jax.random.key(0)), out_shardings=whole)
like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), jax.eval_shape(fresh))
like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), like)
seen = []

@jax.jit
def step(state, batch):
    params = {"w": state.params["w"] + state.lr_scale * batch}
    return dataclasses.replace(state, step=state.step + 1, params=params), {"loss": batch, "grad_norm": jnp.float32(1)}

def batches(first, number):
    seen.clear()
    for n in range(first, 60):
        seen.append(number(n))
        yield jnp.float32(20 if 31 <= number(n) < 36 else 2)

options = config.Stage(save_every=10, log_every=1, guard=config.Guard(rollback_lr_scale=0.5))
job = loop.Job("toy", Path(sys.argv[1]), options, 60, 10, 1.0, {"model": {}})
with jax.set_mesh(mesh):
    state = loop.run_loop(job, like, fresh, step, batches)
print("last", seen, float(multihost.to_host(state.params["w"])[0]))
"""


@pytest.mark.slow
def test_two_processes_go_back_together(tmp_path):
    """Around a spike, with half the learning rate from there."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for process in range(2):
        env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "PYTHONPATH": str(ROOT)}
        env |= {"TANUKI_COORDINATOR": f"127.0.0.1:{port}", "TANUKI_PROCESSES": "2", "TANUKI_PROCESS_ID": str(process)}
        command = [sys.executable, "-c", TWO, str(tmp_path)]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120) for process in started]
    for out, err in said:
        assert f"last {[30, *range(36, 65)]} {30 * 2.0 + 30 * 1.0}" in out, err[-3000:]
    sums = [json.loads(p.read_text()) for p in sorted((tmp_path / "checkpoints/60").glob("sums-*.json"))]
    assert len(sums) == 2 and not set(sums[0]) & set(sums[1])
