"""What a save costs while a model of 30 million parameters trains, and how long a run takes to end when it is told to.

python benchmarks/saving.py --workdir=runs/saving [--saves=6] [--notices=3] [--every=20]

One run; a checkpoint is due every 20 steps and every second one is left out, so that stretches with and without a save lie
side by side.  Then runs are told to stop by SIGTERM, and the time to their end is taken; what they saved is read back.  It is
its own config file.
"""

import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tanuki_jax import checkpoint, config
from tanuki_jax.recipe.run import run_recipe
from tanuki_jax.train.metrics import read_metrics

STAGE = "pretrain"


def get_config() -> Any:
    """Dense, 31 million parameters: 376 MB of parameters and moments in float32."""
    c = config.recipe(name="saving", seed=0, tensorboard=False)
    c.model.update(
        dict(vocab_size=8192, n_layers=8, d_model=512, d_ff=1376, n_heads=8, n_kv_heads=4, head_dim=64, init_std=0.02)
    )
    c.data = dict(ja="rules:documents_ja")
    c.rules.update(dict(documents=2000))
    c.tokenizer.update(dict(vocab_size=1200, character_coverage=1.0, boundary="none"))
    c.stages[STAGE] = config.stage(
        "pretrain", mixture=dict(ja=(1.0,)), seq_len=256, batch_size=4, steps=40, save_every=20, log_every=1
    )
    return c


def stretches(workdir: Path, saves: int, every: int) -> list[tuple[float, float]]:
    """Seconds of stretches of `every` steps: (after a save, the next one without)."""
    c = get_config()
    c.stages[STAGE].steps, c.stages[STAGE].save_every = (2 * saves + 1) * every + 1, every
    save = checkpoint.Checkpoints.save

    def every_second(self: Any, step: int, *rest: Any) -> None:
        if step // every % 2:
            save(self, step, *rest)

    with mock.patch.object(checkpoint.Checkpoints, "save", every_second):
        run_recipe(config.resolve(c), workdir)
    seconds = [row["seconds"] for row in read_metrics(workdir / "stages" / STAGE)]
    took = np.diff(seconds[every - 1 :: every])  # a step's row is written before its save
    return [(float(a), float(b)) for a, b in zip(took[::2], took[1::2], strict=False)]


def told_to_stop(workdir: Path, after: int) -> tuple[float, int, int]:
    """Seconds from SIGTERM to the end of a run, its exit code, and the step that can be read back."""
    command = [sys.executable, "-m", "tanuki_jax.cli", "run", f"--config={__file__}", f"--workdir={workdir}"]
    process = subprocess.Popen([*command, f"--config.stages.{STAGE}.steps=1000"], stderr=subprocess.DEVNULL)
    home = workdir / "stages" / STAGE
    while len(read_metrics(home)) < after:
        assert process.poll() is None, "the run failed"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code = process.wait()
    took = time.monotonic() - began
    _, step = checkpoint.locate(home)
    checkpoint.load(home)  # compares its check sums
    return took, code, step


def main() -> None:
    """Runs all and prints a report."""
    from report import begin  # this file is a config as well, which is read from elsewhere

    options = begin("What a save costs", __doc__, saves=6, notices=3, every=20)
    found = stretches(options.workdir / "run", options.saves, options.every)
    print(f"| {options.every} steps after a save, s | without, s | ratio |\n|---|---|---|")
    for one, none in found:
        print(f"| {one:.2f} | {none:.2f} | {one / none:.3f} |")
    cost = sum(one for one, _ in found) / sum(none for _, none in found) - 1
    middle = statistics.median(one / none for one, none in found) - 1
    print(
        f"\nA save every {options.every} steps costs {cost:+.1%} of the time (median of the pairs: {middle:+.1%}).\n",
        flush=True,
    )
    print("| SIGTERM to the end, s | exit code | last whole step |\n|---|---|---|")
    ends = [told_to_stop(options.workdir / f"told-{n}", 3 + 4 * n) for n in range(options.notices)]
    for took, code, step in ends:
        print(f"| {took:.1f} | {code} | {step} |", flush=True)
    wrong = ["a save costs more than 5 %"] * (cost > 0.05)
    wrong += ["more than 10 s to a checkpoint"] * any(took > 10 or code != 75 for took, code, _ in ends)
    print("\nResult: " + ("; ".join(wrong) or "a save costs at most 5 %, a run ends within 10 s"))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
