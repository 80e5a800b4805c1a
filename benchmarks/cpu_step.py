"""Train steps of the nano model on CPU, dense and mixture: with malloc on huge pages, as `tanuki` starts itself, and without.

python benchmarks/cpu_step.py [--steps=60] [--rounds=3]

The two ways take turns, so that a noisy machine is unfair to neither.  Prints a table in Markdown.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

from train_step import TUNABLE, random_batch


def measure(stage: str, steps: int) -> dict[str, float]:
    """Tokens a second of a stage's train step after compilation, and the process's peak memory in GB."""
    import jax

    from tanuki_jax import config, model
    from tanuki_jax.train import losses
    from tanuki_jax.train.optimizer import make_optimizer, make_schedule
    from tanuki_jax.train.step import init_state, make_train_step, make_update

    recipe = config.load(["--config=configs/nano.py"])
    this, cfg = recipe.stages[stage], config.model_config(recipe, stage)
    batch = jax.device_put(random_batch(cfg.vocab_size, this.batch_size, this.seq_len))
    tokens = batch["tokens"]
    optimizer = make_optimizer(this.optimizer)
    rate = make_schedule(this.optimizer, 1000)
    step = make_train_step(losses.make_loss(this.kind, cfg, this.loss), make_update(optimizer, rate, this.optimizer.clip_norm))
    state = init_state(model.init(cfg, jax.random.key(0)), optimizer, jax.random.key(0))
    for _ in range(5):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    began = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    rate_seen = steps * tokens.size / (time.perf_counter() - began)
    return {"tokens_per_second": rate_seen, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    """Runs the measurements, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(measure(options.stage, options.steps)))
        return
    import jax

    cpu = platform.processor() or platform.machine()
    print(f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}\n")
    print("| stage | huge pages, tokens/s | without, tokens/s | ratio | peak memory |\n|---|---|---|---|---|")
    for stage in ("pretrain", "continued"):
        found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for _ in range(options.rounds):
            for huge in (True, False):
                env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
                if huge:
                    env["GLIBC_TUNABLES"] = TUNABLE
                command = [sys.executable, __file__, f"--stage={stage}", f"--steps={options.steps}"]
                found[huge].append(
                    json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
                )
        with_, without = (statistics.median(f["tokens_per_second"] for f in found[h]) for h in (True, False))
        peak = max(f["peak_gb"] for f in found[True])
        print(f"| {stage} | {with_:,.0f} | {without:,.0f} | {with_ / without:.2f} | {peak:.2f} GB |")


if __name__ == "__main__":
    main()
