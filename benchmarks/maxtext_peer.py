"""What the TPU compiler expects of MaxText: its train step compiled ahead of time for a slice, on a machine without a TPU.

python benchmarks/maxtext_peer.py --environment=DIR --cache=DIR --model=dense --topology=v5p-256 --batch=4 remat_policy=minimal
python benchmarks/maxtext_peer.py --environment=DIR --cache=DIR --model=mixture --topology=v6e-256 --search --minutes=60

Every figure is the TPU compiler's own cost estimate, never a measurement.  `optimal_seconds` prices arithmetic and memory
traffic, not exposed communication, and a custom kernel costs what its author declared: the default splash attention
declares nothing, so attention is free here.  A figure may be compared only with one of the same compiler, chip and attention.

XLA's `cost_analysis` counts the body of a loop once.  So a layer's cost is half the difference between an unrolled model of
four layers and one of two, a step is the two-layer model plus the other layers, and memory is that of the real, scanned model.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from tanuki_jax.plan import parse as parse_topology
from tanuki_jax.plan.estimate import with_cost
from tanuki_jax.train.metrics import PEAK_FLOPS

Options = dict[str, str | int | float | bool]

MAXTEXT, LIBTPU = "0.2.5", "0.0.52"
MODULE = "maxtext.trainers.pre_train.train_compile"
GB = 1e9

COMMON: Options = {
    "compile_topology_num_slices": 1,
    "mlp_activations": "['silu','linear']",
    "logits_via_embedding": False,
    "enable_checkpointing": False,
    "dataset_type": "synthetic",
    "attention": "flash",
    "ici_fsdp_parallelism": -1,
    "run_name": "x",
    "log_config": False,
}
DENSE: Options = {
    "base_emb_dim": 4096,
    "base_mlp_dim": 14336,
    "base_num_decoder_layers": 32,
    "base_num_query_heads": 32,
    "base_num_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 65024,
    "decoder_block": "llama2",
}
MIXTURE: Options = DENSE | {
    "decoder_block": "mixtral",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "base_moe_mlp_dim": 14336,
}
MODELS = {"dense": DENSE, "mixture": MIXTURE}

# What MaxText 0.2.5 offers to trade memory for time, most memory first.  `minimal` knows only the older names of a mixture's
# products and so computes the up projection of the experts again; the custom policies name what they keep.
KEEP_ATTENTION: Options = {
    "remat_policy": "custom",
    **dict.fromkeys(("query_proj", "key_proj", "value_proj", "out_proj", "context"), "device"),
}
KEEP_EXPERTS = KEEP_ATTENTION | dict.fromkeys(("moe_mlpwi_0", "moe_mlpwi_1", "moe_mlpwo"), "device")
REMAT: dict[str, dict[str, Options]] = {
    "dense": {
        "none": {"remat_policy": "none"},
        "minimal_with_context": {"remat_policy": "minimal_with_context"},
        "minimal": {"remat_policy": "minimal"},
        "minimal but mlpwo": KEEP_ATTENTION | {"mlpwi_0": "device", "mlpwi_1": "device"},
        "save_dot_except_mlpwi": {"remat_policy": "save_dot_except_mlpwi"},
        "save_dot_with_context_except_mlp": {"remat_policy": "save_dot_with_context_except_mlp"},
        "save_dot_except_mlp": {"remat_policy": "save_dot_except_mlp"},
        "save_qkv_proj": {"remat_policy": "save_qkv_proj"},
        "save_out_proj": {"remat_policy": "save_out_proj"},
        "full": {"remat_policy": "full"},
    },
    "mixture": {
        "experts and sorted input": KEEP_EXPERTS | {"moe_x_sorted": "device"},
        "experts": KEEP_EXPERTS,
        "experts but mlpwo": KEEP_EXPERTS | {"moe_mlpwo": "remat"},
        "minimal": {"remat_policy": "minimal"},
        "save_dot_except_mlpwi": {"remat_policy": "save_dot_except_mlpwi"},
        "save_dot_except_mlp": {"remat_policy": "save_dot_except_mlp"},
        "save_qkv_proj": {"remat_policy": "save_qkv_proj"},
        "save_out_proj": {"remat_policy": "save_out_proj"},
        "full": {"remat_policy": "full"},
    },
}
DROPLESS: Options = {"sparse_matmul": True}
TILES = [
    f"{weight}_tile_{which}_{axis}"
    for weight in ("wi", "wo")
    for which in ("fwd", "dlhs", "drhs")
    for axis in ("batch_seq", "embed_dim", "mlp_dim")
]
# How the experts' products are computed; the first is the default.
EXPERTS: dict[str, Options] = {
    "megablox": DROPLESS | {"megablox": True},
    "ragged_dot": DROPLESS | {"megablox": False},
    "megablox, larger tiles": DROPLESS
    | {"megablox": True}
    | {name: {"batch_seq": 1024, "embed_dim": 2048, "mlp_dim": 2048}[name.split("_", 3)[3]] for name in TILES},
    "tokamax": DROPLESS | {"megablox": True, "use_tokamax_gmm": True},
    "tokamax v2": DROPLESS
    | {"megablox": True, "use_tokamax_gmm": True, "use_gmm_v2": True, "use_gmm_v2_heuristic_tiling": True},
    "capacity 1.0, drops tokens": {"sparse_matmul": False, "megablox": False, "capacity_factor": 1.0},
    "capacity 1.25, drops tokens": {"sparse_matmul": False, "megablox": False, "capacity_factor": 1.25},
}
SPLASH = [f"sa_block_{name}" for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")]
# Everything else, tried on top of the best so far.
EXTRAS: dict[str, Options] = {
    "splash blocks of 1024": dict.fromkeys(SPLASH, 1024),
    "splash blocks of 2048": dict.fromkeys(SPLASH, 2048),
    "iota embedding": {"use_iota_embed": True},
    "loss in 8 chunks": {"num_vocab_tiling": 8},
    "96 MiB of scoped VMEM": {"compile_xla_flags": "--xla_tpu_scoped_vmem_limit_kib=98304"},
}
# Compiled in full, so that the others need one compilation each.
REFERENCES = {
    "v5p": (("full", 2), ("minimal", 4)),
    "v6e": (("full", 1), ("full", 2)),
    "v5e": (("full", 1), ("full", 2)),
}
# Tried from the largest; the first two that fit are enough.
BATCHES = {"v5p": (8, 7, 6, 4, 3, 2), "v6e": (4, 3, 2, 1), "v5e": (2, 1)}


def ensure_environment(directory: Path, libtpu: str = LIBTPU) -> Path:
    """The Python of a virtual environment with MaxText and this libtpu, made if it is not there."""
    python = directory / "bin" / "python"
    wanted = {"maxtext": MAXTEXT, "libtpu": libtpu}
    if python.exists():
        code = f"from importlib.metadata import version as v; print(all(v(n) == w for n, w in {wanted}.items()))"
        if subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip() == "True":
            return python
    kept = sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python3.12"))
    found = next((p for p in [shutil.which("python3.12"), *map(str, kept)] if p and works(p)), None)
    if not found:
        raise SystemExit("MaxText needs Python 3.12: no python3.12 on PATH or in ~/.pyenv/versions.")
    subprocess.run([found, "-m", "venv", directory], check=True)
    for package in (f"maxtext[tpu]=={MAXTEXT}", f"libtpu=={libtpu}"):
        subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
    return python


def its_environment() -> dict[str, str]:
    """Variables for a process that shall find its own libtpu: importing jax here has set the path of ours."""
    return {name: value for name, value in os.environ.items() if name != "TPU_LIBRARY_PATH"} | {"JAX_PLATFORMS": "cpu"}


def works(python: str) -> bool:
    """Whether this Python starts: a version manager's shim may stand for nothing."""
    return subprocess.run([python, "--version"], capture_output=True).returncode == 0


def flag(name: str, value: object) -> str:
    """One command-line argument of MaxText."""
    return f"{name}={str(value).lower() if isinstance(value, bool) else value}"


def compile_once(python: Path, flags: Options, cache: Path) -> dict:
    """One `train_compile`; the answer, too little memory included, is kept in `cache` under a hash of the flags."""
    arguments = [flag(name, flags[name]) for name in sorted(flags)]
    key = hashlib.sha256(json.dumps([MAXTEXT, LIBTPU, arguments]).encode()).hexdigest()[:16]
    path = cache / f"{key}.json"
    if path.exists():
        return json.loads(path.read_text())
    cache.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-P", "-m", MODULE, *arguments, f"base_output_directory={cache / 'output'}"]
    began = time.perf_counter()
    # No device is opened, so another process that compiles for a TPU is no reason to stop.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "none"}
    environment = its_environment() | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} | quiet
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    result = {"flags": arguments, "compile_seconds": time.perf_counter() - began} | parse(done.stdout + done.stderr)
    if "error" in result and "used_gib" not in result:
        (cache / f"{key}.log").write_text(done.stdout + done.stderr)
    else:
        path.write_text(json.dumps(result, indent=1))
    return result


def parse(text: str) -> dict:
    """Costs and memory in what `train_compile` printed, or the reason why it printed none."""
    cost = re.search(r"^Cost analysis: .*$", text, re.M)
    memory = re.search(r"^Memory analysis: .*$", text, re.M)
    if cost and memory:
        found: dict = {}
        for key, name in (("flops", "flops"), ("bytes", "bytes accessed"), ("seconds", "optimal_seconds")):
            match = re.search(rf"'{name}': ([-+.e\d]+)", cost[0])
            found[key] = float(match[1]) if match else float("nan")
        for key in ("argument", "output", "alias", "temp"):
            found[key] = int(re.search(rf"[( ]{key}_size_in_bytes=(\d+)", memory[0])[1])
        return found
    full = re.search(r"Used ([.\d]+)G of ([.\d]+)G hbm", text)
    if full:
        return {"error": "out of memory: " + full[0], "used_gib": float(full[1]), "limit_gib": float(full[2])}
    lines = [line for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"Error|RESOURCE_EXHAUSTED|INTERNAL", line)]
    return {"error": (wrong or lines or ["no output"])[-1][:400]}


def flags_of(model: Options, topology: str, per_chip_batch: float, seq_len: int, options: Options) -> Options:
    """Everything but the number of layers and whether they are scanned."""
    shape: Options = {"compile_topology": topology, "per_device_batch_size": per_chip_batch, "max_target_length": seq_len}
    return COMMON | model | shape | options


def least_tflop(model: Options, tokens: float) -> float:
    """What a layer must multiply for these tokens, forward and backward, without attention scores or recomputation."""
    size = {name: float(value) for name, value in model.items() if not isinstance(value, str)}
    heads = 2 * size["base_num_query_heads"] + 2 * size["base_num_kv_heads"]
    used = size.get("num_experts_per_tok", 1)
    return 6 * tokens * size["base_emb_dim"] * (heads * size["head_dim"] + 3 * used * size["base_mlp_dim"]) / 1e12


def memory_of(scanned: dict, topology: str) -> dict:
    """Memory of the scanned model, and whether it fits."""
    if "error" in scanned:
        return {"fits": False, "error": scanned["error"], "used_gib": scanned.get("used_gib")}
    arguments, temporaries = scanned["argument"], scanned["temp"] + scanned["output"] - scanned["alias"]
    limit = parse_topology(topology).generation.hbm_limit
    return {
        "arguments_gb": arguments / GB,
        "temporaries_gb": temporaries / GB,
        "fits": arguments + temporaries < limit,
    }


def figures(model: Options, tokens: float, layer: dict[str, float], step: dict[str, float]) -> dict:
    """The estimates under the names that are reported."""
    return {
        "step_seconds_estimate": step["seconds"],
        "layer_seconds": layer["seconds"],
        "layer_tflop": layer["flops"] / 1e12,
        "layer_gb_accessed": layer["bytes"] / GB,
        "flops_per_step_per_chip": step["flops"],
        "tokens_per_second_per_chip": tokens / step["seconds"],
        # A kernel that declares less than it computes looks fast and is not.
        "undercounted": layer["flops"] / 1e12 < 0.98 * least_tflop(model, tokens),
    }


COSTS = ("seconds", "flops", "bytes")


def peak(topology: str) -> float:
    """bfloat16 FLOP/s of a chip."""
    return PEAK_FLOPS[parse_topology(topology).generation.device_kind]


def compile_plan(
    python: Path, model: Options, topology: str, per_chip_batch: float, seq_len: int, options: Options, cache: Path
) -> dict:
    """Cost and memory of one configuration by three compilations: two layers, four layers, and the scanned model."""
    flags = flags_of(model, topology, per_chip_batch, seq_len, options)
    layers = int(model["base_num_decoder_layers"])
    scanned = compile_once(python, flags | {"scan_layers": True}, cache)
    few = (flags | {"base_num_decoder_layers": n, "scan_layers": False} for n in (2, 4))
    runs = (scanned, *(compile_once(python, f, cache) for f in few))
    scanned, short, long = (run if "error" in run else with_cost(run, peak(topology)) for run in runs)
    plan = {"options": options, "batch": per_chip_batch, "command": [str(python), "-m", MODULE, *scanned["flags"]]}
    plan |= {"compile_seconds": sum(r["compile_seconds"] for r in runs)} | memory_of(scanned, topology)
    if "error" in short or "error" in long:
        return plan | {"error": short.get("error") or long.get("error")}
    layer = {name: (long[name] - short[name]) / 2 for name in COSTS}
    step = {name: short[name] + (layers - 2) * layer[name] for name in COSTS}
    plan |= figures(model, per_chip_batch * seq_len, layer, step)
    plan["rest"] = {name: short[name] - 2 * layer[name] for name in COSTS}
    if "error" not in scanned:
        plan["scanned_rest"] = {name: scanned[name] - layer[name] for name in COSTS}
    return plan


def screen(
    python: Path, model: Options, topology: str, per_chip_batch: float, seq_len: int, options: Options, cache: Path, known: list
) -> dict:
    """The same from the scanned compilation alone: its layer costs what a known plan's does, plus what the two differ by."""
    scanned = compile_once(python, flags_of(model, topology, per_chip_batch, seq_len, options) | {"scan_layers": True}, cache)
    plan = {"options": options, "batch": per_chip_batch, "compile_seconds": scanned["compile_seconds"], "screened": True}
    plan |= memory_of(scanned, topology)
    if "error" in scanned:
        return plan
    scanned = with_cost(scanned, peak(topology))
    rest, scanned_rest = at_batch(per_chip_batch, known, "rest"), at_batch(per_chip_batch, known, "scanned_rest")
    layer = {name: scanned[name] - scanned_rest[name] for name in COSTS}
    step = {name: rest[name] + int(model["base_num_decoder_layers"]) * layer[name] for name in COSTS}
    return plan | figures(model, per_chip_batch * seq_len, layer, step)


def at_batch(batch: float, known: list[dict], key: str) -> dict[str, float]:
    """A cost outside the layers at this batch, on the line through two plans that know it."""
    first, last = known[0], known[-1]
    share = (batch - first["batch"]) / (last["batch"] - first["batch"]) if last is not first else 0.0
    return {name: first[key][name] + share * (last[key][name] - first[key][name]) for name in COSTS}


def search(python: Path, name: str, topology: str, seq_len: int, cache: Path, minutes: float) -> list[dict]:
    """Configurations by estimated tokens a second a chip, those that fit first; the two best are compiled in full.

    Policies are tried from the one that keeps most, each with the two largest batches that fit.  Then, on top of the best, the
    ways to compute the experts' products, and last everything else.
    """
    model, batches = MODELS[name], BATCHES[topology.split("-")[0]]
    deadline = time.perf_counter() + 60 * minutes
    place = (python, model, topology)
    base = EXPERTS["megablox"] if name == "mixture" else {}
    found = [
        compile_plan(*place, batch, seq_len, base | REMAT[name][policy], cache) | {"label": f"{policy}, {batch}"}
        for policy, batch in REFERENCES[topology.split("-")[0]]
    ]
    known = [plan for plan in found if "scanned_rest" in plan]

    def attempt(label: str, batch: float, options: Options) -> dict:
        plan = screen(*place, batch, seq_len, options, cache, known) | {"label": f"{label}, {batch}"}
        found.append(plan)
        print(row(plan), flush=True)
        return plan

    def best() -> dict:
        return rank(found)[0]

    for policy, options in REMAT[name].items():
        fitting = 0
        for batch in batches:
            if fitting == 2 or time.perf_counter() > deadline:
                break
            fitting += attempt(policy, batch, base | options)["fits"]
    for table in (EXPERTS, EXTRAS) if name == "mixture" else (EXTRAS,):
        top = best()
        for label, options in list(table.items())[table is EXPERTS :]:
            if time.perf_counter() < deadline:
                kept = {k: v for k, v in top["options"].items() if table is EXTRAS or k not in base}
                attempt(f"{top['label']} + {label}", top["batch"], kept | options)
    for plan in rank(found)[:2]:
        whole = compile_plan(*place, plan["batch"], seq_len, plan["options"], cache)
        found.append(whole | {"label": plan["label"] + ", in full"})
    return rank(found)


def rank(plans: list[dict]) -> list[dict]:
    """Those that fit, drop nothing and are counted in full come first, the fastest at the top."""

    def order(plan: dict) -> tuple:
        fair = plan["fits"] and not plan.get("undercounted", True) and "drops" not in plan.get("label", "")
        return (not fair, -plan.get("tokens_per_second_per_chip", 0.0))

    return sorted(plans, key=order)


HEADER = (
    "| configuration, sequences a chip | layer: TFLOP, ms, GB | step s | tokens/s/chip | arguments + temporaries GB | fits |\n"
    "|---|---|---|---|---|---|"
)


def row(plan: dict) -> str:
    """One line of the table."""
    label, fits = plan.get("label") or f"{plan['options']}, {plan['batch']}", "yes" if plan["fits"] else "no"
    memory = f"{plan['arguments_gb']:.2f} + {plan['temporaries_gb']:.1f}" if "arguments_gb" in plan else plan["error"]
    if "layer_seconds" not in plan:
        return f"| {label} | - | - | - | {memory} | {fits} |"
    layer = f"{plan['layer_tflop']:.2f}, {1e3 * plan['layer_seconds']:.1f}, {plan['layer_gb_accessed']:.1f}"
    rate = f"{plan['tokens_per_second_per_chip']:,.0f}" + (" (undercounted)" if plan["undercounted"] else "")
    return f"| {label} | {layer} | {plan['step_seconds_estimate']:.2f} | {rate} | {memory} | {fits} |"


def main() -> None:
    """One configuration, or a search; prints a table in Markdown and writes what it knows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="directory of the virtual environment")
    parser.add_argument("--cache", type=Path, required=True, help="directory of the results kept")
    parser.add_argument("--model", choices=MODELS, default="dense")
    parser.add_argument("--topology", default="v5p-256", help="as MaxText names them: v5p-256 has 128 chips")
    parser.add_argument("--batch", type=float, default=2, help="sequences a chip")
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--minutes", type=float, default=60, help="after which a search starts no new compilation")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("options", nargs="*", help="options of MaxText, name=value")
    args = parser.parse_args()
    python = ensure_environment(args.environment)
    if args.search:
        plans = search(python, args.model, args.topology, args.seq_len, args.cache, args.minutes)
    else:
        options: Options = dict(option.split("=", 1) for option in args.options)
        batch = int(args.batch) if args.batch.is_integer() else args.batch
        plans = [compile_plan(python, MODELS[args.model], args.topology, batch, args.seq_len, options, args.cache)]
    print(HEADER, *map(row, plans), sep="\n")
    if args.output:
        args.output.write_text(json.dumps(plans, indent=1))


if __name__ == "__main__":
    main()
