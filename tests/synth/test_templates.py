import json

import pytest

from tanuki_jax.config.synthesis import METHODS
from tanuki_jax.errors import UserError
from tanuki_jax.synth import templates


@pytest.mark.parametrize("method", METHODS)
def test_both_languages_have_the_same_steps(method):
    ja, en = (templates.load(method, language) for language in ("ja", "en"))
    assert list(ja.texts) == list(en.texts)
    assert method in ("answer", "magpie") or ja.version != en.version


def test_what_is_filled_in_stays_as_it_is():
    loaded = templates.Templates({"step": "{{x}} {a}: {b}"}, "")
    assert loaded.render("step", a="{b} {{ %s", b="\\1") == "{x} {b} {{ %s: \\1"


def user_file(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text, "utf-8")
    return str(path)


def test_a_users_file_replaces_some_texts_and_changes_the_version(tmp_path):
    path = user_file(tmp_path, '[en.persona]\nquestion = "{persona} {task}?"\n[en.rewrite]\npoem = "A poem of {document}"\n')
    loaded, ours = templates.load("persona", "en", path), templates.load("persona", "en")
    assert loaded.texts["question"] == "{persona} {task}?" and loaded.texts["follow_up"] == ours.texts["follow_up"]
    assert loaded.version != ours.version and templates.load("persona", "ja", path) == templates.load("persona", "ja")
    assert "poem" in templates.load("rewrite", "en", path).texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[en.persona]\nquestion = "{persona} {job}"',
            r"mine\.toml: \[en\.persona\] question: unknown field \{job\}.*\{persona\}, \{task\}",
        ),
        ('[en.persona]\nquestion = "{persona!r} {task}"', "{persona} stands alone between its braces"),
        ('[jp.persona]\nquestion = "{persona} {task}"', r"\[jp\]: no such language"),
        ("# nothing", "is empty"),
        ('[en.persona]\nquestion = "{persona.x} {task}"', "unknown field {persona.x}"),
        ('[en.persona]\nquestion = "{} {task}"', "unknown field {}"),
        ('[en.persona]\nquestion = "{persona} {task} {"', "a brace is written {{ or }}"),
        ('[en.persona]\nquestion = "{persona}"', r"question has no \{task\}"),
        ('[en.persona]\nquestions = "{persona}"', "questions: no such step; there is question, follow_up"),
        ("[en.persona]\nquestion = 3", "question must be text"),
        ('[en.personas]\nquestion = "x"', "no such method"),
        ('en = "x"', "is no table"),
        ("[en.persona", "is not TOML"),
    ],
)
def test_a_bad_file_is_an_error_that_names_step_and_field(tmp_path, text, message):
    with pytest.raises(UserError, match=message.replace("{", r"\{").replace("}", r"\}") if "\\" not in message else message):
        templates.load("persona", "en", user_file(tmp_path, text))


def test_a_missing_file_is_an_error():
    with pytest.raises(UserError, match="nowhere.toml cannot be read: No such file"):
        templates.load("persona", "en", "nowhere.toml")


JUDGE = {
    "name": "pair-v2",
    "type": "pairwise",
    "system_prompt": "Be fair.",
    "prompt_template": "{question}\n{answer_a}\n{answer_b}",
}
TURNS = "{question_1}{answer_a_1}{question_2}{answer_a_2}|{question_1}{answer_b_1}{question_2}{answer_b_2}"


def judges(tmp_path, *records):
    path = tmp_path / "judge_prompts.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), "utf-8")
    return str(path)


def test_judge_prompts_of_fastchat_are_read(tmp_path):
    other = {"name": "single-v1", "system_prompt": "", "prompt_template": "{unknown}"}
    path = judges(tmp_path, other, JUDGE, {**JUDGE, "name": "pair-v2-multi-turn", "prompt_template": TURNS})
    texts = templates.load("preferences", "ja", path).texts
    assert texts["pair-v2"] == JUDGE["prompt_template"] and texts["pair-v2-multi-turn system"] == "Be fair."


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {**JUDGE, "prompt_template": "{question}{answer_a}{answer_b}{ref}"},
            r"jsonl:1: pair-v2: prompt_template: unknown field \{ref\}",
        ),
        ({**JUDGE, "prompt_template": "{question}{answer_a}"}, r"has no \{answer_b\}"),
        ({"name": "pair-v2", "system_prompt": ""}, "no text in 'prompt_template'"),
        ({"name": "single-v1"}, "no judge prompt of the name pair-v2"),
        ("{", "jsonl:1 is not JSON"),
    ],
)
def test_a_bad_file_of_judge_prompts_is_an_error(tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        templates.load("preferences", "ja", judges(tmp_path, record))
