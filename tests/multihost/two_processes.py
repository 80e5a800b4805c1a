"""Run by test_two_processes.py in two processes: loss and gradients of a batch that both share, on 2 x 4 devices."""

import json
import sys
from pathlib import Path

import jax

from tanuki_jax import checkpoint, config, model, multihost, parallel
from tanuki_jax.data import loader
from tanuki_jax.train import losses
from tanuki_jax.train.step import gradients
from tests.tiny import problem, small

CFG = small(n_experts=4, first_dense=1)  # a dense layer and a mixture
KINDS = ("sft", "dpo")  # of sft, the loss weights differ much between the processes; else it is pretraining


def main(output: str) -> None:
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    multihost.initialize()
    assert jax.process_count() == 2 and jax.device_count() == 8
    mesh = parallel.make_mesh(config.Mesh(fsdp=2, expert=2, tensor=2))
    result = {}
    shardings = checkpoint.parameter_shardings(CFG, mesh)
    params = jax.jit(model.init, static_argnums=0, out_shardings=shardings)(CFG, jax.random.key(0))
    for kind in KINDS:
        whole = problem(kind, CFG)
        rows = slice(4 * jax.process_index(), 4 * jax.process_index() + 4)
        with jax.set_mesh(mesh):
            batch = loader.on_devices({n: v[rows] for n, v in whole.items()}, mesh, 8, rows.start)
            loss = losses.make_loss(kind, CFG, config.Loss(z_loss=1e-3, router_z_loss=1e-3))
            grads, metrics = jax.jit(lambda p, b, loss=loss: gradients(loss, p, b))(params, batch)
        leaves = jax.tree_util.tree_leaves_with_path(grads)
        result[kind] = {
            "loss": float(metrics["loss"]),
            "grads": {jax.tree_util.keystr(path): multihost.to_host(g).ravel().tolist() for path, g in leaves},
        }
    if jax.process_index() == 0:
        Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
