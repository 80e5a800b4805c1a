"""Steps that go wrong, put into the training of a small language model; and long runs in which nothing goes wrong.

python benchmarks/guard.py --workdir=runs/guard [--steps=600] [--seeds=5] [--quiet_steps=2000]

It is its own config file.  Every run is a stage of a recipe with the guard's default settings; a loss or a gradient is spoilt
inside the loss function, a batch before it reaches the devices.  Prints a report in Markdown.
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import begin

from tanuki_jax import config
from tanuki_jax.recipe import program, stage
from tanuki_jax.recipe.run import run_recipe
from tanuki_jax.train.guard import read_events
from tanuki_jax.train.metrics import read_metrics

STAGE, AT = "pretrain", 300  # the first batch that is spoilt
NAN, TIMES_TEN, NOISE = 1.0, 2.0, 3.0  # how
INJECTIONS = {
    "nothing": {},
    "NaN gradient, one step": {AT: NAN},
    "NaN gradient, eight steps": dict.fromkeys(range(AT, AT + 8), NAN),
    "10 x loss, one step": {AT: TIMES_TEN},
    "10 x loss, eight steps": dict.fromkeys(range(AT, AT + 8), TIMES_TEN),
    "batch of random tokens, one step": {AT: NOISE},
    "batches of random tokens, eight steps": dict.fromkeys(range(AT, AT + 8), NOISE),
}


def get_config() -> Any:
    """A dense model of some 200,000 parameters on rule-made text."""
    c = config.recipe(name="guard", seed=0, tensorboard=False)
    c.model.update(dict(vocab_size=768, n_layers=2, d_model=64, d_ff=176, n_heads=2, n_kv_heads=2, head_dim=32, init_std=0.04))
    c.data = dict(ja="rules:documents_ja", en="rules:documents_en")
    c.rules.update(dict(documents=4000))
    c.tokenizer.update(dict(vocab_size=768, character_coverage=1.0, boundary="none"))
    c.validation.update(dict(tokens=8000, every_steps=10_000))
    c.stages[STAGE] = config.stage(
        "pretrain",
        mixture=dict(ja=(0.5,), en=(0.5,)),
        seq_len=64,
        batch_size=16,
        steps=600,
        save_every=50,
        log_every=1,
        optimizer=dict(learning_rate=2e-3, learning_rate_floor=1e-4, warmup_ratio=0.05),
    )
    return c


@jax.custom_vjp
def _gradient_times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x; its gradient is multiplied."""
    return x


_gradient_times.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, None))


@contextlib.contextmanager
def spoilt(how: dict[int, float], vocabulary: int) -> Iterator[None]:
    """While inside, the batches with these numbers go wrong."""
    make_loss, batches = program.losses.make_loss, stage.loader.batches

    def make(*arguments: Any, **options: Any) -> Any:
        inner = make_loss(*arguments, **options)

        def loss_fn(params: Any, batch: Any, *rest: Any, **more: Any) -> Any:
            total, weight, metrics = inner(params, {k: v for k, v in batch.items() if k != "spoilt"}, *rest, **more)
            if "spoilt" not in batch:  # of the validation
                return total, weight, metrics
            kind = batch["spoilt"].max()
            times = jnp.where(kind == TIMES_TEN, 10.0, 1.0)
            total = _gradient_times(total, jnp.where(kind == NAN, jnp.nan, 1.0)) * times
            return total, weight, metrics | {"loss": (metrics["loss"][0] * times, metrics["loss"][1])}

        return loss_fn

    def feed(rows: Any, mesh: Any, batch_size: int, first: int, steps: int, number: Any) -> Iterator[Any]:
        for step, batch in zip(range(first, steps), batches(rows, mesh, batch_size, first, steps, number), strict=False):
            kind, shape = how.get(number(step), 0.0), batch["tokens"].shape
            more = {"spoilt": np.full(batch_size, kind, np.float32)}
            if kind == NOISE:
                draw = np.random.default_rng(number(step))
                more |= {name: draw.integers(0, vocabulary, shape, np.int32) for name in ("tokens", "targets")}
            yield {**batch, **stage.loader.on_devices(more, mesh, batch_size)}

    program.losses.make_loss, stage.loader.batches = make, feed
    try:
        yield
    finally:
        program.losses.make_loss, stage.loader.batches = make_loss, batches


def run(workdir: Path, data: Path, how: dict[int, float], steps: int, seed: int) -> tuple[float, list[dict[str, Any]]]:
    """Runs the stage; its last validation loss (mean of the sources) and its events."""
    c = get_config()
    c.seed, c.stages[STAGE].steps = seed, steps
    if data.is_dir():
        shutil.copytree(data, workdir / "data", dirs_exist_ok=True)
    with spoilt(how, c.model.vocab_size):
        run_recipe(config.resolve(c), workdir)
    last, home = read_metrics(workdir / "stages" / STAGE)[-1], workdir / "stages" / STAGE
    return float(np.mean([last[f"validation/{name}/loss"] for name in ("ja", "en")])), read_events(home)


def main() -> None:
    """Runs all and prints a report."""
    options = begin("Steps that go wrong", __doc__, steps=600, seeds=5, quiet_steps=2000)
    print("| put in | told, and how many steps after | last validation loss | against the clean run |\n|---|---|---|---|")
    clean, wrong = 0.0, []
    for number, (name, how) in enumerate(INJECTIONS.items()):
        loss, events = run(options.workdir / f"run-{number}", options.workdir / "run-0" / "data", how, options.steps, 0)
        clean = clean or loss
        first: dict[str, int] = {}
        for event in events:
            first.setdefault(event["event"], event["step"] - AT)
        told = ", ".join(f"{event.replace('_', ' ')} {after}" for event, after in first.items()) or "nothing"
        print(f"| {name} | {told} | {loss:.4f} | {loss / clean - 1:+.2%} |", flush=True)
        limit = 1 if NAN in how.values() else 5
        if how and not any(1 <= after <= limit for after in first.values()):
            wrong.append(f"{name}: not told within {limit} steps")
        wrong += [f"{name}: not within 1 % of the clean run"] * (abs(loss / clean - 1) > 0.01)
        wrong += [f"{name}: told, and nothing was put in"] * bool(events and not how)
    alarms = []
    for seed in range(options.seeds):
        _, events = run(options.workdir / f"quiet-{seed}", options.workdir / "none", {}, options.quiet_steps, seed)
        alarms.append(len(events))
    print(f"\nEvents in {options.quiet_steps:,} steps in which nothing was put in, by seed: {', '.join(map(str, alarms))}.\n")
    wrong += ["false alarms"] * any(alarms)
    print("Result: " + ("; ".join(wrong) if wrong else "all told in time, all within 1 % of the clean run, no false alarm"))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
