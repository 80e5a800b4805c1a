"""The tokenizer at each boundary, beside others: time, memory, compression, losslessness, bits per byte of a small model.

python benchmarks/tokenizer.py --corpus='corpus/*.jsonl.gz' --language_field=meta.lang --held_out='森|Sherlock' \\
    --modern='questions.jsonl' --modern_field=turns --compare=original.model --workdir=runs/tokenizer [--steps=200]

Documents whose `meta` matches --held_out are tested on and not trained on.  Each boundary trains a tokenizer and, with --steps,
a small model on its tokens for equal compute (the same model, steps and tokens a step), scored on the held-out text.
"""

import argparse
import collections
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from watched import watched

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LEVELS = ("morpheme", "predicate", "bunsetsu", "none")
MODEL = dict(n_layers=4, d_model=128, d_ff=384, n_heads=4, n_kv_heads=2, head_dim=32, init_std=0.02)
SCORED = 150_000  # characters of each test set that the small model is scored on
CHUNK = 400  # characters of a scored text


def main() -> None:
    """Splits the corpus, runs each boundary in a process of its own, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--language_field", default="meta.lang")
    parser.add_argument("--held_out", required=True, help="regular expression on a document's `meta`")
    parser.add_argument("--modern", default="", help="comma-separated .jsonl files of modern text, tested on only")
    parser.add_argument("--compare", default="", help="tokenizers to compare with")
    parser.add_argument(
        "--language_weights", default="", help="language_weights of the vocabulary, as for tanuki tokenizer train"
    )
    parser.add_argument("--vocab_size", type=int, default=65_000)
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--steps", type=int, default=0, help="steps of the small model; 0 = no model")
    parser.add_argument("--workdir", type=Path, required=True)
    options = parser.parse_args()
    tests = split(options)
    print(f"# Tokenizers, {time.strftime('%Y-%m-%d')}\n\n{platform.machine()}, {os.cpu_count()} cores\n\n    {command()}\n")
    levels = options.levels.split(",")
    print("| boundary | training, s | memory, GiB | pieces |\n|---|---|---|---|")
    for boundary in levels:
        seconds, memory, line = train(options, boundary)
        print(f"| {boundary} | {seconds:.0f} | {memory:.2f} | {line} |", flush=True)
    found = report(options, levels, tests)
    print("\n" + found["table"] + "\n")
    if options.steps:
        print("| boundary | " + " | ".join(f"{name}, bits per byte" for name in tests) + " | tokens seen | text seen, MB |")
        print("|---|" + "---|" * (len(tests) + 2))
        for boundary in levels:
            print(small_model(options, boundary, tests), flush=True)


def command() -> str:
    """How this report was made, without the paths of this machine."""
    return "python benchmarks/tokenizer.py " + " ".join(re.sub(r"/[^,=]*/", "", a) for a in sys.argv[1:])


def split(options: argparse.Namespace) -> dict[str, Path]:
    """Writes train-LANGUAGE.jsonl and test sets; returns the test sets."""
    from tanuki_jax.data import sources

    options.workdir.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = collections.defaultdict(list)
    for row in sources.read_rows(options.corpus, sources.Fields("text", options.language_field)):
        held_out = re.search(options.held_out, json.dumps(row.fields.get("meta"), ensure_ascii=False))
        rows[f"{'test' if held_out else 'train'}-{row.language}"].append({"text": row.fields["text"], "lang": row.language})
    if options.modern:
        rows["test-modern"] = [{"text": t, "lang": ""} for path in options.modern.split(",") for t in modern(Path(path))]
    for name, texts in rows.items():
        lines = (json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
        (options.workdir / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {n.removeprefix("test-"): options.workdir / f"{n}.jsonl" for n in sorted(rows) if n.startswith("test-")}


def modern(path: Path) -> list[str]:
    """Turns of Japanese MT-Bench: questions, or reference answers."""
    texts: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for holder in row.get("choices", [row]):
            texts += holder["turns"]
    return texts


def tanuki(*arguments: str) -> list[str]:
    """The command line in a process of its own."""
    return [sys.executable, "-m", "tanuki_jax.cli", *arguments]


def train(options: argparse.Namespace, boundary: str) -> tuple[float, float, str]:
    """Seconds, peak memory of the process and its children together (at most) in GiB, and what was said."""
    output = options.workdir / boundary
    shutil.rmtree(output, ignore_errors=True)
    flags = [
        f"--input={options.workdir}/train-*.jsonl",
        "--language_field=lang",
        f"--output={output}",
        f"--boundary={boundary}",
    ]
    language_weights = [f"--language_weights={options.language_weights}"] if options.language_weights else []
    seconds, most, said = watched(tanuki("tokenizer", "train", *flags, f"--vocab_size={options.vocab_size}", *language_weights))
    return seconds, most, said.strip().splitlines()[-1].partition(": ")[2]


def report(options: argparse.Namespace, levels: list[str], tests: dict[str, Path]) -> dict[str, str]:
    """The table of tanuki tokenizer report over all levels and test sets, and its picture."""
    from tanuki_jax.data import sources
    from tanuki_jax.data.tokenizer import Tokenizer
    from tokenization import report as reports
    from tokenization.encoders import open_encoder

    paths = [*(options.workdir / boundary for boundary in levels), *map(Path, filter(None, options.compare.split(",")))]
    domains = {name: (row.fields["text"] for row in sources.read_rows(str(path))) for name, path in tests.items()}
    found = reports.report([open_encoder(path, Tokenizer) for path in paths], domains)
    reports.plot(found, options.workdir / "tokenizers.svg", "svg")
    (options.workdir / "report.json").write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    return {"table": reports.table(found)}


def small_model(options: argparse.Namespace, boundary: str, tests: dict[str, Path]) -> str:
    """Trains the small model on this boundary's tokens and scores the held-out text; one row of the table."""
    from tanuki_jax import checkpoint
    from tanuki_jax.data import sources
    from tanuki_jax.data.tokenizer import Tokenizer
    from tanuki_jax.evaluate.score import score_rows

    home = options.workdir / f"model-{boundary}"
    shutil.rmtree(home, ignore_errors=True)
    data = [f"--config.data.{lang}={options.workdir}/train-{lang}.jsonl" for lang in ("ja", "en")]
    shape = [f"--config.model.{key}={value}" for key, value in MODEL.items()]
    subprocess.run(
        tanuki("run", "--config=configs/local_text.py", f"--workdir={home}", *data, *shape)
        + [f"--config.model.vocab_size={-(-options.vocab_size // 128) * 128}"]
        + [f"--config.tokenizer.path={options.workdir / boundary}", f"--config.stages.pretrain.steps={options.steps}"]
        + [f"--config.stages.pretrain.save_every={options.steps}"],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    loaded = checkpoint.load(home / "stages" / "pretrain")
    tokenizer = Tokenizer(options.workdir / boundary)
    cells = []
    for path in tests.values():
        text = "".join(row.fields["text"] + "\n" for row in sources.read_rows(str(path)))[:SCORED]
        rows = [{"prompt": "\n", "completion": text[i : i + CHUNK]} for i in range(0, len(text), CHUNK)]
        total = sum(row["logprob"] for row in score_rows(loaded.cfg, loaded.params, tokenizer, rows))
        cells.append(f"{-total / math.log(2) / len(text.encode()):.4f}")
    last = json.loads((home / "stages/pretrain/metrics.jsonl").read_text().splitlines()[-1])
    sizes = {p: json.loads((p / "manifest.json").read_text()) for p in sorted((home / "data").glob("store-*"))}
    seen = 0.0
    for path, manifest in sizes.items():
        name = path.name.split("-")[1]
        size = sum(len(row.fields["text"].encode()) for row in sources.read_rows(f"{options.workdir}/train-{name}.jsonl"))
        seen += last[f"data/{name}/tokens"] * size / manifest["tokens"]
    return f"| {boundary} | " + " | ".join(cells) + f" | {last['tokens']:,} | {seen / 1e6:.2f} |"


if __name__ == "__main__":
    main()
