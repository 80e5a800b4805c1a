"""Processes that are not alike, cannot write, or do not answer are named before and while a run goes on."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import orbax.checkpoint as ocp
import pytest

from tanuki_jax import config
from tanuki_jax.config.checkpoint_paths import locate, step_directory
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import preflight, run
from tanuki_jax.recipe.workdir import Workdir
from tests.checkpoint.test_checksums import contents
from tests.recipe.test_resume import ROOT
from tests.tiny_recipe import CONFIG, trained

LOADED = lambda: config.load([CONFIG])  # noqa: E731


# --- one process ------------------------------------------------------------------------------------------------------------


def test_a_process_alone_passes_and_leaves_nothing(tmp_path, capfd):
    preflight.check(LOADED(), list(LOADED().stages), Workdir(tmp_path), run.versions())
    assert not list(tmp_path.iterdir()) and "preflight" not in capfd.readouterr().err


def test_a_directory_that_cannot_be_written_to(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="process 0 cannot write to .*gone"):
        preflight.check(LOADED(), list(LOADED().stages), Workdir(tmp_path / "gone"), run.versions())


@pytest.mark.parametrize("fits", [0, 1, 100])
def test_a_disk_without_room_for_a_checkpoint(tmp_path, monkeypatch, capfd, fits):
    one = max(preflight.checkpoint_bytes(LOADED(), name) for name in LOADED().stages)
    free = shutil.disk_usage(tmp_path)._replace(free=fits * one + one // 2)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: free)
    if not fits:
        with pytest.raises(UserError, match="a checkpoint of stage .* make room"):
            preflight.check(LOADED(), list(LOADED().stages), Workdir(tmp_path), run.versions())
    else:
        preflight.check(LOADED(), list(LOADED().stages), Workdir(tmp_path), run.versions())
        assert ("will need" in capfd.readouterr().err) == (fits == 1)


def test_a_checkpoint_is_as_large_as_is_said(tmp_path_factory):
    """Its arrays are, but for a few counters; on disk they are compressed, and Orbax may leave dead bytes."""
    newest = step_directory(*locate(trained(tmp_path_factory.getbasetemp()) / "stages/pretrain"))
    size = preflight.checkpoint_bytes(LOADED(), "pretrain")
    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = jax.tree.leaves([checkpointer.restore(newest / item) for item in ("params", "optimizer")])
    counters = [array.nbytes for array in arrays if array.size <= 4]  # steps, a rate, a key
    assert sum(array.nbytes for array in arrays) - size == sum(counters) < 64
    assert sum(path.stat().st_size for path in contents(newest)) > size / 2


def test_a_device_that_sums_wrongly(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.jnp, "sum", lambda a: a[0])
    with pytest.raises(UserError, match="is broken"):
        preflight.check(LOADED(), list(LOADED().stages), Workdir(tmp_path), run.versions())


# --- two --------------------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time, os
from pathlib import Path
import jax
jax.config.update("jax_cpu_enable_async_dispatch", False)
from tanuki_jax import config, multihost
from tanuki_jax.cli import main, verbs
from tanuki_jax.recipe import preflight, run
from tanuki_jax.recipe.workdir import Workdir
mode, workdir = sys.argv[1], Path(sys.argv[2])
multihost.initialize()
second = jax.process_index() == 1
loaded, versions = config.load([sys.argv[3]]), run.versions()
if second and mode == "versions": versions["jax"] = "0.1.2"
if second and mode == "recipe": loaded = config.load([sys.argv[3], "--config.seed=7"])
if second and mode == "clock":
    real = time.time
    preflight.time.time = lambda: real() + 1000
if second and mode == "disk": workdir = workdir / "other"
workdir.mkdir(exist_ok=True)
if second and mode == "absent": time.sleep(8)

def work(options):
    preflight.check(loaded, list(loaded.stages), Workdir(workdir), versions)
    multihost.assert_equal_across_processes("fingerprint", f"f{jax.process_index() if mode == 'agree' else 0}")
    if mode == "first":
        multihost.on_process_zero(lambda: 1 / 0 if jax.process_index() == 0 else None, "the sums")
    print("passed", multihost.all_gather_text(f"hello {jax.process_index()}", "greeting"), flush=True)

verbs.WORK["run"] = work
sys.exit(main.main(["run", "--config=x", "--workdir=y"]))
"""


def pair(*arguments, more=None):
    """Two processes of a program; their exit codes and what they said on both outputs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for process in range(2):
        env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT), **(more or {})}
        env |= {"TANUKI_COORDINATOR": f"127.0.0.1:{port}", "TANUKI_PROCESSES": "2", "TANUKI_PROCESS_ID": str(process)}
        command = [sys.executable, *map(str, arguments)]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return started


def ended(started, seconds=60):
    said = [process.communicate(timeout=seconds)[0] for process in started]
    return [process.returncode for process in started], said


HOST = re.escape(socket.gethostname())


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("none", None),
        pytest.param("versions", rf"version of jax is 0.1.2 on process 1 \({HOST}\)", marks=pytest.mark.slow),
        pytest.param("recipe", rf"recipe \(fingerprint\) is \w+ on process 1 \({HOST}\)", marks=pytest.mark.slow),
        pytest.param("clock", rf"the clock of process 1 \({HOST}\) is 1000 s ahead", marks=pytest.mark.slow),
        pytest.param("disk", r"process \d \(.*\) does not see in .* what process \d", marks=pytest.mark.slow),
        pytest.param("agree", rf"fingerprint: process 1 \({HOST}\) has f1, process 0 .* has f0", marks=pytest.mark.slow),
    ],
)
def test_two_processes_that_are_not_alike(tmp_path, mode, message):
    codes, said = ended(pair("-c", PROGRAM, mode, tmp_path, CONFIG))
    if message is None:
        assert codes == [0, 0] and all("passed ['hello 0', 'hello 1']" in text for text in said), said
        assert "preflight: 2 processes alike" in said[0] and not list(tmp_path.iterdir())
    else:
        assert codes == [1, 1], said
        assert all(re.search(message, text) and "Traceback" not in text for text in said), said


@pytest.mark.slow
def test_what_fails_on_the_first_process_ends_both(tmp_path):
    codes, said = ended(pair("-c", PROGRAM, "first", tmp_path, CONFIG))
    assert 0 not in codes and "ZeroDivisionError" in said[0]


@pytest.mark.slow
def test_a_process_that_does_not_come_where_all_meet_is_named(tmp_path):
    codes, said = ended(pair("-c", PROGRAM, "absent", tmp_path, CONFIG, more={"TANUKI_WAIT_SECONDS": "3"}))
    assert codes[0] == 77 and codes[1] != 0
    assert re.search(rf"preflight: process 1 \({HOST}\) did not come within 3 s", said[0]), said[0]


# --- while it runs ------------------------------------------------------------------------------------------------------------

STUCK = """
import dataclasses, sys, time
from pathlib import Path
import numpy as np
import jax, jax.numpy as jnp
jax.config.update("jax_cpu_enable_async_dispatch", False)
from tanuki_jax import config, multihost, parallel
from tanuki_jax.train import loop
from tanuki_jax.train.step import State
multihost.initialize()
mesh = parallel.make_mesh(config.Mesh(data=4))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
fresh = jax.jit(lambda: State(jnp.int32(0), {"w": jnp.zeros(4)}, {"m": jnp.zeros(4)}, jax.random.key(0)), out_shardings=whole)
like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), jax.eval_shape(fresh))
mode, second = sys.argv[1], jax.process_index() == 1

@jax.jit
def step(state, batch):
    params = {"w": state.params["w"] + batch.sum()}
    return dataclasses.replace(state, step=state.step + 1, params=params), {"loss": batch.sum(), "grad_norm": jnp.float32(1)}

def batches(first, number):
    for n in range(first, 400):
        print("step", n, flush=True)
        time.sleep(0.01)
        if second and mode == "input" and n == 30: time.sleep(1000)
        if second and mode == "slow": time.sleep(0.1)
        yield jax.make_array_from_callback((4,), rows, lambda index: np.ones(4, np.float32)[index])

options = config.Stage(save_every=100, log_every=1, guard=config.Guard(step_timeout_seconds=3.0))
job = loop.Job("toy", Path(sys.argv[2]), options, 60 if mode == "slow" else 400, 10, 1.0, {"model": {}})
with jax.set_mesh(mesh):
    loop.run_loop(job, like, fresh, step, batches)
"""


@pytest.mark.slow
def test_a_host_that_gets_stuck_is_named_and_all_processes_end(tmp_path):
    began = time.monotonic()
    codes, said = ended(pair("-c", STUCK, "input", tmp_path))
    assert codes == [76, 76], said
    assert f"waits for process 1 ({socket.gethostname()}) in input after step" in said[0], said[0][-3000:]
    assert time.monotonic() - began < 40


@pytest.mark.slow
def test_a_host_that_stops_is_named_and_all_others_end(tmp_path):
    """Its machine is gone, or frozen: it sends no heart beat."""
    started = pair("-c", STUCK, "stop", tmp_path, more={"TANUKI_HEARTBEAT_SECONDS": "10"})
    while "step 20\n" not in started[0].stdout.readline():
        assert started[0].poll() is None
    started[1].send_signal(signal.SIGSTOP)
    said, _ = started[0].communicate(timeout=40)
    assert started[0].returncode not in (0, 1)
    assert re.search(r"unhealthy \(stopped sending heartbeats\):\s*1\b", said) or "waits for process 1" in said, said[-3000:]
    started[1].send_signal(signal.SIGCONT)
    started[1].communicate(timeout=40)
    assert started[1].returncode not in (0, 1)


@pytest.mark.slow
def test_a_host_that_waits_for_its_input_is_named_in_the_metrics_and_told_once(tmp_path):
    from tanuki_jax.train.guard import read_events
    from tests.train.test_loop import rows

    codes, said = ended(pair("-c", STUCK, "slow", tmp_path))
    assert codes == [0, 0], said
    last = rows(tmp_path)[-1]
    assert last["slowest_process"] == 1 and last["slowest_input_wait"] > 0.08
    assert [e["process"] for e in read_events(tmp_path) if e["event"] == "slow_host"] == [1]
