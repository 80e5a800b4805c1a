"""The verdicts that a judge may write, on a set written by hand (verdicts.jsonl), and how they are read."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tanuki_jax.synth import verdicts

RECORDS = [json.loads(line) for line in Path(__file__).with_name("verdicts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_set_has_every_outcome_in_200_pairs():
    counts = Counter(record["outcome"] for record in RECORDS)
    assert len(RECORDS) == 200 and counts.keys() == set(verdicts.OUTCOMES) and min(counts.values()) >= 6


def test_the_kept_pairs_are_exactly_the_right_ones():
    wrong = []
    for record in RECORDS:
        outcome, winner = verdicts.judge(record["first"], record["second"])
        if (outcome, winner) != (record["outcome"], -1 if record["winner"] is None else record["winner"]):
            wrong.append((record, outcome, winner))
    assert wrong == []


def test_the_same_verdicts_in_the_other_order_name_the_other_answer():
    for record in RECORDS:
        outcome, winner = verdicts.judge(record["second"], record["first"])
        assert outcome == record["outcome"]
        if record["winner"] is not None:
            assert winner == 1 - record["winner"]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", "A"),
        ("Not [[A]], but [[B]]", ""),
        ('Not "[[A]]", but [[B]]', "B"),
        ('"[[A]]"', "A"),
        ('"[[A]]" was asked for.', ""),
        ("B's answer [[A]] A's", "A"),
        ("<think>[[A]]", ""),
    ],
)
def test_one_mark_counts_that_is_not_quoted(text, verdict):
    assert verdicts.parse(text) == verdict


def test_reading_is_linear_in_the_length_of_a_text():
    """A judge that babbles must not hold up a run."""
    for piece in ('"', "「", "`", "[[", "> ", "<think>", "'[[", "[[A]]", '"[[A]]" '):
        assert verdicts.parse(piece * 20_000) in ("", "A")
