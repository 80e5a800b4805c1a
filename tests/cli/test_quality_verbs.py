"""`tanuki data filter` and `tanuki data audit` as commands."""

import json

import pytest

from tanuki_jax.cli.main import main
from tests.synth.fake_server import serve_judge


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    values = [{"text": "猫は一日の大半を寝て過ごす。"}, {"text": "今すぐ注文。"}, {"text": "電話は03-1234-5678です。"}]
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


def test_filter_prints_what_it_did(rows, tmp_path, capsys):
    flags = [f"--input={rows}", f"--output={tmp_path / 'out'}", "--min_characters=8", "--pii=mask"]
    assert main(["data", "filter", *flags, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rows"], summary["passed"], summary["masked"]) == (3, 2, {"phone": 1})
    assert main(["data", "filter", *flags]) == 1
    assert "is there already" in capsys.readouterr().err


def test_filter_asks_a_judge(rows, tmp_path, capsys):
    flags = [f"--input={rows}", f"--output={tmp_path / 'out'}", "--min_quality=0.5"]
    assert main(["data", "filter", *flags]) == 1
    assert "--judge" in capsys.readouterr().err
    with serve_judge(lambda prompt: ("yes" if "猫" in prompt else "no", {})) as (url, _):
        assert main(["data", "filter", *flags, f"--judge={url}", "--judge_model=other"]) == 1
        assert "it has no model 'other'; it has judge-model" in capsys.readouterr().err
        assert main(["data", "filter", *flags, f"--judge={url}"]) == 0
    assert "min_quality               2   66.7%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--near_duplicates=1.5"], "must be at least 0 and at most 1"),
        (["--language=fr"], "it must be ja, en or empty"),
        (["--pii=hide"], "invalid choice: 'hide'"),
        (["--against=no_such.jsonl", "--near_duplicates=0.8"], "no such file: 'no_such.jsonl'"),
        (["--judge=http://me:secret@127.0.0.1:9", "--min_quality=0.5"], "--judge has a password or key in its address"),
        (["--judge=127.0.0.1:9", "--min_quality=0.5"], "--judge is '127.0.0.1:9'; it must be an address"),
        (["--against=other.jsonl", "--leaks"], "give --near_duplicates"),
        (["--judge=http://127.0.0.1:9", "--leaks"], "--judge is for --min_quality and --dependent_turns"),
        (["--judge=http://127.0.0.1:9", "--min_quality=0.5"], "start its server"),
    ],
)
def test_bad_input_is_one_line(rows, tmp_path, capsys, flags, message):
    assert main(["data", "filter", f"--input={rows}", f"--output={tmp_path / 'out'}", *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_an_audit_by_hand_goes_on_with_downloaded_labels(rows, tmp_path, capsys):
    command = ["data", "audit", f"--input={rows}", f"--output={tmp_path / 'audit'}", "--sample=2", "--page_only", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["labelled"] == 0
    (tmp_path / "audit/labels.jsonl").write_text('{"number": 0, "category": "spam", "by": "hand"}\n')
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["sample"], result["labelled"]) == (3, 2, 1)
    assert result["shares"][0]["category"] == "spam" and result["shares"][0]["share"] == 1.0


def test_an_audit_by_a_judge(rows, tmp_path, capsys):
    with serve_judge(lambda prompt: ("2" if "注文" in prompt else "1", {})) as (url, _):
        assert main(["data", "audit", f"--input={rows}", f"--output={tmp_path / 'audit'}", "--sample=9", f"--judge={url}"]) == 0
    assert "advertising" in capsys.readouterr().out
    assert json.loads((tmp_path / "audit/result.json").read_text())["labelled"] == 3
