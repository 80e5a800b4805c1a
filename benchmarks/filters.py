"""Filters: precision and recall on rows that people have labelled, speed, and near-duplicates among 100,000 documents.

python benchmarks/filters.py [--documents=100000] [--pairs=2000]

The documents are drawn from a vocabulary of made-up words by Zipf's law, 400 characters each.  Of `pairs` of them a copy is
planted, edited until its exact Jaccard similarity is just above 0.8; of as many others one that is just below 0.75.  Prints a
report in Markdown.
"""

import argparse
import collections
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tanuki_jax.config.synthesis import Filters
from tanuki_jax.data import sources
from tanuki_jax.data.filters import filter_rows, near_duplicates
from tanuki_jax.data.sources import Row

LABELLED = Path(__file__).parents[1] / "tests/data/filters"
SIMILAR, OTHER = (0.80, 0.83), (0.70, 0.75)  # Jaccard similarities of planted pairs, and of pairs that are none
LENGTH = 400


def settings(language: str) -> Filters:
    """All filters that ask no judge, as the labelled rows mean them."""
    return Filters(
        language=language,
        min_characters=4,
        max_characters=800 if language == "ja" else 1200,
        repetition=True,
        leaks=True,
        pii="drop",
        near_duplicates=0.8,
        evaluation=str(LABELLED / "evaluation.jsonl"),
    )


def judge_labelled() -> Iterator[tuple[dict, str]]:
    """The `meta` of each labelled row (id, label, language, half), and the filter that drops it, or keep."""
    rows = list(sources.read_rows(str(LABELLED / "labelled.jsonl")))
    for language in ("ja", "en"):
        results: dict[int, str] = {}
        part = [row for row in rows if row.fields["meta"]["language"] == language]

        def on_drop(row: Row, reason: str, detail: str, results: dict[int, str] = results) -> None:
            results[row.fields["meta"]["id"]] = "length" if reason.endswith("_characters") else reason

        for row in filter_rows(part, settings(language), on_drop):
            results[row.fields["meta"]["id"]] = "keep"
        yield from ((row.fields["meta"], results[row.fields["meta"]["id"]]) for row in part)


def precision_and_recall(judged: list[tuple[dict, str]]) -> dict[str, tuple[int, float, float]]:
    """By label: how many rows have it, precision and recall."""
    hits, guesses, labels = (collections.Counter[str]() for _ in range(3))
    for meta, result in judged:
        labels[meta["label"]] += 1
        guesses[result] += 1
        hits[result] += result == meta["label"]
    return {label: (n, hits[label] / max(1, guesses[label]), hits[label] / n) for label, n in sorted(labels.items())}


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of LENGTH characters, of words of hiragana and kanji drawn by Zipf's law."""
    rng = np.random.default_rng(seed)
    kana, kanji = [chr(c) for c in range(0x3042, 0x3094)], [chr(c) for c in range(0x4E00, 0x4E00 + 2000)]
    words = ["".join(rng.choice(kana if rng.random() < 0.6 else kanji, rng.integers(1, 5))) for _ in range(20_000)]
    chances = 1 / np.arange(10, len(words) + 10)
    chances /= chances.sum()
    chosen = rng.choice(len(words), (count, LENGTH // 2), p=chances)
    return ["".join([words[i] for i in row])[:LENGTH] for row in chosen]


def edit(text: str, between: tuple[float, float], rng: np.random.Generator) -> str:
    """The text with characters replaced until its similarity to the first one lies in a range."""
    grams = near_duplicates.shingles(text)
    for _ in range(200):
        characters = list(text)
        while True:
            characters[rng.integers(len(characters))] = chr(rng.integers(0x30A1, 0x30F0))
            similarity = near_duplicates.jaccard(grams, near_duplicates.shingles("".join(characters)))
            if similarity < between[1]:
                break
        if similarity >= between[0]:
            return "".join(characters)
    raise RuntimeError("no such edit")


def plant(documents: list[str], pairs: int) -> tuple[list[Row], set[str]]:
    """Rows in random order, and the places of those that are copies; the originals come first."""
    rng = np.random.default_rng(1)
    rows = [Row(f"document {i}", {"text": text}) for i, text in enumerate(documents)]
    copies = [Row(f"copy {i}", {"text": edit(documents[i], SIMILAR, rng)}) for i in range(pairs)]
    others = [Row(f"other {i}", {"text": edit(documents[i], OTHER, rng)}) for i in range(pairs, 2 * pairs)]
    later = [*rows[len(rows) // 2 :], *copies, *others]
    rng.shuffle(later)  # type: ignore[arg-type]
    return [*rows[: len(rows) // 2], *later], {row.where for row in copies}


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=2000)
    options = parser.parse_args()
    print(f"# Filters, {time.strftime('%Y-%m-%d')}\n\n{platform.machine()}, {os.cpu_count()} cores\n")
    print(f"    python benchmarks/filters.py {' '.join(sys.argv[1:])}\n", flush=True)
    judged = list(judge_labelled())
    halves = ("dev", "test", "later")
    print(f"Rows, precision and recall on {len(judged)} labelled rows:\n")
    print(f"| filter | all | {' | '.join(halves)} |\n|---|---|---|---|---|")
    parts = [judged, *([j for j in judged if j[0]["half"] == half] for half in halves)]
    results = [precision_and_recall(part) for part in parts]
    for label in results[0]:
        cells = [f"{r[label][0]}: {r[label][1]:.3f}, {r[label][2]:.3f}" if label in r else "" for r in results]
        print(f"| {label} | {' | '.join(cells)} |")

    documents = make_documents(options.documents)
    print(f"\nSpeed on one core, documents of {LENGTH} characters:\n\n| filter | documents a second |\n|---|---|")
    sample = [Row("", {"text": text}) for text in documents[:3000]]
    evaluation = str(LABELLED / "evaluation.jsonl")
    for name, filters in {
        "length": Filters(min_characters=10, max_characters=10_000),
        "language": Filters(language="ja"),
        "leaks": Filters(leaks=True),
        "repetition": Filters(repetition=True),
        "evaluation": Filters(evaluation=evaluation),
        "pii": Filters(pii="mask"),
        "all of them": Filters("ja", 10, 10_000, True, True, "mask", evaluation=evaluation),
    }.items():
        start = time.process_time()
        collections.deque(filter_rows(sample, filters), 0)
        print(f"| {name} | {len(sample) / (time.process_time() - start):,.0f} |")

    rows, copies = plant(documents, options.pairs)
    del documents, sample
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dropped: set[str] = set()
    wall, cpu = time.perf_counter(), time.process_time()
    passed = sum(1 for _ in filter_rows(rows, Filters(near_duplicates=0.8), lambda row, *_: dropped.add(row.where)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    bands = near_duplicates.bands_for(0.8)
    print(
        f"\nNear-duplicates (Jaccard 0.8, {bands} bands of {near_duplicates.PERMUTATIONS // bands}): {len(rows):,} documents "
        f"in {wall:.1f} s ({cpu:.1f} s of CPU); {len(copies & dropped)} of {len(copies)} planted copies found "
        f"({len(copies & dropped) / len(copies):.2%}), {len(dropped - copies)} others dropped "
        f"({len(dropped - copies) / (len(rows) - len(copies)):.3%}), {options.pairs} of them at {OTHER[0]} to {OTHER[1]}; "
        f"{memory / passed:,.0f} bytes of memory a document."
    )


if __name__ == "__main__":
    sys.exit(main())
