import pytest

from tanuki_jax.evaluate.suggested import suggested_questions


def row(family, lang, question, right=True, turns=1):
    message = {"role": "user", "content": question}
    return {
        "family": family,
        "lang": lang,
        "messages": [message] * turns,
        "answer": f"to {question}",
        "given": f"to {question}" * right,
    }


ROWS = [
    row("mean", "ja", "平均は?"),
    row("units", "ja", "何グラム?"),
    row("mean", "en", "Mean?"),
    row("units", "en", "Grams?"),
    row("units", "en", "Metres?", right=False),
    row("sum", "ja", "では合計は?", turns=3),
]
FAMILIES = {"mean": 1.0, "units": 0.5, "sum": 1.0}


def ask(good, rows=ROWS, families=FAMILIES, batch_size=16):
    """What is offered of a model that answers a second question rightly where (first, second) is in `good`."""
    asked = []

    def answers(conversations):
        asked.append(len(conversations))
        told = [(c[0]["content"], c[-1]["content"], c[1]) for c in conversations]
        assert all(said == {"role": "assistant", "content": f"to {first}"} for first, _, said in told)
        return [f"to {second}" if (first, second) in good else "?" for first, second, _ in told]

    found = suggested_questions(rows, families, lambda row, answer: answer == row["answer"], answers, batch_size)
    assert asked in ([], [batch_size // 2 * 2])
    return found


def both(one, other):
    return {(one, other), (other, one)}


@pytest.mark.parametrize("pair", [("平均は?", "Grams?"), ("何グラム?", "Mean?")])
def test_two_questions_that_are_answered_rightly_in_either_order_are_offered(pair):
    assert ask(both(*pair)) == list(pair)


def test_right_in_one_order_is_not_enough():
    assert ask({("平均は?", "Grams?"), ("Mean?", "何グラム?")}) == []


def test_two_families_go_before_one_and_the_best_before_others():
    everything = both("平均は?", "Mean?") | both("平均は?", "Grams?") | both("何グラム?", "Mean?")
    assert ask(everything) == ["平均は?", "Grams?"]
    better = {**FAMILIES, "units": 1.0, "mean": 0.9}
    assert ask(both("平均は?", "Mean?"), [r for r in ROWS if r["family"] == "mean"], better) == ["平均は?", "Mean?"]


def test_what_was_not_answered_or_needs_an_earlier_turn_is_not_asked():
    assert ask(both("何グラム?", "Metres?")) == ask(both("では合計は?", "Mean?")) == []


@pytest.mark.parametrize("rows", [[], ROWS[:2], ROWS[4:]])
def test_where_a_language_has_no_right_answer_nothing_is_asked(rows):
    assert ask(set(), rows) == []


def test_a_batch_that_is_too_small_asks_nothing_and_an_odd_one_asks_in_pairs():
    assert ask(both("平均は?", "Grams?"), batch_size=1) == []
    assert ask(both("平均は?", "Grams?"), batch_size=5) == ["平均は?", "Grams?"]
