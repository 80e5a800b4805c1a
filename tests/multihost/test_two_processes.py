import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import config
from tanuki_jax.train import losses
from tanuki_jax.train.step import gradients
from tests.multihost.two_processes import CFG, KINDS
from tests.tiny import init, problem

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output, port = tmp_path_factory.mktemp("two") / "result.json", free_port()
    processes = []
    for i in range(2):
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4"),
            "TANUKI_COORDINATOR": f"127.0.0.1:{port}",
            "TANUKI_PROCESSES": "2",
            "TANUKI_PROCESS_ID": str(i),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, str(ROOT / "tests/multihost/two_processes.py"), str(output)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(outputs)
    return json.loads(output.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_of_four_devices_equal_one_device(found, kind):
    batch = problem(kind, CFG)
    loss = losses.make_loss(kind, CFG, config.Loss(z_loss=1e-3, router_z_loss=1e-3))
    params = init(CFG, jax.random.key(0))
    grads, metrics = jax.jit(lambda p, b: gradients(loss, p, b))(params, {n: jnp.asarray(v) for n, v in batch.items()})
    result = found[kind]
    np.testing.assert_allclose(result["loss"], metrics["loss"], rtol=1e-5)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        theirs = np.array(result["grads"][jax.tree_util.keystr(path)]).reshape(g.shape)
        assert np.abs(theirs - g).max() <= 1e-5 * np.abs(g).max(), path
