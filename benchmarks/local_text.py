"""configs/local_text.py on real files: time, memory and loss of each part, and whether every line survives the tokenizer.

python benchmarks/local_text.py --ja='ja.jsonl.gz' --en='en.jsonl.gz' --workdir=runs/local_text [--output=REPORT.md]
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "local_text.py"


def main() -> None:
    """Runs the recipe in a process of its own and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ja", required=True)
    parser.add_argument("--en", required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.workdir.exists():
        sys.exit(f"{options.workdir} is there already; its times would not be of this run")

    began = time.monotonic()
    files = [f"--config.data.ja={options.ja}", f"--config.data.en={options.en}"]
    command = [sys.executable, "-m", "tanuki_jax.cli", "run", f"--config={CONFIG}", f"--workdir={options.workdir}", *files]
    subprocess.run(command, check=True, cwd=ROOT)
    seconds, peak = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20

    summary = json.loads((options.workdir / "summary.json").read_text())
    [entry] = summary["stages"]
    rows = [json.loads(line) for line in (options.workdir / "stages/pretrain/metrics.jsonl").read_text().splitlines()]
    vocab = summary["config"]["model"]["vocab_size"]
    lines = [
        "# A small model on local text",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, "
        + ", ".join(f"{k} {summary['versions'][k]}" for k in ("python", "jax", "flax")),
        "",
        "    python benchmarks/local_text.py --ja=ja.jsonl.gz --en=en.jsonl.gz --workdir=runs/local_text",
        "",
        f"Whole run, with tokenizer training and tokenization: {seconds:.0f} s, peak memory {peak:.2f} GB.",
        f"Training: {entry['steps']} steps, {entry['tokens']:,} tokens, {entry['tokens_per_second']:,.0f} tokens/s "
        "(compilation and checkpoints included).",
        "",
        f"| step | loss (ln V = {math.log(vocab):.2f}) | gradient norm |",
        "|---|---|---|",
        *(
            f"| {r['step']} | {r['loss']:.3f} | {r['grad_norm']:.2f} |"
            for r in rows
            if r["step"] in (10, 20) or not r["step"] % 50
        ),
        "",
        "Tokenizer, every line of both files encoded and decoded:",
        "",
        "| text | lines | lines that change | characters per token | tokens spelt in bytes |",
        "|---|---|---|---|---|",
        *(_tokenizer_line(name, pattern, options.workdir) for name, pattern in (("ja", options.ja), ("en", options.en))),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


def _tokenizer_line(name: str, pattern: str, workdir: Path) -> str:
    from tanuki_jax.data import sources
    from tanuki_jax.data.tokenizer import Tokenizer
    from tokenization.encoders import open_encoder
    from tokenization.report import report

    texts = (row.fields["text"] for row in sources.read_rows(pattern))
    encoder = open_encoder(workdir / "stages/pretrain/tokenizer", Tokenizer)
    found = report([encoder], {name: texts})["domains"][name][encoder.name]
    changed = round(found["lines"] * (1 - found["round_trip"]))
    return f"| {name} | {found['lines']:,} | {changed} | {found['characters_per_token']:.3f} | {found['byte_fallback']:.2%} |"


if __name__ == "__main__":
    main()
