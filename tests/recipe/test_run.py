import base64
import io
import json
import math
import re
import shlex
import struct
import time

import pytest

from tanuki_jax.cli.main import main
from tanuki_jax.data.tokenizer import Tokenizer
from tests import tiny_recipe
from tests.tiny_recipe import CONFIG, STAGES, times

COMMON = {"step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"}
MIXTURE = {"moe/aux_loss", "moe/z_loss", "moe/load", "moe/dropped"}
PREFERENCE = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
METRICS = {"pretrain": set(), "continued": MIXTURE, "sft": MIXTURE, "dpo": MIXTURE | PREFERENCE}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tiny_recipe.trained(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def summary(workdir):
    return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))


def metrics(workdir, stage):
    lines = (workdir / "stages" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_summary_has_the_documented_schema(summary):
    assert summary.keys() == {"stages", "config", "versions"}
    keys = {
        "name",
        "kind",
        "steps",
        "tokens",
        "seconds",
        "tokens_per_second",
        "goodput",
        "seconds_by_phase",
        "final_loss",
        "scores",
    }
    assert [entry["name"] for entry in summary["stages"]] == list(STAGES)
    assert [entry["kind"] for entry in summary["stages"]] == ["pretrain", "upcycle", "pretrain", "sft", "dpo"]
    for entry in summary["stages"]:
        this = summary["config"]["stages"][entry["name"]]
        assert entry.keys() == keys
        assert entry["steps"] == this["steps"] and entry["tokens"] == this["steps"] * this["batch_size"] * this["seq_len"]
        assert entry["kind"] == "upcycle" or (entry["seconds"] > 0 and math.isfinite(entry["final_loss"]))
        assert entry["scores"]["prompts"] == 30 and 0 <= entry["scores"]["pair_accuracy"] <= 1
    assert {"jax", "numpy", "python", "tanuki_jax"} <= summary["versions"].keys()


@pytest.mark.parametrize("stage", METRICS)
def test_metrics_have_the_documented_names(workdir, stage):
    rows = metrics(workdir, stage)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["tokens"] for row in rows] == [n * rows[0]["tokens"] for n in (1, 2, 3, 4)]
    others = (MIXTURE | PREFERENCE) - METRICS[stage]
    for row in rows:
        assert COMMON | METRICS[stage] <= row.keys() and not others & row.keys()
        assert row["mfu"] is None  # nobody knows the peak of a CPU


def test_the_load_of_the_experts_is_a_share(workdir):
    for row in metrics(workdir, "sft"):
        assert [len(layer) for layer in row["moe/load"]] == [4, 4]
        assert all(sum(layer) == pytest.approx(1, abs=1e-4) for layer in row["moe/load"])


def test_the_text_loss_starts_at_the_entropy_of_a_guess_and_falls(workdir):
    first, *_, last = [row["loss"] for row in metrics(workdir, "pretrain")]
    assert first == pytest.approx(math.log(768), abs=0.1)
    assert metrics(workdir, "continued")[-1]["loss"] < first


def test_a_preference_stage_starts_where_policy_and_reference_agree(workdir):
    first = metrics(workdir, "dpo")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_a_copying_upcycle_changes_no_answer(workdir, summary):
    before, after = (json.loads((workdir / "stages" / s / "pair_margins.json").read_text()) for s in ("pretrain", "upcycle"))
    assert after == pytest.approx(before, abs=1e-3)
    scores = {entry["name"]: {**entry["scores"], "seconds": 0} for entry in summary["stages"]}
    assert scores["pretrain"] == scores["upcycle"]


def test_every_stage_holds_its_tokenizer_and_its_newest_checkpoints(workdir):
    assert len({Tokenizer(workdir / "stages" / stage / "tokenizer").fingerprint for stage in STAGES}) == 1
    steps = {stage: {p.name for p in (workdir / "stages" / stage / "checkpoints").iterdir()} for stage in STAGES}
    assert steps == {stage: {"0"} if stage == "upcycle" else {"2", "4"} for stage in STAGES}


def test_nothing_temporary_is_left(workdir):
    assert [path for path in workdir.rglob("*") if "tmp" in path.name] == []


def test_the_report_needs_nothing_but_itself(workdir):
    page = (workdir / "report.html").read_text(encoding="utf-8")
    references = re.findall(r"""(?:\bsrc|\bhref|\baction)\s*=\s*["']?([^"'\s>]+)""", page)
    assert [r for r in references if not r.startswith(("#", "data:"))] == []
    assert [u for u in re.findall(r"url\(\s*[\"']?([^)\"']*)", page) if not u.startswith(("#", "data:"))] == []
    assert "@import" not in page and "<script" not in page
    assert all(stage in page for stage in STAGES) and "極小の狸" in page


def test_the_reports_font_has_every_japanese_letter_of_the_page(workdir):
    from fontTools.ttLib import TTFont

    page = (workdir / "report.html").read_text(encoding="utf-8")
    [data] = re.findall(r"url\(data:font/woff;base64,([A-Za-z0-9+/=]+)\)", page)
    known = TTFont(io.BytesIO(base64.b64decode(data))).getBestCmap()
    letters = {c for c in page if "\u3041" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff"}
    assert len(letters) > 50 and {c for c in letters if ord(c) not in known} == set()


def test_the_same_command_again_trains_nothing(workdir, summary, capsys):
    stages, began = times(workdir / "stages"), time.monotonic()
    data = times(workdir / "data")
    assert main(["run", CONFIG, f"--workdir={workdir}"]) == 0
    assert time.monotonic() - began < 20
    report, chat = capsys.readouterr().out.splitlines()[-2:]
    assert shlex.split(report) == ["report:", str(workdir.absolute() / "report.html")]  # to be pasted in any directory
    assert shlex.split(chat)[-2:] == ["chat", f"--checkpoint={workdir.absolute() / 'stages' / STAGES[-1]}"]
    assert times(workdir / "stages") == stages and times(workdir / "data") == data
    assert json.loads((workdir / "summary.json").read_text(encoding="utf-8")) == summary


def scalars(directory, tag):
    """Step and value of each entry of a TensorBoard file: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    [file] = directory.iterdir()
    data = file.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        yield from ((event.step, value.simple_value) for value in event.summary.value if value.tag == tag)


def test_one_stage_alone_writes_tensorboard_too_and_waits_for_its_parent(workdir, tmp_path, capsys):
    flags = [CONFIG, f"--workdir={tmp_path}", "--config.scoring.prompts=0", "--config.tensorboard=True"]
    flags += [f"--config.tokenizer.path={workdir / 'stages/pretrain/tokenizer'}"]
    assert main(["train", "--stage=upcycle", *flags]) == 1
    assert "upcycle needs stage pretrain, which is not finished" in capsys.readouterr().err
    assert main(["train", "--stage=pretrain", *flags]) == 0
    rows = metrics(tmp_path, "pretrain")
    written = dict(scalars(tmp_path / "stages/pretrain/tensorboard", "loss"))
    assert written == pytest.approx({row["step"]: row["loss"] for row in rows})
    assert rows[0]["loss"] == pytest.approx(metrics(workdir, "pretrain")[0]["loss"], rel=1e-5)  # same recipe, same order
