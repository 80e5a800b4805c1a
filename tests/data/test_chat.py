import functools
import json
import re
import shutil
import time
from itertools import groupby

import jinja2
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tanuki_jax.data import chat
from tanuki_jax.data.conversation import read_fields
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError

SYSTEM = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
NASTY = [
    "</s>",
    "<s>",
    "<unk>",
    "<llm-code>",
    "<0x0A>",
    "\ue0000\ue001",
    "\ue001",
    "{{ eos_token }}",
    "{% if",
    "### 応答:\n",
    "\n\n",
    " ",
]
CONTENT = st.lists(st.sampled_from([*NASTY, "狸", "🦝", "山の奥", "moon", "12", "▁"]) | st.text(max_size=5), max_size=6).map(
    "".join
)
quick = settings(max_examples=30, deadline=None)


@st.composite
def conversations(draw):
    """Turns of user and assistant, sometimes after a system sentence, ending with either."""
    roles = (
        ["system"] * draw(st.integers(0, 1))
        + ["user", "assistant"] * draw(st.integers(1, 3))
        + ["user"] * draw(st.integers(0, 1))
    )
    return [{"role": role, "content": draw(CONTENT)} for role in roles]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@functools.cache
def compiled(directory):
    """The saved template under plain Jinja; the generation tags are transformers' own and print nothing."""
    saved = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    source = re.sub(r"{%-? *(end)?generation *-?%}", "", saved["chat_template"])
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)


def plain(tokenizer, messages, add_generation_prompt=False):
    """What Jinja alone makes of the template."""
    return compiled(tokenizer.directory).render(
        messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=add_generation_prompt
    )


def trained_texts(tokenizer, ids, mask):
    """The text of each run of ids that are in the mask."""
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for marked, run in runs if marked]


@settings(max_examples=60, deadline=None)
@given(conversations(), st.booleans())
def test_text_mask_and_control_tokens_of_a_conversation_are_those_of_its_jinja_template(tokenizer, messages, prompt):
    ids, mask = chat.encode_chat(tokenizer, messages, add_generation_prompt=prompt)
    assert tokenizer.decode(ids) == plain(tokenizer, messages, prompt)
    answers = [m["content"] + "</s>" for m in messages if m["role"] == "assistant"]
    assert set(mask) <= {0, 1} and trained_texts(tokenizer, ids, mask) == answers
    controls = [i for i in ids if i in tokenizer.special.values()]  # the text of a message spells none
    assert controls == [tokenizer.bos] + [tokenizer.eos] * len(answers)


GOLDEN = {
    "one turn": ([user("こんにちは"), assistant("やあ")], f"<s>{SYSTEM}\n\n### 指示:\nこんにちは\n\n### 応答:\nやあ</s>"),
    "two turns": (
        [user("1+1は"), assistant("2です。"), user("では2+2は"), assistant("4です。")],
        f"<s>{SYSTEM}\n\n### 指示:\n1+1は\n\n### 応答:\n2です。</s>\n\n### 指示:\nでは2+2は\n\n### 応答:\n4です。</s>",
    ),
    "system": (
        [{"role": "system", "content": "短く。"}, user("名前は"), assistant("狸")],
        "<s>短く。\n\n### 指示:\n名前は\n\n### 応答:\n狸</s>",
    ),
    "spaces and blank lines stay": (
        [user(" a \n"), assistant("\n b ")],
        f"<s>{SYSTEM}\n\n### 指示:\n a \n\n\n### 応答:\n\n b </s>",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_template_is_tanukis(tokenizer, name):
    messages, expected = GOLDEN[name]
    assert tokenizer.decode(chat.encode_chat(tokenizer, messages)[0]) == expected
    assert chat.render(messages) == expected.replace("<s>", "").replace("</s>", "")


def test_a_prompt_ends_where_the_answer_begins(tokenizer):
    messages = [user("q"), assistant("a"), user("r")]
    prompt, mask = chat.encode_chat(tokenizer, messages, add_generation_prompt=True)
    assert tokenizer.decode(prompt).endswith("r\n\n### 応答:\n") and trained_texts(tokenizer, prompt, mask) == ["a</s>"]
    ids, _ = chat.encode_chat(tokenizer, [*messages, assistant("b")])
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ([user("a"), {"role": "robot", "content": "b"}], "message 1"),
        ([{"role": "user"}], "message 0"),
        ([user(None)], "message 0"),
        (["text"], "message 0"),
    ],
)
def test_a_malformed_conversation_is_an_error_that_names_the_message(tokenizer, messages, message):
    with pytest.raises(UserError, match=message):
        chat.encode_chat(tokenizer, messages)


def test_a_long_conversation_takes_no_square_of_time(tokenizer):
    begin = time.process_time()
    chat.encode_chat(tokenizer, [{"role": "user", "content": "a"}] * 3000, add_generation_prompt=True)
    assert time.process_time() - begin < 5  # below 1 s; in a square of time it is 10 s


def test_a_conversation_without_an_assistant_turn_is_an_error(tokenizer):
    with pytest.raises(UserError, match="without an assistant turn"):
        chat.encode_dialogue(tokenizer, [user("a"), user("b")])


@settings(max_examples=20, deadline=None)
@given(conversations(), CONTENT, CONTENT)
def test_of_a_pair_only_the_last_answers_are_in_the_mask(tokenizer, messages, chosen, rejected):
    assume(chosen.strip() and rejected.strip() and chosen != rejected)
    prompt = [*messages, user("?")]
    sides = chat.encode_pair(tokenizer, {"prompt": prompt, "chosen": chosen, "rejected": [assistant(rejected)]})
    for (ids, mask), answer in zip(sides, (chosen, rejected), strict=True):
        assert trained_texts(tokenizer, ids, mask) == [answer + "</s>"]
        assert tokenizer.decode(ids) == plain(tokenizer, [*prompt, assistant(answer)])


@pytest.mark.parametrize("same", ["a", [assistant("a")]])
def test_a_pair_of_equal_answers_is_refused(tokenizer, same):
    with pytest.raises(UserError, match="chosen and rejected answers are the same"):
        chat.encode_pair(tokenizer, {"prompt": "q", "chosen": "a", "rejected": same})


def test_an_empty_answer_is_refused_where_it_would_be_trained_on(tokenizer):
    for row in ({"prompt": "q", "chosen": "", "rejected": "a"}, {"prompt": "q", "chosen": "a", "rejected": ""}):
        with pytest.raises(UserError, match="empty answer"):
            chat.encode_pair(tokenizer, row)
    with pytest.raises(UserError, match="empty answer"):
        chat.encode_dialogue(tokenizer, read_fields({"prompt": "q", "completion": ""})["messages"])
    earlier = read_fields({"prompt": [user("q"), assistant(""), user("r")], "completion": "a"})["messages"]
    ids, mask = chat.encode_dialogue(tokenizer, earlier)
    assert trained_texts(tokenizer, ids, mask) == ["a</s>"]


def test_a_prompts_earlier_answers_are_not_trained_on(tokenizer):
    turns = [user("q"), assistant("earlier"), user("r")]
    ids, mask = chat.encode_dialogue(tokenizer, read_fields({"prompt": turns, "completion": "later"})["messages"])
    assert trained_texts(tokenizer, ids, mask) == ["later</s>"]
    everything = chat.encode_dialogue(tokenizer, [*turns, assistant("later")])
    assert everything[0] == ids and trained_texts(tokenizer, *everything) == ["earlier</s>", "later</s>"]


def test_a_plain_string_prompt_is_one_user_message(tokenizer):
    rows = ({"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in ("q", [user("q")]))
    assert len({str(chat.encode_pair(tokenizer, row)) for row in rows}) == 1


@pytest.fixture(scope="module")
def with_template(tokenizer, tmp_path_factory):
    @functools.cache
    def make(template):
        directory = tmp_path_factory.mktemp("template") / "tokenizer"
        shutil.copytree(tokenizer.directory, directory)
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
        return Tokenizer(directory)

    return make


INDENTED = """\
{% for m in messages %}
  {% if m['content'] or true %}
<CLS>{{ m['role'] }}
{{ m['content'] }}<SEP>
  {% endif %}
{% endfor %}
"""


@quick
@given(conversations())
def test_another_template_without_generation_tags_is_masked_too(with_template, messages):
    other = with_template(INDENTED)
    ids, mask = chat.encode_chat(other, messages)
    assert other.decode(ids) == "".join(f"<CLS>{m['role']}\n{m['content']}<SEP>\n" for m in messages) == plain(other, messages)
    assert trained_texts(other, ids, mask) == [m["content"] + "<SEP>" for m in messages if m["role"] == "assistant"]


def test_a_tokenizer_without_a_template_is_an_error_that_says_so(with_template):
    with pytest.raises(UserError, match="chat_template"):
        chat.encode_chat(with_template(""), [user("a")])


# --- conversations spelt in other ways --------------------------------------------------------------------------------

ASKED = [{"role": "user", "content": "狸は？"}, {"role": "assistant", "content": "山にいる。"}]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "狸は？", "completion": "山にいる。"},
        {"prompt": ASKED[:1], "completion": ASKED[1:]},
        {"instruction": "狸は？", "input": "", "output": "山にいる。"},
        {"instruction": "狸は？", "input": None, "output": "山にいる。"},
        {"instruction": "狸は？", "output": "山にいる。"},
        {"q1": "狸は？", "a1": "山にいる。"},
        {"q1": "狸は？", "a1": "山にいる。", "q2": "", "a2": ""},
        {"q1": "狸は？", "a1": "山にいる。", "q2": None, "a2": None},
    ],
)
def test_a_conversation_is_read_however_it_is_spelt(fields):
    assert read_fields(fields)["messages"] == ASKED


def test_an_input_follows_its_instruction_and_turns_follow_each_other():
    [asked, _] = read_fields({"instruction": "訳せ。", "input": "tanuki", "output": "狸"})["messages"]
    assert asked["content"] == "訳せ。\n\ntanuki"
    turns = read_fields({"q1": "一", "a1": "二", "q2": "三", "a2": "四"})["messages"]
    assert [(m["role"], m["content"]) for m in turns] == [
        ("user", "一"),
        ("assistant", "二"),
        ("user", "三"),
        ("assistant", "四"),
    ]


@pytest.mark.parametrize("fields", [{"text": "a"}, {"prompt": "a", "chosen": "b", "rejected": "c"}])
def test_other_rows_are_no_conversation(fields):
    assert "messages" not in read_fields(fields)


@pytest.mark.parametrize(
    "fields", [{"instruction": "a", "output": ""}, {"q1": "", "a1": "b"}, {"instruction": 3, "output": "b"}]
)
def test_an_empty_answer_is_an_error(fields):
    with pytest.raises(UserError):
        read_fields(fields)
