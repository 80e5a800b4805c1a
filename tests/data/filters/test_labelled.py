"""Precision and recall on rows that were labelled by hand with the filter that must drop them."""

import collections
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LABELS = ("keep", "length", "language", "leaks", "repetition", "evaluation", "pii", "near_duplicates")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_filters", ROOT / "benchmarks/filters.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def judged(benchmark):
    return list(benchmark.judge_labelled())


def test_the_set_is_large_and_has_every_filter_in_both_languages_and_halves():
    lines = Path(__file__).with_name("labelled.jsonl").read_text(encoding="utf-8").splitlines()
    metas = [json.loads(line)["meta"] for line in lines]
    assert len(metas) >= 300
    counts = collections.Counter((meta["label"], meta["language"], meta["half"]) for meta in metas)
    halves = {(label, language, half) for label in LABELS for language in ("ja", "en") for half in ("dev", "test")}
    assert {key for key in counts if key[2] != "later"} == halves


@pytest.mark.parametrize("half", ["dev", "test", "later"])
def test_precision_and_recall_of_each_filter(benchmark, judged, half):
    """Half `later` holds rows that were written after the filters, to evade them."""
    result = benchmark.precision_and_recall([(meta, result) for meta, result in judged if meta["half"] == half])
    for label, (rows, precision, recall) in result.items():
        assert rows and precision >= 0.9 and recall >= 0.9, (label, precision, recall)


def test_a_filter_that_is_off_drops_nothing(benchmark, monkeypatch):
    """So that the figures are those of the filters, and not of the reader."""
    monkeypatch.setattr(benchmark, "settings", lambda language: benchmark.Filters())
    assert {result for _, result in benchmark.judge_labelled()} == {"keep"}


def test_planted_near_duplicates_are_found_and_others_stay(benchmark):
    rows, copies = benchmark.plant(benchmark.make_documents(600), 60)
    dropped = set()
    list(benchmark.filter_rows(rows, benchmark.Filters(near_duplicates=0.8), lambda row, *_: dropped.add(row.where)))
    assert len(copies & dropped) >= 0.95 * len(copies)
    assert not dropped - copies
