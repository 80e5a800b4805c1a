"""Parameters in bfloat16 against float32: a model of 30 million from the same weights on the same batches, at three rates.

python benchmarks/bfloat16_params.py --workdir=runs/bfloat16 [--steps=500] [--width=512] [--layers=9] [--batch_size=16]

It is its own config file.  The same command goes on with what was interrupted.  Prints a report in Markdown.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from report import begin

from tanuki_jax import checkpoint, config, model
from tanuki_jax.recipe.run import run_recipe
from tanuki_jax.train.metrics import read_metrics

RATES = {"fast": 1e-3, "middle": 1e-4, "slow": 1e-5}
DTYPES = ("float32", "bfloat16")
LAST = 50  # steps whose mean loss is compared


def get_config(dtype: str = "float32", steps: int = 500, width: int = 512, layers: int = 9, batch_size: int = 16) -> Any:
    """A stage for each rate, from random weights that are the same for both dtypes but for their rounding."""
    c = config.recipe(name=f"parameters in {dtype}", seed=0, tensorboard=False)
    heads, sizes = width // 64, dict(vocab_size=1280, n_layers=layers, d_model=width, d_ff=43 * width // 16, head_dim=64)
    c.model.update(dict(param_dtype=dtype, n_heads=heads, n_kv_heads=heads, init_std=0.02, **sizes))
    c.mesh.update(dict(data=1, fsdp=-1))
    c.data = dict(ja="rules:documents_ja", en="rules:documents_en")
    c.rules.update(dict(documents=4000))
    c.tokenizer.update(dict(vocab_size=1280, character_coverage=1.0, boundary="none", max_bytes=2_000_000))
    c.validation.update(dict(tokens=4096, every_steps=10_000))
    for name, rate in RATES.items():
        c.stages[name] = config.stage(
            "pretrain",
            mixture=dict(ja=(0.5,), en=(0.5,)),
            seq_len=32,
            batch_size=batch_size,
            steps=steps,
            save_every=100,
            keep_latest=1,
            log_every=1,
            optimizer=dict(learning_rate=rate, schedule="constant", warmup_steps=20),
        )
    return c


def losses(home: Path) -> tuple[float, float]:
    """Of a finished stage the mean loss of its last steps and the validation loss, the mean of the sources."""
    rows = read_metrics(home)
    return (
        float(np.mean([row["loss"] for row in rows[-LAST:]])),
        float(np.mean([rows[-1][f"validation/{name}/loss"] for name in ("ja", "en")])),
    )


def moved(home: Path) -> float:
    """How far the scales of the norms are from 1, where they began; the root of the mean square."""
    params = checkpoint.load(home).params
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    norms = [np.asarray(w).ravel() for path, w in flat if model.is_vector(path[-1].key)]
    return float(np.sqrt(np.mean((np.concatenate(norms) - 1) ** 2)))


def main() -> None:
    """Runs all and prints a report."""
    options = begin("Parameters in bfloat16", __doc__, steps=500, width=512, layers=9, batch_size=16)
    shape = (options.steps, options.width, options.layers, options.batch_size)
    for dtype in DTYPES:
        run_recipe(config.resolve(get_config(dtype, *shape)), options.workdir / dtype)
    total, _ = model.count_parameters(config.model_config(config.resolve(get_config("float32", *shape)), "fast"))
    print(f"{total:,} parameters, {options.steps} steps; loss of the last {LAST} steps, of held-out text, way of the norms.\n")
    print("| rate | float32 | bfloat16 | | held out, float32 | bfloat16 | | norms, float32 | bfloat16 |")
    print("|---|---|---|---|---|---|---|---|---|")
    wrong = []
    for name, rate in RATES.items():
        homes = [options.workdir / dtype / "stages" / name for dtype in DTYPES]
        (loss, held), (low, held_low) = map(losses, homes)
        way, way_low = map(moved, homes)
        apart, held_apart = low / loss - 1, held_low / held - 1
        print(
            f"| {rate:g} | {loss:.4f} | {low:.4f} | {apart:+.2%} | {held:.4f} | {held_low:.4f} | {held_apart:+.2%} | "
            f"{way:.2e} | {way_low:.2e} |",
            flush=True,
        )
        wrong += [f"rate {rate:g}: not within 1 %"] * (max(abs(apart), abs(held_apart)) > 0.01)
        wrong += [f"rate {rate:g}: the norms do not move"] * (way_low < 0.5 * way)
    print("\nResult: " + ("; ".join(wrong) if wrong else "all within 1 % of float32, the norms move as far"))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
