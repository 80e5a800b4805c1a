"""Upcycling a dense checkpoint of a billion parameters to eight experts, from file to file: time, memory, kills; beside `cp`.

python benchmarks/upcycle.py --workdir=runs/upcycle [--strategies=copy,noise] [--layers=14] [--kills=2]

Makes a Hugging Face Llama directory of random bfloat16 weights (V 65,024, D 2048, F 8192), and needs 42 GB of disk.  `cp`
copies what it has copied before, which lies in the page cache as it likes it: of files that came past the page cache it
copies half as much in a second.  The dry run for 47B parameters reads the headers of a directory of sparse files.
"""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from report import begin
from watched import ROOT, watched

V = 65_024
ONE = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64)
EIGHT = dict(hidden_size=4096, intermediate_size=14_336, num_attention_heads=32, num_key_value_heads=8, head_dim=128)


def main() -> None:
    """Runs all parts and prints a report."""
    options = begin("Upcycling from file to file", __doc__, strategies="copy,noise,drop", layers=14, kills=2)
    dense, output = options.workdir / "dense", options.workdir / "output"
    if not dense.is_dir():
        made(dense, ONE, options.layers)
    print("| strategy | seconds | GB written | MB/s | cp and sync, MB/s | ratio | peak memory, GiB |")
    print("|---|---|---|---|---|---|---|")
    said = ""
    for strategy in options.strategies.split(","):
        shutil.rmtree(output, ignore_errors=True)
        os.sync()
        seconds, memory, said = watched(tanuki(dense, output, f"--strategy={strategy}"))
        size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
        rate, peer = size / seconds / 1e6, size / copied(output) / 1e6
        print(f"| {strategy} | {seconds:.0f} | {size / 1e9:.2f} | {rate:.0f} | {peer:.0f} | {rate / peer:.2f} | {memory:.2f} |")
        identity = next(line for line in said.splitlines() if line.startswith("identity"))
        print(f"\n{strategy}: {identity}\n", flush=True)
    for _ in range(options.kills):
        shutil.rmtree(output, ignore_errors=True)
        process = subprocess.Popen(tanuki(dense, output), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        moment = random.uniform(4, 15)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed after {moment:.1f} s: an output is there: {output.exists()}", flush=True)
        for left in options.workdir.glob(".output.*"):
            shutil.rmtree(left)
    shutil.rmtree(options.workdir / "eight", ignore_errors=True)
    sparse(options.workdir / "eight", EIGHT, 32)
    print("\nDry run, 8B to 8x8B:\n\n```")
    print(watched(tanuki(options.workdir / "eight", output, "--dry_run"))[2] + "```")


def tanuki(dense: Path, output: Path, *flags: str) -> list[str]:
    """The command line in a process of its own."""
    paths = [f"--checkpoint={dense.absolute()}", f"--output={output.absolute()}"]
    return [sys.executable, "-m", "tanuki_jax.cli", "upcycle", *paths, *flags]


def copied(output: Path) -> float:
    """Seconds until a copy of a copy is on the disk."""
    first, second = output.with_name("first"), output.with_name("second")
    try:
        subprocess.run(["cp", "-r", output, first], check=True)
        os.sync()
        began = time.monotonic()
        subprocess.run(["cp", "-r", first, second], check=True)
        os.sync()
        return time.monotonic() - began
    finally:
        for path in (first, second):
            shutil.rmtree(path, ignore_errors=True)


def tensors(shape: dict[str, int], layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama model's tensors."""
    D, F, H = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    Q, KV = shape["num_attention_heads"] * H, shape["num_key_value_heads"] * H
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.self_attn.{n}_proj.weight": (m, D) for n, m in (("q", Q), ("k", KV), ("v", KV))}
        found[f"{layer}.self_attn.o_proj.weight"] = (D, Q)
        found |= {f"{layer}.mlp.{n}_proj.weight": s for n, s in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F)))}
        found |= {f"{layer}.{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


def described(path: Path, shape: dict[str, int], layers: int) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    """Writes config.json and the index; returns the files with their tensors, two layers in each."""
    path.mkdir(parents=True)
    config = dict(model_type="llama", vocab_size=V, num_hidden_layers=layers, rms_norm_eps=1e-5, hidden_act="silu", **shape)
    (path / "config.json").write_text(json.dumps(config))
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in tensors(shape, layers).items():
        number = int(name.split(".")[2]) // 2 + 1 if ".layers." in name else 0
        groups.setdefault(f"model-{number:05d}.safetensors", {})[name] = size
    index = {name: file for file, names in groups.items() for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return list(groups.items())


def made(path: Path, shape: dict[str, int], layers: int) -> None:
    """A directory of random weights."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    for file, names in described(path, shape, layers):
        drawn = {
            name: (rng.standard_normal(size, np.float32) * 0.02).astype(ml_dtypes.bfloat16) for name, size in names.items()
        }
        save_file(drawn, path / file)


def sparse(path: Path, shape: dict[str, int], layers: int) -> None:
    """A directory of zeros that takes no disk."""
    for file, names in described(path, shape, layers):
        header, at = {}, 0
        for name, size in names.items():
            end = at + 2 * int(np.prod(size))
            header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        with (path / file).open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + at)


if __name__ == "__main__":
    main()
