"""Train steps as they run, on whatever is in this machine; on a CPU side by side with MaxText and transformers + torch.

python benchmarks/train_step.py --model=dense --torch=/path/to/python --maxtext=DIR
python benchmarks/train_step.py --model=mixture --preset=1b --sides=tanuki_jax

Presets: `small` is a Llama of 31.6 million parameters (D 512, L 8, F 1792, N 8, K 2, V 8192), 8 rows of 512 tokens, float32;
`1b` is one of a billion (D 2048, L 18, F 6144, N 16, K 4), 8 rows of 4096, bfloat16, for an accelerator.  The mixture has 8
experts of the same F, top-2.  Adam, float32 parameters, all tokens labelled; no side recomputes anything on `small`.

The sides take turns, each in a process of its own, so that a noisy machine is unfair to none; the median counts.
`--torch` is a Python that has torch and transformers, `--maxtext` the directory of an environment for MaxText (made if it is
not there).  Prints a table in Markdown.  `--rows`, `--remat` and `--moment_dtype` change the
preset; `--profile` says which of our kernels took the time (GPU).
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TUNABLE = "glibc.malloc.hugetlb=1"  # as `tanuki` starts itself


@dataclass(frozen=True)
class Preset:
    """The sizes of a model and its batch."""

    d_model: int
    n_layers: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    rows: int
    seq_len: int
    dtype: str
    remat: str
    moment_dtype: str = "float32"


PRESETS = {
    "small": Preset(512, 8, 1792, 8, 2, 8192, 8, 512, "float32", "none"),
    "1b": Preset(2048, 18, 6144, 16, 4, 32768, 8, 4096, "bfloat16", "dots"),
}
CHANGES = {"rows": int, "remat": str, "moment_dtype": str}  # options that change a preset
EXPERTS, TOP_K = 8, 2


# --- the sides; each returns seconds of the steps after the first ones ---------------------------------------------------


def random_batch(vocab_size: int, rows: int, seq_len: int) -> dict:
    """A pretraining batch of random tokens, one segment a row, all labelled: arrays [rows, seq_len]."""
    import numpy as np

    shape = (rows, seq_len)
    tokens = np.random.default_rng(0).integers(1, vocab_size, shape).astype(np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape),
    }


def tanuki_jax(size: Preset, mixture: bool, steps: int, profile: bool = False) -> dict:
    """Ours, in this process."""
    import jax

    from tanuki_jax import config, model, parallel
    from tanuki_jax.train import losses
    from tanuki_jax.train.metrics import PEAK_FLOPS
    from tanuki_jax.train.optimizer import make_optimizer, make_schedule
    from tanuki_jax.train.step import init_state, make_train_step, make_update

    sizes = {k: v for k, v in asdict(size).items() if k not in ("rows", "seq_len", "moment_dtype")}
    experts = dict(n_experts=EXPERTS, top_k=TOP_K, normalized_gate=False) if mixture else dict(n_experts=0)
    compute = config.Compute(**{key: sizes.pop(key) for key in ("dtype", "remat") if key in sizes})
    cfg = config.ModelConfig(**sizes, **experts, head_dim=size.d_model // size.n_heads, compute=compute)
    batch = random_batch(cfg.vocab_size, size.rows, size.seq_len)
    tokens = batch["tokens"]
    optimizer = config.Optimizer(learning_rate=1e-4, clip_norm=1.0, moment_dtype=size.moment_dtype)
    made = make_optimizer(optimizer)
    loss = config.Loss(router_aux_loss=0.02) if mixture else config.Loss()
    mesh = parallel.make_mesh(config.Mesh())
    with jax.set_mesh(mesh):
        step = make_train_step(losses.make_loss("pretrain", cfg, loss), make_update(made, make_schedule(optimizer, 1000), 1.0))
        batch = jax.device_put(batch, parallel.sharding(mesh, "B"))
        state = init_state(model.init(cfg, jax.random.key(0)), made, jax.random.key(0))
        for _ in range(3):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds = (time.perf_counter() - began) / steps
        if profile:
            print_kernels(lambda: jax.block_until_ready(step(state, batch)[1]))
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    flops = model.flops_per_token(cfg, size.seq_len) * tokens.size / seconds
    peak = PEAK_FLOPS.get(device.device_kind)
    return {
        "tokens_per_second": tokens.size / seconds,
        "peak_gb": memory / 1e9,
        "flops_per_second": flops,
        "mfu": flops / peak if peak else None,
        "device": device.device_kind,
        "parameters": model.count_parameters(cfg)[0],
        "loss": float(metrics["loss"]),
        "load_max": float(metrics["moe/load"].max()) * EXPERTS if mixture else None,
    }


def print_kernels(step: Callable[[], object], most: int = 30) -> None:
    """Where the time of one step goes, by kernel, to stderr: milliseconds, launches, name."""
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            step()
        (trace,) = Path(directory).rglob("*.xplane.pb")
        planes = [p for p in jax.profiler.ProfileData.from_file(str(trace)).planes if p.name.startswith("/device:GPU")]
    spent: dict[str, list[float]] = {}
    for line in (line for plane in planes for line in plane.lines if line.name.startswith("Stream")):
        for event in line.events:
            spent.setdefault(event.name, []).append(event.duration_ns / 1e6)
    print(f"{sum(map(sum, spent.values())):.1f} ms in kernels", file=sys.stderr)
    for name, each in sorted(spent.items(), key=lambda item: -sum(item[1]))[:most]:
        print(f"{sum(each):9.2f} {len(each):5d}  {name[:110]}", file=sys.stderr)


def torch(size: Preset, mixture: bool, steps: int) -> dict:
    """transformers + torch, under autocast on a GPU; runs in the Python that has them, which need not have JAX."""
    import torch as t
    import transformers

    sizes = {
        "hidden_size": size.d_model,
        "intermediate_size": size.d_ff,
        "num_hidden_layers": size.n_layers,
        "num_attention_heads": size.n_heads,
        "num_key_value_heads": size.n_kv_heads,
        "vocab_size": size.vocab_size,
        "max_position_embeddings": size.seq_len,
        "use_cache": False,
    }
    if mixture:
        made = transformers.MixtralConfig(
            **sizes, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, sliding_window=None, output_router_logits=True
        )
        net = transformers.MixtralForCausalLM(made)
    else:
        net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
    gpu = t.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    net.train().to(device)
    tokens = t.randint(1, size.vocab_size, (size.rows, size.seq_len), device=device)
    optimizer = t.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=gpu)

    def step() -> float:
        optimizer.zero_grad()
        with t.autocast(device, t.bfloat16, enabled=size.dtype == "bfloat16"):
            loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        t.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    for _ in range(2):
        step()
    began = time.perf_counter()
    for _ in range(steps):
        loss = step()
    seconds = (time.perf_counter() - began) / steps
    return {
        "tokens_per_second": tokens.numel() / seconds,
        "peak_gb": (t.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9,
        "device": f"torch {t.__version__}, transformers {transformers.__version__}",
        "parameters": sum(p.numel() for p in net.parameters()),
        "loss": loss,
    }


# How MaxText may compute a mixture on a CPU; the fastest counts.
PATHS = {
    "ragged_dot": ["sparse_matmul=true", "megablox=false"],
    "capacity 1.25, drops tokens": ["sparse_matmul=false", "capacity_factor=1.25"],
    "every expert": ["sparse_matmul=false", "capacity_factor=-1"],
}


def maxtext(python: Path, size: Preset, path: str, steps: int) -> dict:
    """MaxText's own loop on synthetic data, in its environment; its log says how fast it was."""
    options = [
        f"base_emb_dim={size.d_model}",
        f"base_mlp_dim={size.d_ff}",
        f"base_num_decoder_layers={size.n_layers}",
        f"base_num_query_heads={size.n_heads}",
        f"base_num_kv_heads={size.n_kv_heads}",
        f"head_dim={size.d_model // size.n_heads}",
        f"vocab_size={size.vocab_size}",
        f"per_device_batch_size={size.rows}",
        f"max_target_length={size.seq_len}",
        f"dtype={size.dtype}",
        "decoder_block=llama2",
        "mlp_activations=['silu','linear']",
        "logits_via_embedding=false",
        "enable_checkpointing=false",
        "dataset_type=synthetic",
        "attention=dot_product",
        "remat_policy=none",
        "hardware=cpu",
        "skip_jax_distributed_system=true",
        "run_name=x",
        "log_config=false",
        f"steps={steps + 3}",
        f"base_output_directory={python.parent.parent / 'output'}",
    ]
    if path:
        options.remove("decoder_block=llama2")
        options += ["decoder_block=mixtral", f"num_experts={EXPERTS}", f"num_experts_per_tok={TOP_K}", *PATHS[path]]
        options.append(f"base_moe_mlp_dim={size.d_ff}")
    command = [str(python), "-P", "-m", "maxtext.trainers.pre_train.train", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    log = done.stdout + done.stderr
    found = [float(x) for x in re.findall(r"Tokens/s/device: ([\d.]+)", log)]
    if len(found) < 4:
        print(log[-2000:], file=sys.stderr)
        raise SystemExit(f"MaxText did not run: {' '.join(command)}")
    losses = re.findall(r" loss: ([\d.]+)", log)
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e9
    return {
        "tokens_per_second": statistics.harmonic_mean(found[3:]),
        "peak_gb": peak,
        "loss": float(losses[-1]) if losses else float("nan"),
        "device": "",
    }


SIDES = {"tanuki_jax": tanuki_jax, "torch": torch}


def measure(side: str, options: argparse.Namespace) -> dict:
    """One turn of a side, in a process of its own."""
    python = {"torch": options.torch}.get(side, Path(sys.executable))
    command = [str(python), __file__, f"--worker={side}", f"--model={options.model}", f"--preset={options.preset}"]
    command += [f"--{name}={getattr(options, name)}" for name in CHANGES]
    environment = os.environ | ({"GLIBC_TUNABLES": TUNABLE} if side == "tanuki_jax" else {})
    if side == "maxtext":
        command += [f"--path={options.path}", f"--maxtext={options.maxtext}"]
    done = subprocess.run([*command, f"--steps={options.steps}"], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} did not run:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def work(options: argparse.Namespace) -> dict:
    """What a worker does."""
    size, mixture = PRESETS[options.preset], options.model == "mixture"
    given = {name: getattr(options, name) for name in CHANGES if getattr(options, name)}
    size = replace(size, **given)
    if options.worker == "maxtext":
        return maxtext(options.maxtext / "bin" / "python", size, options.path, options.steps)
    if options.worker == "tanuki_jax":
        return tanuki_jax(size, mixture, options.steps, options.profile)
    return SIDES[options.worker](size, mixture, options.steps)


def main() -> None:
    """Runs the sides in turn and prints their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("dense", "mixture"), default="dense")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--sides", default="tanuki_jax,maxtext,torch")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    for name, kind in CHANGES.items():
        parser.add_argument(f"--{name}", type=kind, default=kind(), help="in place of the preset's")
    parser.add_argument("--profile", action="store_true", help="where the time goes; with --worker=tanuki_jax")
    parser.add_argument("--torch", type=Path, default=Path(sys.executable), help="a Python with torch and transformers")
    parser.add_argument("--maxtext", type=Path, default=ROOT / ".maxtext", help="directory of MaxText's environment")
    parser.add_argument("--path", default="", choices=("", *PATHS), help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options)))
        return
    sides = [(side, "") for side in options.sides.split(",")]
    if ("maxtext", "") in sides:
        import maxtext_peer as peer  # torch's worker, which runs this file too, has no need of it

        peer.ensure_environment(options.maxtext)
        if options.model == "mixture":
            where = sides.index(("maxtext", ""))
            sides[where : where + 1] = [("maxtext", path) for path in PATHS]
    found: dict[tuple[str, str], list[dict]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, path in sides:
            options.path = path
            found[side, path].append(measure(side, options))
            print(side, path, found[side, path][-1], file=sys.stderr, flush=True)
    medians = {side: statistics.median(m["tokens_per_second"] for m in turns) for side, turns in found.items()}
    mine = medians.get(("tanuki_jax", ""))
    first = next(iter(found.values()))[0]
    print(f"{options.model}, {options.preset}: {asdict(PRESETS[options.preset])}")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {first['device']}, {options.rounds} rounds of {options.steps} steps\n"
    )
    print("| side | tokens/s | ours over it | GFLOP/s (model) | MFU | peak GB | last loss |\n|---|---|---|---|---|---|---|")
    for (side, path), turns in found.items():
        rate, last = medians[side, path], turns[-1]
        ratio = f"{mine / rate:.2f}" if mine else ""
        flops = f"{statistics.median(m['flops_per_second'] for m in turns) / 1e9:,.0f}" if "flops_per_second" in last else ""
        mfu = f"{last['mfu']:.1%}" if last.get("mfu") else ""
        name = f"{side} ({path})" if path else side
        print(f"| {name} | {rate:,.0f} | {ratio} | {flops} | {mfu} | {last['peak_gb']:.2f} | {last['loss']:.3f} |")


if __name__ == "__main__":
    main()
