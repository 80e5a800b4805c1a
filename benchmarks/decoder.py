"""The decoder of slots against the scanned one before it, on CPU: process time per token, and whether the texts are the same.

python benchmarks/decoder.py [--checkpoint=DIR] [--length=512] [--rounds=3]

Without a checkpoint, the mixture of configs/nano.py with random weights.  Old and new take turns.  Prints tables in Markdown.
"""

import argparse
import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tanuki_jax import checkpoint, config, model
from tanuki_jax.model import Sampling, slots
from tanuki_jax.model.generate import pad_prompts, power_of_two
from tanuki_jax.model.sampling import row_keys, row_numbers, stack
from tests.model import scanned_decoder

STEPS = 8


def milliseconds(work: Callable[[], int]) -> float:
    """Process time per token of `work`, which returns the number of tokens."""
    began = time.process_time()
    tokens = work()
    return (time.process_time() - began) / tokens * 1e3


def fill(cfg, weights, prompts, length, sampling):
    """Slots of which each holds a prompt, admitted one by one, as a server does."""
    state = slots.empty(cfg, len(prompts), length)
    keys = row_keys(np.int32(0), row_numbers(prompts))
    for slot, prompt in enumerate(prompts):
        tokens, lengths = pad_prompts([prompt], power_of_two(max(64, len(prompt))))
        prompt = slots.Prompts(tokens, lengths, np.array([slot], np.int32), stack([sampling]), keys[slot : slot + 1])
        state = slots.admit(cfg, weights, state, prompt)
    return state


def steps(cfg, weights, state, count):
    """`count` tokens of every slot, [count, B]."""
    ids = []
    for _ in range(0, count, STEPS):
        state, chosen = slots.step(cfg, weights, state, STEPS)
        ids.append(chosen.ids)
    return np.concatenate([np.asarray(part) for part in ids])


def main() -> None:
    """Compares texts, then measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--length", type=int, default=512, help="of the cache, half of it prompt")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.checkpoint:
        loaded = checkpoint.load(options.checkpoint)
        cfg, params = loaded.cfg, loaded.params
    else:
        cfg = config.model_config(config.load(["--config=configs/nano.py"]), "continued")
        params = model.init(cfg, jax.random.key(0))
    if "lora" in params:
        params = model.lora.merge(params)
    weights, rng, half = slots.unstack(cfg, params), np.random.default_rng(0), options.length // 2
    # The old one took the grouped product of many tokens for few ones, too.
    old_cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, expert_impl="blocked"))

    prompts = [rng.integers(5, cfg.vocab_size, length).tolist() for length in rng.integers(8, 120, 64)]
    before = scanned_decoder.generate(old_cfg, params, prompts, 64)
    print(f"{platform.machine()}, {cfg.n_layers} layers, D {cfg.d_model}, E {cfg.n_experts}, V {cfg.vocab_size}, float32\n")
    print("| busy slots | cache | greedy texts of 64 prompts that are the same |\n|---|---|---|")
    for count in (1, 8, 32, 64):
        for length in (256, 1024):
            found = []
            for start in range(0, 64, count):
                state = fill(cfg, weights, prompts[start : start + count], length, Sampling())
                found += steps(cfg, weights, state, 64).T.tolist()
            same = sum(a == b for a, b in zip(found, before, strict=True))
            print(f"| {count} | {length} | {same} |", flush=True)

    prompts = [rng.integers(5, cfg.vocab_size, half).tolist() for _ in range(64)]

    def old() -> int:
        return len(scanned_decoder.generate(old_cfg, params, prompts[:1], half)[0])

    def new(count: int, sampling: Sampling) -> Callable[[], int]:
        def work() -> int:
            state = fill(cfg, weights, prompts[:count], options.length, sampling)
            return steps(cfg, weights, state, half).size

        return work

    sampled = Sampling(temperature=0.8, top_p=0.95)
    ways = {"scanned, 1 row": old}
    ways |= {f"slots, {n} busy": new(n, Sampling()) for n in (1, 8, 32, 64)} | {"slots, 64 busy, top-p 0.95": new(64, sampled)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):  # the first one compiles
        for name, work in ways.items():
            taken = milliseconds(work)
            times[name] += [taken] if number else []
    print(f"\nCache of {options.length} tokens, half of it prompt, prefill included; median of {options.rounds} rounds.\n")
    print("| decoder | CPU ms per new token | gain |\n|---|---|---|")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {medians['scanned, 1 row'] / median:.1f} |")


if __name__ == "__main__":
    main()
