"""A recipe that makes what it trains on: one command, any kill, the same bits; and what it says of its data."""

import json
import shutil
from pathlib import Path

import pytest

from tanuki_jax.files import read_json
from tests.recipe.killed_runs import assert_same_bits, kill_run, lines, run

CONFIG = Path(__file__).with_name("made_rows_config.py")
NAMES = ("answers", "pairs")


LATER = ("synth", "answers", "again", "samples", "dpo")  # directories of what comes after the first stages
PREPARED = ("*answers*", "*pairs*", "pack-*", "reference-*")  # of their data
REPORTS = ("summary.json", "report.html", "data_card.md")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("made") / "undisturbed"
    run(CONFIG, workdir, "run")
    return workdir


def rows(workdir, name):
    """The rows without their provenance, in which the times are others."""
    text = (workdir / "synth" / name / "rows.jsonl").read_text(encoding="utf-8")
    return [{**json.loads(line), "provenance": None} for line in text.splitlines()]


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_bits(undisturbed):
    """From the first stages on, which are those of the other run."""
    killed = undisturbed.with_name("killed")
    shutil.copytree(undisturbed, killed, ignore=shutil.ignore_patterns(*LATER, *PREPARED, *REPORTS))
    for is_time in (
        lambda: lines(killed / "synth/answers/answers/answers.jsonl") >= 40,
        lambda: lines(killed / "synth/pairs/answers/answers.jsonl") >= 200,
        lambda: (killed / "stages/dpo/tokenizer").is_dir(),
    ):
        kill_run(CONFIG, killed, is_time)
    run(CONFIG, killed, "run")
    for name in NAMES:
        assert rows(killed, name) == rows(undisturbed, name)
        asked = [json.loads(line)["id"] for line in (killed / f"synth/{name}/answers/answers.jsonl").open(encoding="utf-8")]
        assert len(asked) == len(set(asked)) == read_json(undisturbed / f"synth/{name}/report.json")["requests"]["answers"]
    for stage in ("again", "dpo"):
        assert_same_bits(stage, undisturbed, killed)


@pytest.mark.slow
def test_report_and_data_card_say_what_was_made(undisturbed):
    reports = {entry["name"]: entry["synth"] for entry in read_json(undisturbed / "summary.json")["stages"] if "synth" in entry}
    assert reports.keys() == {"answers", "samples"}
    pairs = reports["samples"]
    assert pairs["rows"] == len(rows(undisturbed, "pairs")) > 0
    assert pairs["rows"] + sum(pairs["dropped"].values()) == pairs["items"]
    page = (undisturbed / "report.html").read_text(encoding="utf-8")
    assert "Rows that the model made" in page and "all_wrong" in page
    card = (undisturbed / "data_card.md").read_text(encoding="utf-8")
    assert "`synth:pairs`" in card and f"apache-2.0 {pairs['rows']:,}" in card and "all_wrong" in card


@pytest.mark.slow
def test_every_row_says_where_it_comes_from(undisturbed):
    for name in NAMES:
        for line in (undisturbed / "synth" / name / "rows.jsonl").open(encoding="utf-8"):
            for call in json.loads(line)["provenance"]:
                assert call.keys() >= {"job", "model", "prompt_sha256", "sampling", "seed", "item", "date", "license"}


@pytest.mark.slow
def test_a_finished_run_makes_nothing_again(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "synth").rglob("*") if path.is_file()}
    run(CONFIG, undisturbed, "run")
    assert before == {path: path.stat().st_mtime_ns for path in (undisturbed / "synth").rglob("*") if path.is_file()}
