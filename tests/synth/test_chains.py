import json

import pytest

from tanuki_jax.endpoint import Answer
from tanuki_jax.synth import templates
from tests.synth.scripted import context, reason, rows

PERSONA = {"persona": "ある{農家}", "task": "計算を頼む", "license": "apache-2.0"}
TEXTS = {
    "q1": "質問: りんごは全部でいくつですか。",
    "a1": "三十個です。",
    "q2": "「その半分はいくつですか。」",
    "a2": "十五個です。",
}


def by_step(job):
    return TEXTS[job.step]


def contents(messages):
    return [m["content"] for m in messages]


@pytest.mark.parametrize("method", ["persona", "topic"])
def test_each_turn_is_asked_with_the_turns_before_in_view(method):
    item = PERSONA if method == "persona" else {"topic": "割合", "category": "maths"}
    [row], jobs = rows(context(method), item, by_step)
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 2
    assert contents(row["messages"]) == [
        "りんごは全部でいくつですか。",
        "三十個です。",
        "その半分はいくつですか。",
        "十五個です。",
    ]
    first, answer, second, last = jobs
    assert all(value in first.messages[0]["content"] for name, value in item.items() if name != "license")
    assert contents(answer.messages) == ["りんごは全部でいくつですか。"], "an answer sees no instruction"
    assert "利用者: りんごは全部でいくつですか。\n\nAI: 三十個です。" in second.messages[0]["content"]
    assert contents(last.messages) == contents(row["messages"])[:3]
    assert len({job.template for job in jobs}) == 1
    assert row["meta"]["item"] == "item" and row["meta"]["method"] == method


def test_there_are_as_many_turns_as_asked_for():
    texts = {f"q{i}": f"質問その{i}は何ですか。" for i in range(1, 5)} | {f"a{i}": f"答えその{i}です。" for i in range(1, 5)}
    [row], jobs = rows(context("persona", turns=4), PERSONA, lambda job: texts[job.step])
    assert len(row["messages"]) == len(jobs) == 8
    [row], jobs = rows(context("persona", turns=1), PERSONA, lambda job: texts[job.step])
    assert len(row["messages"]) == len(jobs) == 2


@pytest.mark.parametrize(
    ("step", "answer", "expected"),
    [
        ("q1", "   ", "empty"),
        ("q1", "質問:", "empty"),
        ("a1", Answer(text="三十", finish_reason="length"), "cut"),
        ("a2", "申し訳ありませんが、お答えできません。", "refused"),
        ("q2", Answer(text="はい", finish_reason="content_filter"), "refused"),
        ("a1", "はい\0。", "not_text"),
        ("q2", "\x1b[31m赤いりんごはいくつですか。", "not_text"),
        ("q1", "How many apples are there?", "language"),
        ("a2", "There are fifteen apples in all.", "language"),
        ("q2", "りんごは全部でいくつですか。", "repeated question"),
    ],
)
def test_an_answer_that_will_not_do_drops_the_item_with_its_reason(step, answer, expected):
    assert reason(context("persona"), PERSONA, lambda job: answer if job.step == step else by_step(job)) == expected


def test_answers_replace_those_that_a_prompt_came_with():
    messages = [
        {"role": role, "content": text}
        for role, text in (("system", "s"), ("user", "u1"), ("assistant", "old"), ("user", "u2"))
    ]
    [row], jobs = rows(context("answer"), {"messages": messages, "meta": {"family": "sum"}}, lambda job: f"new {job.step}")
    assert contents(row["messages"]) == ["s", "u1", "new a1", "u2", "new a2"] and row["meta"]["family"] == "sum"
    assert contents(jobs[1].messages) == ["s", "u1", "new a1", "u2"]


def test_a_prompt_of_a_known_language_wants_its_answer_in_it():
    item = {"messages": [{"role": "user", "content": "天気は?"}], "meta": {"lang": "ja"}}
    assert reason(context("answer", language="en"), item, lambda job: "It is sunny today.") == "language"


def test_the_right_answer_is_no_refusal():
    text = "申し訳ありませんが、お答えできません。"
    item = {"messages": [{"role": "user", "content": "何と言って断りますか。"}], "meta": {"lang": "ja"}}
    assert reason(context("answer"), item, lambda job: text) == "refused"
    [row], _ = rows(context("answer"), {**item, "meta": {"lang": "ja", "answer": text}}, lambda job: text)
    assert row["messages"][-1]["content"] == text


def test_a_document_is_written_in_every_style():
    made, jobs = rows(
        context("rewrite"),
        {"document": "狸は{夜}に活動する。"},
        lambda job: f"{job.step} is written" if job.step == "translation" else f"{job.step}、これは文章です。",
    )
    assert [row["meta"]["style"] for row in made] == list(templates.load("rewrite", "ja").texts)
    assert all("狸は{夜}に活動する。" in job.messages[0]["content"] for job in jobs)
    assert len({row["meta"]["item"] for row in made}) == 1 and {*made[0]} == {"text", "meta", "steps"}
    assert [row["steps"] for row in made] == [[row["meta"]["style"]] for row in made], "its own call alone"


def test_a_style_that_fails_is_kept_apart_and_the_others_stay():
    def answer(job):
        return {"summary": "", "qa": "狸は夜に活動する。"}[job.step]

    first, second = rows(context("rewrite", styles=("summary", "qa")), {"document": "狸は夜に活動する。"}, answer)[0]
    assert (first.reason, second.reason) == ("empty", "unchanged") and first.row["meta"]["style"] == "summary"
    assert (first.row["steps"], second.row["steps"]) == (["summary"], ["qa"])


def test_magpie_continues_the_bare_prefix_of_a_users_turn():
    def answer(job):
        return "今日の献立は何ですか。\n\n### 応答:\nカレー" if job.step == "q1" else "カレーです。"

    [row], (first, second) = rows(context("magpie", items=1), {"number": 3}, answer)
    assert contents(row["messages"]) == ["今日の献立は何ですか。", "カレーです。"]
    assert first.prompt.endswith("### 指示:\n") and not first.messages and first.sampling["stop"] == ["### 応答:"]
    assert contents(second.messages) == ["今日の献立は何ですか。"]


def test_evol_makes_the_last_question_harder_in_ways_that_the_item_decides():
    item = {"messages": [{"role": "user", "content": "1+1は?"}], "meta": {"answer": "2", "family": "sum"}}

    def answer(job):
        return "二です。" if job.step == "answer" else f"{job.step.split()[1]}段階目の難しい質問ですか。"

    [row], jobs = rows(context("evol", rounds=2), item, answer)
    assert contents(row["messages"]) == ["2段階目の難しい質問ですか。", "二です。"]
    assert "1+1は?" in jobs[0].messages[0]["content"] and "1段階目" in jobs[1].messages[0]["content"]
    assert row["meta"]["original"] == "1+1は?" and len(row["meta"]["ways"]) == 2
    assert "answer" not in row["meta"], "the answer to the prompt as it was is none to the harder one"
    ways = {rows(context("evol"), {**item, "id": str(i)}, answer)[0][0]["meta"]["ways"][0] for i in range(40)}
    assert ways == set(templates.load("evol", "ja").texts)
    assert reason(context("evol"), item, lambda job: "1+1は?") == "unchanged"


def test_chains_are_pure_functions_of_item_and_answers():
    first, second = (rows(context("persona"), PERSONA, by_step) for _ in range(2))
    assert json.dumps(first[0]) == json.dumps(second[0]) and first[1] == second[1]
