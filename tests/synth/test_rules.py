import re
from random import Random

import pytest

from tanuki_jax.synth import rules
from tanuki_jax.synth.families import FAMILIES, LANGUAGES, LISTS

COUNT, SEED = 2500, 0
TRAINING = (*rules.SPLITS, rules.PROMPTS)
LIST_OF_DIGITS = re.compile(r"(?<![\d+=÷])\d(?:(?:、|, )\d){2,}(?![\d+=÷])")
STRING = re.compile(r"「([^「」]・[^「」]+)」")
STATED = re.compile(r"(?<!書くと)(?<!backwards is )" + STRING.pattern)  # in documents: the string itself, not its reverse


@pytest.fixture(scope="module")
def training():
    """COUNT rows of every training split."""
    return {split: list(rules.rows(split, COUNT, SEED)) for split in TRAINING}


@pytest.fixture(scope="module")
def held_out():
    return rules.held_out_prompts(400, SEED)


def questions_of(row):
    """What the user asks in a training row of any split but the documents."""
    if "text" in row:
        return re.findall(r"### 指示:\n(.*)\n\n### 応答:", row["text"])
    return [m["content"] for m in row.get("messages") or row["prompt"] if m["role"] == "user"]


def answers_of(row):
    """What the assistant is to say in a training row; of a pair the chosen answer."""
    if "text" in row:
        return re.findall(r"### 応答:\n(.*)", row["text"])
    return [m["content"] for m in [*(row.get("messages") or row["prompt"]), *row.get("chosen", [])] if m["role"] == "assistant"]


@pytest.mark.parametrize("split", TRAINING)
def test_row_i_depends_on_seed_split_and_i_alone(training, split):
    assert list(rules.rows(split, 30, SEED)) == training[split][:30]
    assert list(rules.rows(split, 30, SEED + 1)) != training[split][:30]


def test_splits_of_one_kind_do_not_hold_the_same_questions_in_the_same_order(training):
    first = [
        [questions_of(row)[0] for row in training[split][:100]]
        for split in ("synthetic_ja", "synthetic_en", "dialogues", "pairs", "prompts")
    ]
    assert all(a != b for i, a in enumerate(first) for b in first[:i])


def test_an_unknown_split_is_an_error():
    with pytest.raises(KeyError):
        next(rules.rows("nonsense", 1, 0))


def test_there_are_at_least_eight_families_and_all_are_drawn_in_both_languages(training):
    drawn = {(row["meta"]["family"], row["meta"]["lang"]) for row in training["pairs"]}
    assert len(FAMILIES) >= 8 and drawn == {(name, lang) for name in FAMILIES for lang in LANGUAGES}
    assert {name for row in training["dialogues"] for name in row["meta"]["families"]} == set(FAMILIES)


def test_every_family_is_held_out_in_both_languages_and_no_prompt_twice(held_out):
    assert {(row["family"], row["lang"]) for row in held_out} == {(name, lang) for name in FAMILIES for lang in LANGUAGES}
    assert len(held_out) == len({str(row["messages"]) for row in held_out}) == 400
    assert all(row["messages"][-1]["role"] == "user" for row in held_out)
    assert any(len(row["messages"]) == 3 for row in held_out)


@pytest.mark.parametrize("split", [s for s in TRAINING if not s.startswith("documents")])
def test_no_held_out_prompt_opens_a_training_conversation(training, held_out, split):
    assert not {row["messages"][0]["content"] for row in held_out} & {questions_of(row)[0] for row in training[split]}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_held_out_prompt_stands_in_a_training_document(training, lang):
    """More prompts than elsewhere, as a document rarely holds one."""
    text = "\n".join(row["text"] for row in training[f"documents_{lang}"])
    prompts = {row["messages"][0]["content"] for row in rules.held_out_prompts(1500, SEED + 1) if row["lang"] == lang}
    inside = (p for p in prompts if p in text)
    assert [p for p in inside if re.search(rf"(?<![\d、]){re.escape(p)}(?![\d、])", text)] == []


def test_no_sentence_of_a_document_can_be_a_held_out_prompt_of_what_must_be_known():
    """Exhaustive for the families whose prompts alone are held out."""
    for family in (f for f in FAMILIES.values() if f.held_out_key is None):
        contents = {family.draw(Random(i)) for i in range(3000)}
        for lang in LANGUAGES:
            said = "\n".join(family.say(c, lang) for c in contents)
            asked = {(c, family.prompt(c, lang, i)) for c in contents for i in range(len(family.ask[lang]))}
            assert [p for c, p in asked if rules.held_out(family, c, p) and p in said] == []


@pytest.mark.parametrize("split", TRAINING)
def test_no_held_out_list_or_string_is_in_training_in_any_phrasing(training, split):
    """Found by reading the text, not by what the generator says it drew."""
    documents, rows = split.startswith("documents"), training[split]
    asked = [row["text"] if documents else "\n".join(questions_of(row)) for row in rows]
    stated = asked if documents else ["\n".join(questions_of(row) + answers_of(row)) for row in rows]
    lists = {tuple(map(int, re.findall(r"\d", m))) for text in stated for m in LIST_OF_DIGITS.findall(text)}
    strings = {tuple(m.split("・")) for text in asked for m in (STATED if documents else STRING).findall(text)}
    assert len(lists) > 500 and len(strings) > 300
    assert [c for c in lists if rules.content_held_out(FAMILIES["sum"], c)] == []
    assert [c for c in strings if rules.content_held_out(FAMILIES["counting"], c)] == []


def test_what_is_held_out_does_not_depend_on_phrasing_language_family_or_order():
    lists, strings = FAMILIES["sum"], FAMILIES["counting"]
    assert {rules.content_held_out(f, c) for f in LISTS for c in ((1, 2, 3), (3, 1, 2))} == {
        rules.content_held_out(lists, (2, 1, 3))
    }
    assert rules.content_held_out(strings, ("a", "b")) == rules.content_held_out(FAMILIES["reversing"], ("a", "b"))
    share = [rules.content_held_out(lists, (a, b, c)) for a in range(1, 10) for b in range(a, 10) for c in range(b, 10)]
    assert 0.02 < sum(share) / len(share) < 0.2


def test_the_chosen_answer_is_never_the_rejected_one(training):
    for row in training["pairs"] + rules.held_out_pairs(500, SEED):
        [chosen], [rejected] = row["chosen"], row["rejected"]
        assert chosen["role"] == rejected["role"] == row["prompt"][0]["role"].replace("user", "assistant")
        assert chosen["content"] != rejected["content"] and row["prompt"][-1]["role"] == "user"


def test_all_faults_of_rejected_answers_occur(training):
    assert {row["meta"]["fault"] for row in training["pairs"]} == {"wrong", "evasive", "language"}


def test_held_out_pairs_ask_nothing_that_is_trained_on(training):
    asked = {row["prompt"][0]["content"] for row in rules.held_out_pairs(500, SEED)}
    assert not asked & {
        questions_of(row)[0]
        for split in ("dialogues", "pairs", "prompts", "synthetic_ja", "synthetic_en")
        for row in training[split]
    }


def test_turns_alternate_and_some_conversations_have_two(training):
    lengths = set()
    for row in training["dialogues"]:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        lengths.add(len(row["messages"]))
    assert lengths == {2, 4}


def test_correct_accepts_the_right_answer_and_refuses_others(held_out):
    everything = {row["answer"] for row in held_out}
    for row in held_out:
        assert rules.correct(row, row["answer"]) and rules.correct(row, f" {row['answer']}\n")
        assert [a for a in everything if rules.correct(row, a)] == [row["answer"]]
        assert not rules.correct(row, row["answer"][:-1]) and not rules.correct(row, "")
        assert not rules.correct(row, row["answer"] + row["answer"])


def test_prompts_end_with_the_user_and_carry_the_right_answer(training):
    answers = dict[str, str]()
    for row in training["dialogues"]:
        for asked, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            answers[asked["content"]] = answer["content"]
    known = 0
    for row in training["prompts"]:
        assert row["messages"][-1]["role"] == "user" and row["meta"].keys() == {"family", "lang", "answer"}
        assert rules.correct(row["meta"], row["meta"]["answer"])
        if len(row["messages"]) == 1 and row["messages"][0]["content"] in answers:
            assert rules.correct(row["meta"], answers[row["messages"][0]["content"]])
            known += 1
    assert known > 20
