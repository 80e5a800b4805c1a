"""The spellings of conversations and preferences, and what a row must not say."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tanuki_jax.data import chat, sources
from tanuki_jax.data.conversation import FORMATS, check_messages, pair_messages, read_fields
from tanuki_jax.errors import UserError


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


ASKED = [user("狸は？"), assistant("山にいる。")]
LATER = [*ASKED, user("川は？"), assistant("下にある。")]
SPELT = {
    "messages as JSON": ({"messages": json.dumps(ASKED)}, ASKED),
    "messages as columns": ({"messages": {"role": ["user", "assistant"], "content": ["狸は？", "山にいる。"]}}, ASKED),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "狸は？"}, {"from": "gpt", "value": "山にいる。"}]}, ASKED),
    "ShareGPT under messages": (
        {"messages": [{"from": "user", "value": "狸は？"}, {"from": "gpt", "value": "山にいる。"}]},
        ASKED,
    ),
    "roles under conversations": ({"conversations": ASKED}, ASKED),
    "Dolly": ({"instruction": "狸は？", "context": "", "response": "山にいる。", "category": "qa"}, ASKED),
    "question and answer": ({"question": "狸は？", "answer": "山にいる。"}, ASKED),
    "question and response": ({"question": "狸は？", "response": "山にいる。"}, ASKED),
    "Alpaca with history": (
        {"instruction": "川は？", "input": "", "output": "下にある。", "history": [["狸は？", "山にいる。"]]},
        LATER,
    ),
    "Alpaca with system": (
        {"system": "短く。", "instruction": "狸は？", "output": "山にいる。"},
        [{"role": "system", "content": "短く。"}, *ASKED],
    ),
    "ten turns": (
        {f"{letter}{n}": f"{letter}{n}" for n in range(1, 12) for letter in "qa"},
        [m for n in range(1, 12) for m in (user(f"q{n}"), assistant(f"a{n}"))],
    ),
    "arguments without a value": (
        {"messages": [user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": {"n": 1, "unit": None}}}])]},
        [user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": {"n": 1}}}])],
    ),
    "keys without a value": ({"messages": [{**m, "name": None, "tool_calls": None} for m in ASKED], "text": None}, ASKED),
}


@pytest.mark.parametrize("name", SPELT)
def test_a_conversation_is_read_however_it_is_spelt(name):
    fields, messages = SPELT[name]
    if name != "arguments without a value":  # nulls within a value are left out where a file is read
        assert read_fields(fields)["messages"] == messages


@pytest.mark.parametrize("name", SPELT)
def test_parquet_and_json_lines_give_the_same_conversation(name, tmp_path):
    fields, messages = SPELT[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(fields) + "\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([fields]), tmp_path / "a.parquet")
    for file in ("a.jsonl", "a.parquet"):
        [row] = sources.read_rows(str(tmp_path / file))
        assert row.fields["messages"] == messages and sources.kind_of(row) == "dialogue"


REFUSED = {
    "two readings": ({"text": "a", "messages": ASKED}, "can be read as text or as messages; .*row_format"),
    "a gap": ({"q1": "a", "a1": "b", "q2": "c", "a2": "", "q3": "d", "a3": "e"}, "a2 is missing or empty"),
    "a question without an answer": ({"q1": "a", "a1": "b", "q2": "c"}, "a2 is missing or empty"),
    "KTO's label": ({"prompt": "q", "completion": "a", "label": False}, "called good or bad"),
    "KTO's label, true": ({"prompt": "q", "completion": "a", "label": True}, "called good or bad"),
    "a label beside messages": ({"messages": ASKED, "label": False}, "called good or bad"),
    "an unknown speaker": ({"conversations": [{"from": "robot", "value": "a"}]}, "message 0 is from 'robot'; known are"),
    "an empty answer": ({"question": "q", "answer": " \n"}, "empty question or answer"),
    "history of one": ({"instruction": "a", "output": "b", "history": [["c"]]}, r"history must be a list of \[question"),
    "two system messages": ({"system": "a", "messages": [{"role": "system", "content": "b"}, *ASKED]}, "keep one of them"),
    "messages that are no list": ({"messages": 5}, "messages must be a list"),
    "messages that are no JSON": ({"messages": "hello"}, "messages is text, but no JSON"),
    "a context that would be passed over": ({"question": "q", "answer": "a", "context": "c"}, "has context, which is not read"),
    "two answers": ({"instruction": "q", "output": "a", "response": "b"}, "both output and response"),
    "a system that is no text": ({"system": ["x"], "messages": ASKED}, "system must be text"),
    "an input that is no text": ({"instruction": "q", "input": ["x"], "output": "a"}, "input must be text"),
    "a weight of the row": ({"messages": ASKED, "weight": 0}, "has weight 0 beside its messages"),
    "a speaker that is a list": ({"conversations": [{"from": ["human"], "value": "a"}]}, "known are"),
    "nothing known": ({"title": "a"}, "neither text, nor a conversation.*title"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_cannot_be_followed_is_refused(name):
    fields, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        read_fields(fields)


def test_one_option_says_which_reading_a_row_has():
    fields = {"text": "all", "messages": ASKED, "prompt": "狸は？", "chosen": "山。", "rejected": "海。"}
    assert read_fields(fields, "text") == {"text": "all"}
    assert read_fields(fields, "messages")["messages"] == ASKED
    assert read_fields(fields, "preference") == {"prompt": "狸は？", "chosen": "山。", "rejected": "海。"}
    with pytest.raises(UserError, match="has no q1"):
        read_fields(fields, "turns")
    from tanuki_jax.config.schema import CHOICES

    assert set(CHOICES["row_format"]) == {"auto", *FORMATS}


def test_messages_say_what_is_wrong_with_them():
    for message, said in (
        (assistant("a", weight="0"), "message 0 has weight '0'; write the number 0"),
        (assistant("a", weight=0.5), "message 0 has weight 0.5"),
        (assistant("a", train=False), "message 0 has train False; write weight 0"),
        (assistant("a", loss=False), "message 0 has loss False"),
        (assistant(None), "message 0 must be"),
        (assistant("a", tool_calls="f"), "tool_calls must be a list"),
        (user([{"type": "image", "image": "x"}]), "part that is no text"),
    ):
        with pytest.raises(UserError, match=said):
            check_messages([message])
    check_messages([assistant("a", weight=1.0), assistant("a", weight=None), assistant(None, tool_calls=[{}])])


# --- preferences ------------------------------------------------------------------------------------------------------------

PROMPT = [{"role": "system", "content": "短く。"}, user("q")]
PAIR = [[*PROMPT, assistant("good")], [*PROMPT, assistant("bad")]]
PAIRS = {
    "answers": {"prompt": PROMPT, "chosen": "good", "rejected": "bad"},
    "a system field": {"system": "短く。", "prompt": "q", "chosen": "good", "rejected": [assistant("bad")]},
    "whole conversations": {"chosen": PAIR[0], "rejected": PAIR[1]},
    "whole conversations beside their prompt": {"prompt": "q", "chosen": PAIR[0], "rejected": PAIR[1]},
    "in JSON": {"prompt": json.dumps(PROMPT), "chosen": json.dumps(PAIR[0][-1:]), "rejected": json.dumps(PAIR[1][-1:])},
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_has_its_prompt_once_however_it_is_spelt(name):
    assert pair_messages(read_fields(PAIRS[name])) == PAIR


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "pair without a prompt"),
        ({"prompt": "q", "chosen": [user("r"), assistant("a")], "rejected": [user("r"), assistant("b")]}, "or not the prompt"),
        ({"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": "b"}, "or not the prompt"),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]}, "or not the prompt"),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q")]}, "does not follow the prompt"),
        ({"prompt": "q", "chosen": 5, "rejected": "b"}, "must be text or a list of messages"),
    ],
)
def test_a_pair_that_is_none_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        pair_messages(read_fields(fields))


def test_of_a_common_beginning_nothing_is_trained(tokenizer):
    begun = [user("q"), assistant("earlier"), user("r")]
    fields = read_fields({"chosen": [*begun, assistant("good")], "rejected": [*begun, assistant("bad")]})
    for (ids, mask), answer in zip(chat.encode_pair(tokenizer, fields), ("good", "bad"), strict=True):
        assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == f"{answer}</s>"
