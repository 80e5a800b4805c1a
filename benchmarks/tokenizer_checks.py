"""Trains the recipe's tokenizer on a corpus and checks what it promises: time, memory, losslessness, boundaries, agreement.

python benchmarks/tokenizer_checks.py --input='corpus/*.jsonl.gz' --language_field=meta.lang --language_weights=ja=0.6,en=0.4 \\
    --modern=question_full.jsonl,reference_answer.jsonl --transformers=/path/to/python --workdir=runs/tokenizer_checks
"""

import argparse
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizer import modern, tanuki
from watched import ROOT, watched

sys.path.insert(0, str(ROOT))
AUTO = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for line in sys.stdin:
    print(json.dumps(tokenizer.encode(json.loads(line), add_special_tokens=False, split_special_tokens=True)), flush=True)
"""


def main() -> None:
    """Prints one line per check; exit code 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--language_field", default="meta.lang")
    parser.add_argument("--language_weights", default="")
    parser.add_argument("--vocab_size", type=int, default=65_000)
    parser.add_argument("--boundary", choices=("morpheme", "predicate", "bunsetsu"), default="bunsetsu")
    parser.add_argument("--modern", default="", help="comma-separated .jsonl files of turns, checked too")
    parser.add_argument("--examples", type=int, default=100_000, help="strings that hypothesis makes")
    parser.add_argument("--transformers", default="", help="python of an environment with transformers; empty = none")
    parser.add_argument("--workdir", type=Path, required=True)
    options = parser.parse_args()
    shown = " ".join(re.sub(r"/[^,=]*/", "", a) for a in sys.argv[1:])
    print(f"# What the tokenizer promises, {time.strftime('%Y-%m-%d')}\n\n{platform.machine()}, {os.cpu_count()} cores\n")
    print(f"    python benchmarks/tokenizer_checks.py {shown}\n", flush=True)
    home = options.workdir / "tokenizer"
    shutil.rmtree(home, ignore_errors=True)
    flags = [f"--input={options.input}", f"--language_field={options.language_field}", f"--boundary={options.boundary}"]
    flags += [f"--vocab_size={options.vocab_size}", f"--output={home}"] + (
        [f"--language_weights={options.language_weights}"] * bool(options.language_weights)
    )
    seconds, memory, said = watched(tanuki("tokenizer", "train", *flags))
    print(f"training: {seconds:.0f} s, {memory:.2f} GiB of all processes; {said.strip().partition(': ')[2]}", flush=True)
    texts = [*corpus(options), *(t for path in filter(None, options.modern.split(",")) for t in modern(Path(path)))]
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    sound = [check_lines(home, lines, options.transformers), check_strings(home, options.examples), check_pieces(home, options)]
    sys.exit(not all(sound))


def corpus(options: argparse.Namespace) -> Iterator[str]:
    """The texts that the tokenizer was trained on."""
    from tanuki_jax.data import sources

    for row in sources.read_rows(options.input):
        yield row.fields["text"]


def check_lines(home: Path, lines: list[str], transformers: str) -> bool:
    """Round trip, special tokens, and the ids of SentencePiece and of AutoTokenizer, on every line."""
    import sentencepiece

    from tanuki_jax.data.tokenizer import Tokenizer

    ours, theirs = Tokenizer(home), sentencepiece.SentencePieceProcessor(model_file=str(home / "tokenizer.model"))
    special = set(ours.special.values())
    encoded = [ours.encode(line) for line in lines]
    exact = sum(ours.decode(ids) == line for line, ids in zip(lines, encoded, strict=True))
    injected = sum(not special.isdisjoint(ids) for ids in encoded)
    print(f"round trip: {exact:,} of {len(lines):,} lines exact; special tokens: in {injected} lines", flush=True)
    other = [(a, b) for a, b in zip(encoded, theirs.encode(lines), strict=True) if a != b]
    gaps = [abs(math.fsum(map(theirs.get_score, a)) - math.fsum(map(theirs.get_score, b))) for a, b in other]
    equal = sum(gap < 1e-3 for gap in gaps)
    share = 1 - len(other) / len(lines)
    print(f"SentencePiece agrees on {share:.4%}; of the {len(other)} other lines {equal} have equal scores", flush=True)
    sound = exact == len(lines) and not injected and share >= 0.9995 and equal == len(other)
    if transformers:
        command = [transformers, "-c", AUTO, str(home)]
        asked = "".join(json.dumps(line) + "\n" for line in lines)
        found = subprocess.run(command, input=asked, capture_output=True, text=True, check=True).stdout.splitlines()
        same = sum(json.loads(a) == b for a, b in zip(found, encoded, strict=True))
        print(f"AutoTokenizer agrees on {same / len(lines):.4%}", flush=True)
        sound = sound and same / len(lines) >= 0.9995
    return sound


def check_strings(home: Path, examples: int) -> bool:
    """Strings of every kind of character come back, and none gives a special token."""
    import hypothesis
    from hypothesis import strategies as st

    from tanuki_jax.data.tokenizer import Tokenizer

    tokenizer, seen = Tokenizer(home), 0
    special = set(tokenizer.special.values())
    odd = "\0\t\r\v\x1b\x7f\u200d\ufe0f\u3099\u309a\u0301ＡＢ１ｶﾞ①㈱﷽\U0001f469\U0001f1ef\u2028\u2581\ufeff 　"
    spelt = st.sampled_from([*tokenizer.special, "<0x41>", "<s", "</s>", "###"])
    text = st.one_of(st.text(), st.text(alphabet=odd), st.lists(st.one_of(st.text(max_size=4), spelt)).map("".join))

    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(text)
    def comes_back(string: str) -> None:
        nonlocal seen
        seen += 1
        ids = tokenizer.encode(string)
        assert tokenizer.decode(ids) == string and special.isdisjoint(ids), string

    comes_back()
    print(f"strings made by hypothesis: {seen:,}, all exact, none with a special token", flush=True)
    return seen >= examples


def check_pieces(home: Path, options: argparse.Namespace) -> bool:
    """Every Japanese piece of several characters lies inside a unit of the segmented text."""
    from tanuki_jax.data.tokenizer import Tokenizer
    from tokenization.report import is_japanese
    from tokenization.segment import Segmenter, count_units

    tokenizer = Tokenizer(home)
    pieces = {p for p in map(tokenizer.piece, range(tokenizer.vocab_size)) if is_japanese(p) and len(p.strip()) > 1}
    counts, _ = count_units((("", text) for text in corpus(options)), options.boundary, "ipadic")
    longest = max(map(len, pieces))
    outside = set(pieces)
    for unit in counts[""]:
        for start in range(len(unit)):
            outside.difference_update(unit[start : start + n] for n in range(2, min(longest, len(unit) - start) + 1))
    alone = {boundary: Segmenter(boundary) for boundary in dict.fromkeys((options.boundary, "morpheme"))}
    cut = [
        f"{sum(len(s.units(p.strip())) > 1 for p in pieces) / len(pieces):.1%} as {boundary}" for boundary, s in alone.items()
    ]
    print(f"Japanese pieces of several characters: {len(pieces):,}; outside every unit: {len(outside)} {sorted(outside)[:5]}")
    print(f"cut when seen alone: {', '.join(cut)}", flush=True)
    return not outside


if __name__ == "__main__":
    main()
