"""The same models planned for the same TPU slice by both trainers, by the same compiler: ours as a ratio of MaxText.

python benchmarks/vs_maxtext.py --topology=v5p-256 --model=dense --output=FILE.md
python benchmarks/vs_maxtext.py --topology=v6e-256 --model=mixture --minutes=90

Needs Python 3.12 on the machine: MaxText is installed in an environment of its own, and both trainers run in it, with its JAX
and libtpu.  Two comparisons, sequences of 4096: equal (the same sequences a chip, full remat) and best against best, each
trainer with the remat policy, sequences a chip and expert products that suit it best under the same memory limit.

Every figure is the TPU compiler's own estimate, never a measurement: see maxtext_peer.py for what it prices.  MFU counts 6 x
active parameters and causal attention a token.  Answers are kept in --cache, so a run that was cut off goes on.
"""

import argparse
import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import maxtext_peer as peer

from tanuki_jax import config
from tanuki_jax.model import flops_per_token
from tanuki_jax.plan import parse

ROOT = Path(__file__).resolve().parent.parent
SEQ_LEN = 4096
RECIPES = {"dense": ("tanuki_8b", "run_01"), "mixture": ("tanuki_8x8b", "moe_01")}
REMAT = ("none", "dots", "attention")  # those that may be the fastest, from the one that keeps most
EQUAL = {"v5p": 2, "v6e": 1, "v5e": 1}  # sequences a chip
# Sequences a chip that are tried under each policy, the most first.
BATCHES = {"v5p": (8, 7, 6, 5, 4, 3, 2), "v6e": (4, 3, 2, 1), "v5e": (2, 1)}


def ours(python: Path, model: str, topology: str, rows: int, remat: str, cache: Path) -> dict:
    """The plan of one configuration, from `tanuki plan` in the peer's environment; kept under a hash of it and of our code."""
    recipe, stage = RECIPES[model]
    chips = parse(topology).chips
    key = f"--config.stages.{stage}"
    flags = [
        f"--config=configs/{recipe}.py",
        f"--topology={topology}",
        f"--stage={stage}",
        f"{key}.seq_len={SEQ_LEN}",
        f"{key}.batch_size={rows * chips}",
        f"{key}.gradient_accumulation_steps=1",
        f"--config.compute.remat={remat}",
        "--json",
    ]
    path = cache / f"ours-{hashlib.sha256(json.dumps([peer.LIBTPU, *flags, _code()]).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [python, "-c", "import sys; from tanuki_jax.cli.main import main; sys.exit(main())", "plan", *flags]
        environment = peer.its_environment() | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if not done.stdout.startswith("{"):
            raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")
        path.write_text(done.stdout)
    plan = json.loads(path.read_text())["stages"][0]
    return plan | {"label": f"remat {remat}, {rows}", "command": "tanuki plan " + " ".join(flags)}


def _code() -> str:
    """A hash of the package: another version is another answer."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "tanuki_jax").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def our_best(python: Path, model: str, topology: str, cache: Path) -> Iterator[dict]:
    """Under each policy the most sequences that fit."""
    for remat in REMAT:
        for rows in BATCHES[topology.split("-")[0]]:
            plan = ours(python, model, topology, rows, remat, cache)
            print(f"ours: {plan['label']}: {'fits' if plan['fits'] else 'too large'}", file=sys.stderr, flush=True)
            if plan["fits"]:
                yield plan
                break


def of_ours(plan: dict) -> dict:
    """Our plan under the names of the peer's."""
    memory, layer = plan["hbm_bytes_per_chip"], plan["layer"]
    return {
        "label": plan["label"],
        "step_seconds_estimate": plan["step_seconds_estimate"],
        "tokens_per_second_per_chip": plan["tokens_per_second_per_chip"],
        "layer_seconds": layer["seconds"],
        "layer_tflop": layer["flops"] / 1e12,
        "layer_gb_accessed": layer["bytes"] / 1e9,
        "arguments_gb": memory["arguments"] / 1e9,
        "temporaries_gb": memory["temporaries"] / 1e9,
        "over_least": layer["flops_over_least"],
        "fits": plan["fits"],
        "undercounted": False,
    }


HEADER = (
    "| | configuration, sequences a chip | step s | tokens/s/chip | MFU | arguments + temporaries GB | "
    "layer: ms, TFLOP, GB accessed | FLOPs / least |\n|---|---|---|---|---|---|---|---|"
)


@functools.cache
def flops_of_a_token(model: str) -> float:
    """6 x all active parameters, the embedding's too as MaxText counts, and causal attention."""
    recipe, stage = RECIPES[model]
    cfg = config.model_config(config.load([f"--config={ROOT}/configs/{recipe}.py"]), stage)
    return flops_per_token(cfg, SEQ_LEN) + 6 * cfg.vocab_size * cfg.d_model


def row(who: str, model: str, topology: str, plan: dict) -> str:
    """One line of the table."""
    rate = plan["tokens_per_second_per_chip"]
    mfu = rate * flops_of_a_token(model) / peer.peak(topology)
    least = f"{plan['over_least']:.3f}" if "over_least" in plan else ""
    return (
        f"| {who} | {plan['label']} | {plan['step_seconds_estimate']:.3f} | {rate:,.0f} | {mfu:.1%} | "
        f"{plan['arguments_gb']:.2f} + {plan['temporaries_gb']:.2f} | "
        f"{1e3 * plan['layer_seconds']:.2f}, {plan['layer_tflop']:.2f}, {plan['layer_gb_accessed']:.1f} | {least} |"
    )


def compare(name: str, model: str, topology: str, mine: dict, theirs: dict) -> str:
    """A table of two lines and their ratio."""
    speed = mine["tokens_per_second_per_chip"] / theirs["tokens_per_second_per_chip"]
    memory = (mine["arguments_gb"] + mine["temporaries_gb"]) / (theirs["arguments_gb"] + theirs["temporaries_gb"])
    lines = [
        f"### {model}, {topology}, {name}",
        "",
        HEADER,
        row("tanuki_jax", model, topology, mine),
        row("MaxText", model, topology, theirs),
        "",
        f"Ours over MaxText's: tokens/s/chip {speed:.3f}, memory {memory:.3f}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Both comparisons of one model on one slice, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p-256")
    parser.add_argument("--model", choices=RECIPES, default="dense")
    parser.add_argument("--environment", type=Path, default=ROOT / ".maxtext", help="directory of MaxText's environment")
    parser.add_argument("--cache", type=Path, default=ROOT / ".maxtext" / "plans", help="directory of the answers kept")
    parser.add_argument("--minutes", type=float, default=90, help="after which the peer's search tries nothing new")
    parser.add_argument("--equal_only", action="store_true", help="leave out the searches")
    parser.add_argument("--output", type=Path, help="Markdown file that the report is added to")
    args = parser.parse_args()
    python = peer.ensure_environment(args.environment)
    model, topology = args.model, args.topology
    rows, peer_model = EQUAL[topology.split("-")[0]], peer.MODELS[model]
    base = peer.EXPERTS["megablox"] if model == "mixture" else {}
    mine = of_ours(ours(python, model, topology, rows, "full", args.cache))
    theirs = peer.compile_plan(python, peer_model, topology, rows, SEQ_LEN, base | peer.REMAT[model]["full"], args.cache)
    report = [compare("equal", model, topology, mine, theirs | {"label": f"full, {rows}"})]
    print(report[0], flush=True)
    if not args.equal_only:
        mine = max(map(of_ours, our_best(python, model, topology, args.cache)), key=lambda p: p["tokens_per_second_per_chip"])
        found = peer.search(python, model, topology, SEQ_LEN, args.cache, args.minutes)
        whole = next(plan for plan in found if "screened" not in plan and plan["fits"])
        report.append(compare("best against best", model, topology, mine, whole))
        report.append("\n".join(["What was tried of MaxText, the fastest first:", "", peer.HEADER, *map(peer.row, found), ""]))
        print(*report[1:], sep="\n")
    if args.output:
        made = f"{date.today()}, MaxText {peer.MAXTEXT}, libtpu {peer.LIBTPU}, `python benchmarks/{' '.join(sys.argv)}`\n"
        with args.output.open("a") as f:
            print(made.replace("benchmarks/benchmarks/", "benchmarks/"), *report, sep="\n", file=f)


if __name__ == "__main__":
    main()
