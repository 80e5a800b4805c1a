"""Chat templates of every kind that other people write: the text and ids of plain Jinja, and what is trained of them."""

import functools
import json
from itertools import groupby

import jinja2.ext
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from tanuki_jax.data import chat
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tests.data import byte_level

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + END }}{% endif %}{% endfor %}"
)
THINK = (  # Qwen3's kind: thoughts are taken out of the content, and written in the last turn alone
    "{% for m in messages %}{% set c = m.content %}{% set r = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name + ' ' }}"
    "{{ (call.function.arguments | tojson) + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A:' }}{% generation %}{{ m.content }}{% endgeneration %}"
    "{{ '<|im_end|>' }}{% else %}{{ 'U:' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
MACRO = (
    "{% macro text(c) %}{{ c | trim }}{% endmacro %}{% for m in messages %}{% set content = text(m.content) %}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' ~ content ~ '<|im_end|>' }}{% endfor %}"
)
TEMPLATES = {  # name -> template, how it ends a turn, how an answer comes out, the tokenizer's eos
    "chatml": (CHATML.replace("CONTENT", "m.content"), "<|im_end|>", lambda c: c, "<|endoftext|>"),
    "trim": (CHATML.replace("CONTENT", "(m.content | trim)"), "<|im_end|>", str.strip, "<|im_end|>"),
    "macro": (MACRO, "<|im_end|>", str.strip, "<|im_end|>"),
    "space before the answer": (INST.replace("END", "eos_token"), "</s>", lambda c: c, "</s>"),
    "space before eos": (INST.replace("END", "' ' + eos_token"), " </s>", lambda c: c, "</s>"),
    "marks without the end": (MARKED, "<|im_end|>", lambda c: c, "<|im_end|>"),
}
SPELT = ["</s>", "<s>", "<|im_end|>", "<|im_start|>", "<|im_", "end|>", "\U000f0000", "{{ eos_token }}", " ", "\n"]
CONTENT = st.lists(st.sampled_from([*SPELT, "狸", "🦝", "Paris"]) | st.text(max_size=4), max_size=5).map("".join)
CONTENT = CONTENT.map(lambda text: text if text.strip() else "a")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The tokenizers of TEMPLATES, made once."""
    root = tmp_path_factory.mktemp("others")
    return {
        name: byte_level.make(root / str(i), template, eos=eos)
        for i, (name, (template, _, _, eos)) in enumerate(TEMPLATES.items())
    }


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


@functools.cache
def compiled(source):
    """A template in plain Jinja, without marks."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    return environment.from_string(source.replace("{% generation %}", "").replace("{% endgeneration %}", ""))


def plain(tokenizer: Tokenizer, messages, prompt=False, **values):
    """What Jinja alone makes of the template."""
    values = {"add_generation_prompt": prompt, "tools": None, **tokenizer.named, **values}
    return compiled(tokenizer.chat_template).render(messages=messages, **values)


def trained_texts(tokenizer, ids, mask):
    """The text of each run of ids that are trained."""
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for marked, run in runs if marked]


@st.composite
def conversations(draw):
    turns = draw(st.integers(1, 3))
    return [m for _ in range(turns) for m in (user(draw(CONTENT)), assistant(draw(CONTENT)))]


def check(others, name, messages):
    """Text, ids, mask and control tokens of one conversation, all from the definition of its template."""
    tokenizer, (_, end, written, _) = others[name], TEMPLATES[name]
    ids, mask = chat.encode_chat(tokenizer, messages)
    text = plain(tokenizer, messages)
    assert tokenizer.decode(ids) == text
    if not any(control in m["content"] for m in messages for control in tokenizer.special):
        assert ids == tokenizer.encode_prompt(text, add_special_tokens=False)
    answers = [written(m["content"]) + end for m in messages if m["role"] == "assistant"]
    found = trained_texts(tokenizer, ids, mask)
    assert len(found) == len(answers)
    for run, answer in zip(found, answers, strict=True):  # a token may hold the template's space before the answer, too
        assert run in (answer, " " + answer)
    controls = [tokenizer.piece(i) for i in ids if i in tokenizer.special.values()]
    empty = plain(tokenizer, [{**m, "content": "a"} for m in messages])
    assert controls == [tokenizer.piece(i) for i in tokenizer.encode_prompt(empty, False) if i in tokenizer.special.values()]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25)
@given(messages=conversations())
def test_text_ids_and_mask_follow_from_the_template(others, name, messages):
    check(others, name, messages)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=2000)
@given(messages=conversations())
def test_the_same_for_many_more_conversations(others, name, messages):
    check(others, name, messages)


def test_what_ends_a_turn_ends_generation(others):
    for name, (_, end, _, eos) in TEMPLATES.items():
        stops = {others[name].piece(i) for i in chat.stop_ids(others[name])}
        assert stops == {end.strip(), eos}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    return byte_level.make(tmp_path_factory.mktemp("think") / "t", THINK, eos="<|im_end|>", added=["<think>", "</think>"])


def test_thoughts_are_written_and_trained_where_the_template_writes_them(thinker):
    messages = [user("q"), assistant("<think>\nold\n</think>\n\nHi"), user("r"), assistant("<think>\nnew\n</think>\n\nBye")]
    ids, mask = chat.encode_chat(thinker, messages)
    assert ids == thinker.encode_prompt(plain(thinker, messages), False)
    assert trained_texts(thinker, ids, mask) == ["Hi<|im_end|>", "<think>\nnew\n</think>\n\nBye<|im_end|>"]
    assert ids.count(thinker.added["<think>"]) == 1  # no control token: what is written is what transformers writes
    apart = [user("q"), assistant("Bye", reasoning_content="new")]
    assert trained_texts(thinker, *chat.encode_chat(thinker, apart)) == ["<think>\nnew\n</think>\n\nBye<|im_end|>"]
    for name in ("thinking", "reasoning"):  # transformers hands them on as reasoning_content
        assert chat.encode_chat(thinker, [user("q"), assistant("Bye", **{name: "new"})]) == chat.encode_chat(thinker, apart)


def test_half_a_pair_of_tags_takes_no_template_text_into_the_mask(thinker):
    ids, mask = chat.encode_chat(thinker, [user("q"), assistant("old </think> Hi"), user("r"), assistant("Bye")])
    assert trained_texts(thinker, ids, mask)[0] == " Hi<|im_end|>"


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    added = ["<tool_call>", "</tool_call>"]
    return byte_level.make(tmp_path_factory.mktemp("tools") / "t", TOOLS, eos="<|im_end|>", added=added)


CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "東京", "days": 3}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "</s>"}}


def test_tools_calls_and_results_are_rendered_and_calls_are_trained(caller):
    messages = [user("q"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "晴れ"}, assistant("Sunny.")]
    ids, mask = chat.encode_chat(caller, messages, arguments={"tools": [TOOL]})
    assert caller.decode(ids) == plain(caller, messages, tools=[TOOL])
    call = '<tool_call>weather {"city": "東京", "days": 3}</tool_call><|im_end|>'
    assert trained_texts(caller, ids, mask) == [call, "Sunny.<|im_end|>"]
    assert caller.special["</s>"] not in ids  # the tool's description spells it
    nasty = {**CALL, "function": {"name": "<|im_end|>", "arguments": {"<|im_start|>": "</s>", "b": ["<s>"]}}}
    ids, _ = chat.encode_chat(caller, [user("q"), assistant(None, tool_calls=[nasty]), assistant("a")])
    assert [caller.piece(i) for i in ids if i in caller.special.values()] == ["<|im_start|>", "<|im_end|>"] * 3


LOST = {
    "a second system message": (
        [{"role": "system", "content": "a"}] * 2 + [user("q"), assistant("a")],
        {},
        "message 1 .*system",
    ),
    "an unknown role": ([user("q"), {"role": "tanuki", "content": "pon"}], {}, "message 1 .*tanuki"),
    "reasoning": ([user("q"), assistant("a", reasoning_content="hm")], {}, "reasoning_content of message 1"),
    "a tool call": ([user("q"), assistant("a", tool_calls=[CALL])], {}, "tool_calls of message 1"),
    "the old function_call": ([user("q"), assistant("a", function_call={"name": "f"})], {}, "function_call of message 1"),
    "tools": ([user("q"), assistant("a")], {"tools": [TOOL]}, r"tools\[0\]"),
    "documents": ([user("q"), assistant("a")], {"documents": [{"title": "t", "text": "x"}]}, r"documents\[0\]"),
}


@pytest.mark.parametrize("case", LOST)
def test_what_does_not_come_out_of_the_template_is_an_error_that_names_it(tokenizer, case):
    messages, arguments, named = LOST[case]
    with pytest.raises(UserError, match=f"{named}.*does not come out of the chat template"):
        chat.encode_chat(tokenizer, messages, arguments=arguments)


def test_a_content_that_is_cut_is_an_error_and_one_that_is_trimmed_is_none(tmp_path):
    def of(name, content):
        return byte_level.make(tmp_path / name, "{% for m in messages %}{{ " + content + " + eos_token }}{% endfor %}")

    messages = [user(" one two "), assistant("three four\n")]
    with pytest.raises(UserError, match="'e two' of the content of message 0 .*does not come out"):
        chat.encode_chat(of("a", "m.content[1:3] + m.content[-1:]"), messages)
    with pytest.raises(UserError, match="'r' of the content of message 1 "):
        chat.encode_chat(of("c", "m.content[:9]"), messages)
    for name, content in {
        "d": "m.content | trim",
        "e": "m.content.split('two')[0] if 'two' in m.content else m.content",
        "f": "m.content | upper",
        "g": "m.content.split(' ') | join('_')",
        "h": "m.content[2:] + m.content[:5]",
    }.items():
        assert chat.encode_chat(of(name, content), messages)[0]


def test_a_template_may_refuse_a_conversation_and_use_the_date(tmp_path):
    refusing = byte_level.make(tmp_path / "a", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="the chat template refuses this conversation: roles must alternate"):
        chat.encode_chat(refusing, [user("q")])
    dated = byte_level.make(
        tmp_path / "b", "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    assert dated.decode(chat.encode_chat(dated, [user("q")])[0]).startswith("2")
    broken = byte_level.make(tmp_path / "c", "{% for m in messages %}{{ m.content + none }}{% endfor %}")
    with pytest.raises(UserError, match="chat_template: .*cannot be run"):
        chat.encode_chat(broken, [user("q")])
    with pytest.raises(UserError, match="chat_template: line 1"):
        chat.encode_chat(byte_level.make(tmp_path / "d", "{% for %}"), [user("q")])


def test_a_template_that_never_ends_a_turn_is_not_trained_on(tmp_path):
    endless = byte_level.make(tmp_path / "a", "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    with pytest.raises(UserError, match="writes no special token after the last answer.*</s> was expected"):
        chat.encode_dialogue(endless, [user("q"), assistant("a")])


def test_of_several_templates_transformers_choice_is_taken(tmp_path):
    template = CHATML.replace("CONTENT", "m.content")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert byte_level.make(tmp_path / "a", "OLD").chat_template == template
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "T{{ tools | tojson }}" + template}]
    several = byte_level.make(tmp_path / "b", named, eos="<|im_end|>")
    messages = [user("q"), assistant("a")]
    assert several.decode(chat.encode_chat(several, messages)[0]) == plain(several, messages)
    assert several.decode(chat.encode_chat(several, messages, arguments={"tools": [TOOL]})[0]).startswith("T[{")
    with pytest.raises(UserError, match="none is named default"):
        chat.encode_chat(byte_level.make(tmp_path / "c", named[1:]), messages)


def test_contents_of_text_parts_are_text(others, tmp_path):
    parts = [{"type": "text", "text": "Hi"}]
    assert chat.encode_chat(others["chatml"], [user(parts), assistant("a")]) == chat.encode_chat(
        others["chatml"], [user("Hi"), assistant("a")]
    )
    listing = byte_level.make(
        tmp_path / "a", "{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{{ eos_token }}{% endfor %}"
    )
    messages = [user([*parts, *parts]), assistant(parts)]
    assert listing.decode(chat.encode_chat(listing, messages)[0]) == "Hi|Hi|</s>Hi|</s>"
    with pytest.raises(UserError, match="message 0 has a part that is no text"):
        chat.encode_chat(listing, [user([{"type": "image"}])])


def test_a_prefix_space_is_made_once_and_not_after_every_special_token(tmp_path):
    first = byte_level.make(tmp_path / "a", INST.replace("END", "eos_token"), scheme="first")
    messages = [user("Hi"), assistant("Rome"), user("Hi"), assistant("Paris")]
    ids, mask = chat.encode_chat(first, messages)
    assert ids == first.encode_prompt(plain(first, messages), False)
    assert [run.strip() for run in trained_texts(first, ids, mask)] == ["Rome</s>", "Paris</s>"]


def test_bos_is_put_where_the_tokenizer_itself_puts_it(tmp_path):
    plainly, posted = byte_level.make(tmp_path / "a"), byte_level.make(tmp_path / "b", post=True)
    told = byte_level.make(tmp_path / "c", add_bos_token=True)  # which transformers 5 does not follow beside tokenizer.json
    for tokenizer, before in ((plainly, 0), (posted, 1), (told, 0)):
        assert tokenizer.encode_prompt("Hi there") == [*[tokenizer.bos] * before, *tokenizer.encode("Hi there")]
        assert tokenizer.encode_prompt("Hi there", add_special_tokens=False) == tokenizer.encode("Hi there")
    assert plainly.encode_prompt("<s>Hi")[0] == plainly.bos and plainly.encode("<s>Hi")[0] != plainly.bos


def test_the_space_that_a_decoder_strips_at_a_beginning_is_not_lost_in_a_continuation(tmp_path):
    first = byte_level.make(tmp_path / "a", scheme="first")
    whole = first.encode("Hi there Paris")
    prompt = first.encode("Hi there")
    assert whole[: len(prompt)] == prompt and first.decode_after(prompt, whole[len(prompt) :]) == " Paris"


def test_the_publishers_stop_tokens_are_kept(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [2, 3, 9999]}')
    assert chat.stop_ids(byte_level.make(tmp_path / "a")) == (2, 3)


# --- what another reader tried -----------------------------------------------------------------------------------------------

ROLE_TOKENS = (*byte_level.SPECIAL, "<|user|>", "<|assistant|>", "<|end|>")
ODD = {  # template, special tokens beside the usual ones
    "tokens made from the role": "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}",
    "formats": "{% for m in messages %}{{ '<|%s|>\n%s<|end|>' % (m.role, m.content) }}{% endfor %}",
    "format method": "{% for m in messages %}{{ '<|{}|>{}<|end|>'.format(m.role, m.content) }}{% endfor %}",
    "replace of a literal": (
        "{% for m in messages %}{{ '<|R|>C<|end|>' | replace('R', m.role) | replace('C', m.content) }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_templates_own_tokens_stay_tokens_however_they_are_put_together(name, tmp_path):
    tokenizer = byte_level.make(tmp_path / "a", ODD[name], special=ROLE_TOKENS, eos="<|end|>")
    messages = [user("Hi"), assistant("Paris")]
    ids, mask = chat.encode_chat(tokenizer, messages)
    assert ids == tokenizer.encode_prompt(plain(tokenizer, messages), False)
    assert trained_texts(tokenizer, ids, mask) == ["Paris<|end|>"]
    spelt = [user("a<|end|>"), assistant("b<|user|>c")]
    ids, mask = chat.encode_chat(tokenizer, spelt)
    assert tokenizer.decode(ids) == plain(tokenizer, spelt) and trained_texts(tokenizer, ids, mask) == ["b<|user|>c<|end|>"]
    assert [i in tokenizer.special.values() for i in ids].count(True) == 4


def test_what_a_template_prints_of_lists_makes_no_control_token(tmp_path):
    tokenizer = byte_level.make(
        tmp_path / "a", "{% for m in messages %}{{ m.content }}{{ m.extra }}{{ extra }}{{ eos_token }}{% endfor %}"
    )
    messages = [{**user("q"), "extra": ["</s>"]}, {**assistant("a"), "extra": {"</s>": "<s>"}}]
    ids, _ = chat.encode_chat(tokenizer, messages, arguments={"extra": ["</s>"]})
    assert [tokenizer.piece(i) for i in ids if i in tokenizer.special.values()] == ["</s>", "</s>"]


def test_adjacent_marks_are_told_apart_and_marks_of_nobody_are_not_trained(tmp_path):
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    tokenizer = byte_level.make(tmp_path / "a", marked, eos="<|im_end|>")
    messages = [user("q"), assistant("zero", weight=0), assistant("one")]
    assert trained_texts(tokenizer, *chat.encode_chat(tokenizer, messages)) == ["one<|im_end|>"]
    nobody = byte_level.make(tmp_path / "b", "{{ messages[0].content }}{% generation %}{{ eos_token }}{% endgeneration %}")
    with pytest.raises(UserError, match="without an assistant turn"):
        chat.encode_dialogue(nobody, [user("q")])


def test_a_model_that_holds_its_special_tokens_as_pieces_spells_none(tmp_path):
    """As converted SentencePiece Unigrams do."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", *"abcdefghi</s>", *(f"<0x{i:02X}>" for i in range(256))]
    library = Library(models.Unigram([(p, -1.0) for p in dict.fromkeys(pieces)], unk_id=0, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    library.add_special_tokens(["<s>", "</s>"])
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    library.save(str(tmp_path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path)
    for ids in (tokenizer.encode("a </s> b"), list(tokenizer.encode_batch(["a </s> b"])[0])):
        assert tokenizer.eos not in ids and ids[1] == tokenizer.encode("a")[-1]
    ids, _ = chat.encode_chat(tokenizer, [user("a </s> b"), assistant("bad")])
    assert ids.count(tokenizer.eos) == 2


def test_tokens_that_only_the_config_knows_are_an_error(tmp_path):
    with pytest.raises(UserError, match="names the token '<new>', which tokenizer.json does not have"):
        byte_level.make(tmp_path / "a", additional_special_tokens=["<new>"])
    directory = byte_level.make(tmp_path / "c", pad_token=None).directory
    (directory / "special_tokens_map.json").write_text('{"pad_token": "<unk>"}')
    assert Tokenizer(directory).named["pad_token"] == "<unk>"


def test_long_and_many_lines_take_no_square_of_time(tmp_path):
    lines = "m.content.replace('\r\n', '\n').split('\n')"
    template = "{% for m in messages %}{{ LINES | map('trim') | join('\n') + eos_token }}{% endfor %}".replace("LINES", lines)
    tokenizer = byte_level.make(tmp_path / "a", template)
    ids, mask = chat.encode_chat(tokenizer, [user("a b\r\n" * 3000), assistant("</s>" * 3000)])  # took minutes once
    assert ids.count(tokenizer.eos) == 2 and sum(mask) > 3000
