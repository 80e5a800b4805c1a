import json

import pytest

from tanuki_jax.data import conversation
from tanuki_jax.endpoint import Answer, Drop, NoAnswer
from tanuki_jax.errors import UserError
from tanuki_jax.synth import report, rules
from tests.synth.scripted import context, rows

ITEM = {"messages": [{"role": "user", "content": "1+1は?"}], "meta": {"family": "sum", "answer": "2"}}


def judged(samples, verdict, item=ITEM, **options):
    """The row of an item whose samples are given, judged by `verdict(answer_a, answer_b)`."""
    made_for = context("preferences", samples=len(samples), judge="judge", **options)

    def answer(job):
        if job.role == "generator":
            return samples[job.sample]
        text = job.messages[-1]["content"]
        a, b = (text.split(f"<回答{side}>\n")[1].split("\n</回答")[0] for side in "AB")
        return verdict(a, b)

    [row], jobs = rows(made_for, item, answer)
    return row, jobs


def longer(a, b):
    return "[[A]]" if len(a) > len(b) else "[[B]]" if len(b) > len(a) else "[[C]]"


def test_a_pair_is_kept_where_both_orders_agree():
    row, jobs = judged([" 二\n", "二です"], longer)
    assert row["prompt"] == ITEM["messages"]
    assert [row[side][0] for side in ("chosen", "rejected")] == [{"role": "assistant", "content": t} for t in ("二です", "二")]
    assert [job.role for job in jobs] == ["generator"] * 2 + ["judge"] * 2 and jobs[-1].sampling["temperature"] == 0
    assert row["meta"]["verdicts"][0]["texts"] == ["[[B]]", "[[A]]"] and row["meta"]["family"] == "sum"


def test_a_row_is_what_dpo_stages_read():
    row, _ = judged(["二", "二です"], longer)
    chosen, rejected = conversation.pair_messages(conversation.read_fields(json.loads(json.dumps(row))))
    assert (chosen[-1]["content"], rejected[-1]["content"]) == ("二です", "二")


@pytest.mark.parametrize(
    ("samples", "verdict", "outcome"),
    [
        (["a", "bb"], lambda a, b: "[[A]]", "first_position"),
        (["a", "bb"], lambda a, b: "[[B]]", "second_position"),
        (["a", "bb"], lambda a, b: "[[C]]", "tie"),
        (["a", "bb"], lambda a, b: "[[C]]" if a == "a" else "[[B]]", "one_tie"),
        (["a", "bb"], lambda a, b: "either", "unparsable"),
        (["a", "bb"], lambda a, b: Answer(text="[[A]] because", finish_reason="length"), "unparsable"),
        (["a", "bb"], lambda a, b: NoAnswer("refused"), "failed"),
        (["a", " a\n"], longer, "identical"),
        (["", "", Answer(text="cut", finish_reason="length")], longer, "empty"),
        (["good", Answer(text="cut", finish_reason="length")], longer, "cut"),
        (["good", NoAnswer("overflow")], longer, "overflow"),
    ],
)
def test_all_else_is_kept_apart_with_its_texts(samples, verdict, outcome):
    row, _ = judged(samples, verdict)
    assert isinstance(row, Drop) and row.reason == outcome and row.row["prompt"] == ITEM["messages"]
    assert len(row.row["meta"].get("verdicts", [])) == (0 if outcome in ("identical", "empty", "cut", "overflow") else 1)


def test_of_many_samples_the_best_is_paired_with_the_worst():
    row, jobs = judged(["ccc", "a", "dddd", "bb", "a"], longer)
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("dddd", "a")
    assert len(jobs) == 5 + 4 * 3 and len(row["meta"]["verdicts"]) == 6


def test_best_and_worst_must_have_been_compared_with_one_mind():
    """The judge prefers the longer, but sees no difference between the longest and the shortest."""
    row, _ = judged(["ccc", "a", "dddd"], lambda a, b: "[[C]]" if {a, b} == {"a", "dddd"} else longer(a, b))
    assert row.reason == "tie" and [record["outcome"] for record in row.row["meta"]["verdicts"]].count("agreed") == 2


def by_rules(samples, item=ITEM):
    [row], jobs = rows(context("preferences", samples=len(samples), judge="rules"), item, lambda job: samples[job.sample])
    assert {job.role for job in jobs} == {"generator"}
    return row


def test_rules_choose_the_right_answer():
    row = by_rules(["3", "2", "5", " 2 "])
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("2", "3")
    assert by_rules(["3", "4"]).reason == "all_wrong"
    assert by_rules(["2", "2"]).reason == "identical"
    with pytest.raises(UserError, match="rules:prompts"):
        by_rules(["2", "3"], {"messages": ITEM["messages"]})


def test_rules_agree_with_the_checker_on_rule_made_prompts():
    for prompt in rules.rows(rules.PROMPTS, 50, 0):
        right = prompt["meta"]["answer"]
        row = by_rules([right + "x", right], prompt)
        assert row["chosen"][0]["content"] == right


def test_a_better_models_answer_is_chosen_without_a_judge():
    made_for = context("preferences", better="teacher")
    [row], jobs = rows(made_for, ITEM, lambda job: f"by {job.role}")
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("by better", "by generator") and len(jobs) == 2
    [row], _ = rows(made_for, ITEM, lambda job: "the same")
    assert row.reason == "identical"


TURNS = [{"role": "user", "content": "u1"}, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "u2"}]


def test_fastchats_prompts_of_one_and_two_turns_are_filled(tmp_path):
    path = tmp_path / "judge_prompts.jsonl"
    one = {"name": "pair-v2", "system_prompt": "one", "prompt_template": "{question}|{answer_a}|{answer_b}"}
    fields = "{question_1}|{answer_a_1}|{question_2}|{answer_a_2}|{answer_b_1}|{answer_b_2}"
    two = {"name": "pair-v2-multi-turn", "system_prompt": "two", "prompt_template": fields}
    path.write_text(f"{json.dumps(one)}\n{json.dumps(two)}\n", "utf-8")
    made_for = context("preferences", str(path), judge="judge")

    def asked(messages):
        _, jobs = rows(made_for, {"messages": messages}, lambda job: f"s{job.sample}" if job.role == "generator" else "[[A]]")
        return [m["content"] for m in jobs[2].messages]

    assert asked(TURNS[:1]) == ["one", "u1|s0|s1"]
    assert asked(TURNS) == ["two", "u1|a1|u2|s0|a1|s1"]
    system, text = asked([*TURNS, {"role": "assistant", "content": "a2"}, {"role": "user", "content": "u3"}])
    assert system == "one" and "u1" in text and "u3" in text and text.endswith("|s0|s1")


def test_the_report_counts_prompts_verdicts_and_biases():
    verdicts = [longer] * 3 + [lambda a, b: "[[A]]"] * 2 + [lambda a, b: "[[C]]", lambda a, b: "?"]
    made = [judged(["a", "bb"], verdict)[0] for verdict in verdicts]
    made.append(judged(["a", "a"], longer)[0])
    made.append(judged(["a", "bb", ""], lambda a, b: "?")[0])
    prompts = ((row.reason, row.row) if isinstance(row, Drop) else ("", row) for row in made)
    summary = report.preferences(prompts)
    assert (summary["prompts"], summary["pairs"], summary["retention"]) == (9, 3, 0.3333)
    assert summary["unusable"] == {"empty": 1}
    assert summary["without_pair"] == {"first_position": 2, "tie": 1, "unparsable": 2, "identical": 1}
    assert summary["comparisons"] == 8 and summary["agreement"] == 0.5
    assert summary["position_bias"] == {"share": 0.3333, "first": 2, "second": 0}
    assert summary["length_bias"] == {"chosen_longer": 1.0, "equal": 0.0, "chosen_characters": 2.0, "rejected_characters": 1.0}
    assert "position_bias:\n  share: 0.3333" in report.text(summary)
    assert report.preferences([])["retention"] is None
