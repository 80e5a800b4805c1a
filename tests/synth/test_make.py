"""From a recipe to files of rows, against a server on this machine."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from tanuki_jax import config
from tanuki_jax.cli.main import main
from tanuki_jax.errors import UserError
from tanuki_jax.synth import make
from tests.synth.fake_server import serve

CONFIGS = sorted((Path(__file__).parents[2] / "configs/synth").glob("*.py"))


def recipe(url, **entries):
    c = config.recipe(name="test", seed=0)
    c.endpoints.writer = config.endpoint(url, model="fake", license="apache-2.0", max_tokens=32, concurrency=4, retries=1)
    c.endpoints.judge = config.endpoint(url, model="judge", max_tokens=32)
    for name, (method, options) in entries.items():
        c.synth[name] = config.synth(method, **{"generator": "writer", **options})
    return config.resolve(c)


def persona(**options):
    seeds = dict(personas="builtin:personas_ja", tasks="builtin:tasks_ja")
    return "persona", dict(seeds=seeds, items=6, **options)


def japanese(body):
    """A different sentence for each question, the same whenever it is asked."""
    return f"これは{hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:6]}番目の文です。"


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(path):
    return [[m["content"] for m in row["messages"]] for row in read(path)]


def test_rows_come_with_their_origin_and_are_never_made_again(tmp_path):
    with serve(japanese) as (url, bodies):
        entries = recipe(url, dialogues=persona())
        summary = make.make(entries, "dialogues", tmp_path / "d")
        assert len(bodies) == 6 * 4 and {body["model"] for body in bodies} == {"fake"}
        rows = read(summary.rows)
        assert len(rows) == summary.report["rows"] == 6 and len({row["meta"]["item"] for row in rows}) == 6
        for row in rows:
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 2
            assert [call["step"] for call in row["provenance"]] == ["q1", "a1", "q2", "a2"]
            assert {call["license"] for call in row["provenance"]} == {"apache-2.0"}
            assert row["meta"]["persona"] and row["meta"]["task"]
        again = make.make(entries, "dialogues", tmp_path / "d")
        assert again.report == summary.report and len(bodies) == 6 * 4
        assert "rows: 6" in (tmp_path / "d/report.txt").read_text(encoding="utf-8")
        with pytest.raises(UserError, match="made with other settings or seeds; rows are never made again"):
            make.make(recipe(url, dialogues=persona(turns=1)), "dialogues", tmp_path / "d")
        resumable = recipe(url, dialogues=persona(max_calls=1))
        assert make.make(resumable, "dialogues", tmp_path / "d").report == summary.report


def test_a_budget_ends_a_run_and_a_larger_one_goes_on_to_the_same_rows(tmp_path):
    with serve(japanese) as (url, bodies):
        whole = make.make(recipe(url, dialogues=persona()), "dialogues", tmp_path / "whole")
        del bodies[:]
        with pytest.raises(UserError, match="max_calls=10 is spent .* the same command goes on"):
            make.make(recipe(url, dialogues=persona(max_calls=10)), "dialogues", tmp_path / "parts")
        assert len(bodies) == 10 and not (tmp_path / "parts/rows.jsonl").exists()
        parts = make.make(recipe(url, dialogues=persona()), "dialogues", tmp_path / "parts")
    assert len(bodies) == 24 and texts(parts.rows) == texts(whole.rows)


def changed(entries, **options):
    """The recipe with other options of its entry `dialogues`, and other filters and licences."""
    values = config.to_dict(entries)
    values["filters"]["long"] = config.to_dict(config.filters(min_characters=1))
    values["endpoints"]["writer"]["license"] = "mit"
    values["synth"]["dialogues"] |= {"filters": "long", **options}
    return config.resolve(values)


def test_what_is_paid_for_is_not_asked_again_where_an_unfinished_entry_is_changed(tmp_path):
    with serve(japanese) as (url, bodies):
        with pytest.raises(UserError, match="is spent"):
            make.make(recipe(url, dialogues=persona(max_calls=10)), "dialogues", tmp_path / "d")
        more = changed(recipe(url, dialogues=persona()), items=8)
        summary = make.make(more, "dialogues", tmp_path / "d")
        assert len(bodies) == 8 * 4, "the first items are those of before, and so are their answers"
    assert {call["license"] for row in read(summary.rows) for call in row["provenance"]} == {"mit"}


def test_filters_may_be_changed_where_a_run_ends_after_its_last_answer(tmp_path, monkeypatch):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    with serve(japanese) as (url, bodies):
        entries = changed(recipe(url, dialogues=persona()))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(make, "_link", stop)
            make.make(entries, "dialogues", tmp_path)
        assert (tmp_path / "filters/rows.jsonl").is_file() and not (tmp_path / "rows.jsonl").exists()
        values = config.to_dict(entries)
        values["filters"]["long"]["min_characters"] = 1000
        summary = make.make(config.resolve(values), "dialogues", tmp_path)
        assert summary.report["filtered"] == {"min_characters": 6} and summary.report["rows"] == 0
        assert len(bodies) == 6 * 4


def test_too_many_failures_are_an_error_and_the_same_command_goes_on(tmp_path, monkeypatch):
    class Sick:
        complete = False
        items = 6
        failed = Counter(server_error=3)

    runs = []
    monkeypatch.setattr(make.endpoint, "run", lambda *arguments, **more: runs.append(more["max_failed"]) or Sick)
    with pytest.raises(UserError, match=r"3 of 6 items have failed \(server_error 3\), more than 2%.*the same command goes on"):
        make.make(recipe("http://127.0.0.1:1/v1", dialogues=persona()), "dialogues", tmp_path)
    assert runs == [0.0, 0.0, 0.02]


def test_rows_are_of_other_settings_where_anything_is_changed_that_they_depend_on(tmp_path, monkeypatch):
    personas, prompts = tmp_path / "personas.jsonl", tmp_path / "prompts.jsonl"
    personas.write_text('{"persona": "ある農家"}\n', "utf-8")
    prompts.write_text('{"text": "今日は何日ですか。"}\n', "utf-8")

    def fingerprint(generator_id="", method=None, **filters):
        entry = method or ("persona", dict(seeds=dict(personas=str(personas), tasks="builtin:tasks_ja"), filters="f"))
        values = config.to_dict(recipe("http://127.0.0.1:1/v1", dialogues=persona()))
        values["filters"]["f"] = config.to_dict(config.filters(**{"evaluation": str(prompts), **filters}))
        values["synth"]["dialogues"] = config.to_dict(config.synth(entry[0], generator="writer", **entry[1]))
        entries = config.resolve(values)
        summary = make.make(entries, "dialogues", tmp_path / "d", generator_id=generator_id, dry_run=True)
        return summary.report["fingerprint"]

    checked = "preferences", dict(seeds=dict(prompts="rules:prompts"), items=3, judge="rules")
    first, by_rules = fingerprint(), fingerprint(method=checked)
    different = {first, fingerprint("step 7"), fingerprint(max_characters=9)}
    assert fingerprint() == first
    personas.write_text('{"persona": "a pilot of a large airplane"}\n', "utf-8")
    different.add(fingerprint())
    prompts.write_text('{"text": "明日は何日ですか。そして明後日は?"}\n', "utf-8")
    different.add(fingerprint())
    monkeypatch.setattr("tanuki_jax.data.filters.VERSION", 0)
    different.add(fingerprint())
    assert len(different) == 6
    monkeypatch.setattr("tanuki_jax.synth.rules.code_files", lambda: [personas])
    assert fingerprint() in different and fingerprint(method=checked) != by_rules


def test_another_model_of_a_stage_is_asked_anew(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+1?\n2+2?\n", "utf-8")
    entry = "answer", dict(seeds=dict(prompts=str(prompts)), generator="")
    with serve(lambda body: f"{body['seed']}", models=("fake",)) as (url, bodies):
        entries = recipe("http://127.0.0.1:1/v1", rows=entry)
        first, second = (make.make(entries, "rows", tmp_path / i, generator_url=url, generator_id=i) for i in "ab")
    seeds = [body["seed"] for body in bodies]
    assert len(set(seeds)) == 4 and first.report["fingerprint"] != second.report["fingerprint"]
    assert (tmp_path / "a/rows.jsonl").samefile(tmp_path / "a/answers/rows.jsonl"), "no second copy on the disk"


def test_what_is_dropped_is_counted_by_its_reason(tmp_path):
    """The model answers the questions, and nothing else, in English."""

    def answer(body):
        asks = "人物:" in body["messages"][-1]["content"] or "利用者" in body["messages"][-1]["content"]
        return japanese(body) if asks else "I only speak English, and will go on to do so."

    with serve(answer) as (url, _):
        summary = make.make(recipe(url, dialogues=persona()), "dialogues", tmp_path)
    assert summary.report["dropped"] == {"language": 6} and summary.report["rows"] == 0
    assert [row["outcome"] for row in read(tmp_path / "skipped.jsonl")] == ["language"] * 6
    assert "language: 6" in summary.text


def longer(body):
    """Samples of different lengths; a judge that prefers the longer one, but always the first one of three prompts."""
    asked = body["messages"][-1]["content"]
    if body["model"] != "judge":
        return "答" * (1 + body["seed"] % 50)
    question = asked.split("<質問>\n")[1].split("\n</質問>")[0]
    if len(question) % 3 == 0:
        return "[[A]]"
    first, second = (len(asked.split(f"<回答{side}>\n")[1].split("\n</回答")[0]) for side in "AB")
    return f"長さは{first}と{second}です。\n" + ("[[A]]" if first > second else "[[B]]")


def test_not_one_row_is_an_error_with_the_reasons(tmp_path):
    with serve(lambda body: "This is no Japanese sentence at all.") as (url, _):
        for _ in range(2):
            with pytest.raises(UserError, match=r"synth d: not one row is left: language 6; correct the settings and remove"):
                make.make_all(recipe(url, d=persona()), tmp_path)
    assert len(read(tmp_path / "d/skipped.jsonl")) == 6


def test_preferences_are_judged_in_both_orders_and_reported(tmp_path):
    with serve(longer) as (url, bodies):
        options = dict(seeds=dict(prompts="rules:prompts"), items=20, judge="judge")
        summary = make.make(recipe(url, pairs=("preferences", options)), "pairs", tmp_path)
    report = summary.report["preferences"]
    assert report["prompts"] == 20 and report["pairs"] == summary.report["rows"] == 20 - sum(report["without_pair"].values())
    assert report["pairs"] > 3 and report["position_bias"]["first"] > 3 and report["position_bias"]["second"] == 0
    assert report["length_bias"]["chosen_longer"] == 1.0 and report["verdicts"]["agreed"] == report["pairs"]
    for row in read(summary.rows):
        assert len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"])
        assert {call["role"] for call in row["provenance"]} == {"generator", "judge"}
    skipped = read(tmp_path / "skipped.jsonl")
    assert {row["outcome"] for row in skipped} == report["without_pair"].keys()
    assert all(
        row["meta"]["verdicts"][0]["texts"] == ["[[A]]", "[[A]]"] for row in skipped if row["outcome"] == "first_position"
    )
    assert {body["temperature"] for body in bodies if body["model"] == "judge"} == {0.0}


def test_the_model_of_a_stage_takes_the_generators_place(tmp_path):
    def answer(body):
        return "2" if body["seed"] % 2 else "3"

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1?", "meta": {"answer": "2"}}) + "\n" for i in range(30)), "utf-8")
    options = dict(seeds=dict(prompts=str(prompts)), judge="rules", samples=3, generator="")
    with serve(answer, models=("fake",)) as (url, bodies):
        entries = recipe("http://127.0.0.1:1/v1", pairs=("preferences", options))
        with pytest.raises(UserError, match=r"synth.pairs.generator is '', which has no address.*only a stage of kind synth"):
            make.make(entries, "pairs", tmp_path / "a")
        summary = make.make(entries, "pairs", tmp_path / "b", generator_url=url)
        sampled = recipe("http://127.0.0.1:1/v1", pairs=("preferences", {**options, "generator": "writer"}))
        make.make(sampled, "pairs", tmp_path / "c", generator_url=url)
    assert all((row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("2", "3") for row in read(summary.rows))
    assert summary.report["rows"] + sum(summary.report["dropped"].values()) == 30 and summary.report["rows"] > 10
    assert {body["max_tokens"] for body in bodies} == {512, 32}


def test_entries_that_read_others_rows_come_after_them(tmp_path):
    entries = dict(harder=("evol", dict(seeds=dict(prompts="synth:first"))), first=persona(turns=1))
    with serve(japanese) as (url, _):
        dry = make.make_all(recipe(url, **entries), tmp_path, dry_run=True)
        assert [s.report.get("waits_for") for s in dry] == [None, "first"]
        assert dry[0].report["at_most"]["cost"] is None  # no price is set
        harder, first = None, None
        for summary in make.make_all(recipe(url, **entries), tmp_path, "harder"):
            harder, first = summary, harder
    assert (first.report["name"], harder.report["name"]) == ("first", "harder")
    originals = {row["messages"][0]["content"] for row in read(first.rows)}
    assert {row["meta"]["original"] for row in read(harder.rows)} == originals and len(originals) == 6
    circle = dict(a=("evol", dict(seeds=dict(prompts="synth:b"))), b=("evol", dict(seeds=dict(prompts="synth:a"))))
    with pytest.raises(UserError, match="a -> b -> a: a would be made from itself"):
        make.make_all(recipe("http://127.0.0.1:1/v1", **circle), tmp_path)


def test_all_entries_are_looked_at_before_the_first_is_asked(tmp_path):
    second = "rewrite", dict(seeds=dict(documents="nowhere.jsonl"))
    with serve(japanese) as (url, bodies):
        with pytest.raises(UserError, match="nowhere.jsonl"):
            make.make_all(recipe(url, first=persona(), second=second), tmp_path)
        assert not bodies


def test_magpie_needs_a_server_that_completes_text(tmp_path):
    entry = ("magpie", dict(items=3))
    with serve(japanese) as (url, bodies):
        assert make.make(recipe(url, rows=entry), "rows", tmp_path / "a").report["rows"] == 3
        assert [body["prompt"][-8:] for body in bodies if "prompt" in body] == ["### 指示:\n"] * 3
    with (
        serve(japanese, completions=False) as (url, _),
        pytest.raises(UserError, match="(?i)not.found|404|bad_request"),
    ):
        make.make(recipe(url, rows=entry), "rows", tmp_path / "b")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "persona",
            dict(seeds=dict(personas="builtin:personas_ja")),
            r"synth\.rows\.seeds has no tasks; persona needs personas and tasks",
        ),
        ("topic", dict(seeds=dict(topics="builtin:topics_ja", tasks="x")), "seeds names tasks; topic reads topics"),
        ("magpie", {}, "items is 0"),
        ("topic", dict(seeds=dict(topics="builtin:topics_ja"), language="fr"), "language is 'fr'; it must be ja or en"),
        (
            "topic",
            dict(seeds=dict(topics="builtin:topics_ja"), generator="x"),
            "generator is 'x', which is not in endpoints .*judge, writer",
        ),
        ("topic", dict(seeds=dict(topics="builtin:topics_ja"), filters="x"), "filters is 'x', which is not in filters"),
        ("topic", dict(seeds=dict(topics="builtin:topics_ja"), scores="nowhere.json"), "scores nowhere.json cannot be read"),
        ("rewrite", dict(seeds=dict(documents="x"), styles=("poem",)), "no template for 'poem'; there is summary"),
        ("preferences", dict(seeds=dict(prompts="rules:prompts")), "judge is empty"),
    ],
)
def test_a_wrong_entry_is_an_error_before_anything_is_asked(tmp_path, method, options, message):
    with pytest.raises(UserError, match=message):
        make.make(recipe("http://127.0.0.1:1/v1", rows=(method, options)), "rows", tmp_path)


def test_weak_fields_come_from_a_file_of_scores(tmp_path):
    scores = tmp_path / "scores.json"
    topics = ("topic", dict(seeds=dict(topics="builtin:topics_ja"), weakest=1, scores=str(scores)))
    for document in (
        {"maths": 0.5, "coding": 0.2},
        {"families": {"maths": 0.5, "coding": 0.2}},
        {"scores": {"families": {"coding": 0}}},
    ):
        scores.write_text(json.dumps(document))
        report = make.make(recipe("http://127.0.0.1:1/v1", rows=topics), "rows", tmp_path / "x", dry_run=True).report
        assert report["weak_fields"] == ["coding"] and report["items"] == 17
    for text, message in (("[]", "no scores by category"), ("{", "is not JSON")):
        scores.write_text(text)
        with pytest.raises(UserError, match=message):
            make.make(recipe("http://127.0.0.1:1/v1", rows=topics), "rows", tmp_path / "x")
    scores.unlink()  # with scores that are not there nothing at all is asked
    with serve(japanese) as (url, bodies), pytest.raises(UserError, match=r"scores\.json cannot be read"):
        make.make_all(recipe(url, first=persona(), rows=topics), tmp_path)
    assert not bodies and not (tmp_path / "first").exists()


# Requests for one item, by config and entry: the table of docs/synthetic_data.md.
CALLS = {
    ("evol", "dialogues"): 3,
    ("magpie", "dialogues"): 2,
    ("persona", "dialogues"): 4,
    ("preferences", "judged"): 4,
    ("preferences", "checked"): 4,
    ("preferences", "better"): 2,
    ("rewrite", "styles"): 6,
    ("topic", "problems"): 4,
    ("topic", "weak"): 4,
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_runs_dry(path, tmp_path, monkeypatch, capsys):
    """The estimate is what the table of methods says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.jsonl").write_text('{"text": "狸は夜に活動する。"}\n', "utf-8")
    (tmp_path / "scores.json").write_text('{"maths": 0.3, "coding": 0.5}')
    assert main(["synth", f"--config={path}", f"--workdir={tmp_path / 'w'}", "--dry_run", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["synth"]
    loaded = config.load([f"--config={path}"], needs_stages=False)
    assert {entry["name"] for entry in entries} == loaded.synth.keys()
    for entry in entries:
        assert entry["at_most"]["calls"] == entry["items"] * CALLS[path.stem, entry["name"]] > 0
    assert not (tmp_path / "w").exists()


def test_the_verb_makes_all_entries_and_needs_no_stages(tmp_path, capsys):
    with serve(japanese) as (url, _):
        path = tmp_path / "c.py"
        path.write_text(
            "from tanuki_jax import config\n"
            "def get_config():\n"
            "    c = config.recipe()\n"
            f"    c.endpoints.w = config.endpoint({url!r}, model='fake')\n"
            "    c.synth.t = config.synth('topic', seeds=dict(topics='builtin:topics_ja'), items=2, generator='w')\n"
            "    return c\n"
        )
        assert main(["synth", f"--config={path}", f"--workdir={tmp_path / 'w'}"]) == 0
    assert "rows: 2" in capsys.readouterr().out and len(read(tmp_path / "w/synth/t/rows.jsonl")) == 2
    assert main(["run", f"--config={path}", f"--workdir={tmp_path / 'v'}"]) == 1
    assert "no stages, only rows to make; tanuki synth makes them" in capsys.readouterr().err
    assert main(["synth", f"--config={path}", f"--workdir={tmp_path / 'w'}", "--name=x"]) == 1
    assert "--name: synth has no 'x'; it has t" in capsys.readouterr().err
