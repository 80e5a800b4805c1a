"""A recipe that makes what it trains on: one command, any kill, the same bits; and what it says of its data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tanuki_jax import checkpoint
from tanuki_jax.files import read_json

CONFIG = Path(__file__).with_name("made_rows_config.py")
ROOT = Path(__file__).parents[2]
NAMES = ("answers", "pairs")
SECONDS = 600


def start(workdir, *flags):
    command = [sys.executable, "-m", "tanuki_jax.cli", *flags, f"--config={CONFIG}", f"--workdir={workdir}"]
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def run(workdir, *flags):
    assert start(workdir, *flags).wait(SECONDS) == 0, (workdir.parent / f"{workdir.name}.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with the stages before any rows are made."""
    workdir = tmp_path_factory.mktemp("made") / "trained"
    for stage in ("pretrain", "sft"):
        run(workdir, "train", f"--stage={stage}")
    return workdir


@pytest.fixture(scope="module")
def undisturbed(trained):
    workdir = trained.with_name("undisturbed")
    shutil.copytree(trained, workdir)
    run(workdir, "run")
    return workdir


def lines(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def rows(workdir, name):
    """The rows without their provenance, in which the times are others."""
    text = (workdir / "synth" / name / "rows.jsonl").read_text(encoding="utf-8")
    return [{**json.loads(line), "provenance": None} for line in text.splitlines()]


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_bits(trained, undisturbed):
    killed = trained.with_name("killed")
    shutil.copytree(trained, killed)
    for is_time in (
        lambda: lines(killed / "synth/answers/answers/answers.jsonl") >= 40,
        lambda: lines(killed / "synth/pairs/answers/answers.jsonl") >= 200,
        lambda: (killed / "stages/dpo/tokenizer").is_dir(),
    ):
        process, deadline = start(killed, "run"), time.monotonic() + SECONDS
        while not is_time() and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(killed, "run")
    for name in NAMES:
        assert rows(killed, name) == rows(undisturbed, name)
        asked = [json.loads(line)["id"] for line in (killed / f"synth/{name}/answers/answers.jsonl").open(encoding="utf-8")]
        assert len(asked) == len(set(asked)) == read_json(undisturbed / f"synth/{name}/report.json")["requests"]["answers"]
    for stage in ("again", "dpo"):
        first, second = (checkpoint.load(workdir / "stages" / stage).params for workdir in (undisturbed, killed))
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), first, second))


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
    run(undisturbed, "run")
    assert before == {path: path.stat().st_mtime_ns for path in (undisturbed / "synth").rglob("*") if path.is_file()}
