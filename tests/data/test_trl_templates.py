"""Every text chat template that TRL ships, read from the package: ids as transformers gives them, masks as its marks say."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tanuki_jax.data import chat
from tanuki_jax.errors import UserError
from tests.data import byte_level

pytestmark = pytest.mark.slow
trl = pytest.importorskip("trl", reason="the extra `parity` is not installed")
transformers = pytest.importorskip("transformers")

FOLDER = Path(trl.__file__).parent / "chat_templates"
IMAGES = ("_vl", "idefics", "llava", "smolvlm")  # want contents as lists of parts
TEMPLATES = {p.stem: p.read_text(encoding="utf-8") for p in sorted(FOLDER.glob("*.jinja"))}
TEXT = [name for name in TEMPLATES if not any(part in name for part in IMAGES)]
TWINS = [name for name in TEXT if f"{name}_training" in TEMPLATES]
SPELT = re.compile(r"<\|?/?[A-Za-z][A-Za-z_]*\|?>|<\|[A-Za-z_]+\|?>|<｜[^｜<>]{1,40}｜>|\[/?[A-Za-z_]+\]")
NOT_SPECIAL = re.compile(r"</?(think|tool_call|tool_response|tools|function|parameter|arg_key|arg_value|tool).*>")
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|return|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
    "<|end|>",
    "<turn|>",
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "東京", "days": 3}}}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "a city"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": CITY}}]
RESULT = {"role": "tool", "name": "weather", "content": "sunny", "tool_call_id": "abcdefghi"}
CONVERSATIONS = {
    "one turn": [user("Hi there"), assistant("Paris")],
    "a system message": [SYSTEM, user("Hi"), assistant("Rome")],
    "two turns": [user("Hi"), assistant("Paris"), user("And?"), assistant("Rome")],
    "three turns": [SYSTEM, user("Hi"), assistant("Paris"), user("And?"), assistant("Rome"), user("Z"), assistant("Yes")],
    "spaces and newlines": [user("  Hi \n"), assistant("\n Paris  \n"), user("\n"), assistant(" a")],
    "Japanese and emoji": [user("こんにちは"), assistant("世界です。🦝👨‍👩‍👧")],
    "thoughts": [user("q"), assistant("<think>\nold\n</think>\n\nHi"), user("r"), assistant("<think>\nnew\n</think>\n\nBye")],
    "half a pair of tags": [user("q </think> x"), assistant("old </think> Hi"), user("r"), assistant("Bye")],
    "reasoning_content": [
        user("q"),
        assistant("Hi", reasoning_content="old"),
        user("r"),
        assistant("Bye", reasoning_content="I think"),
    ],
    "a tool call and its result": [user("weather?"), assistant("", tool_calls=[CALL]), RESULT, assistant("It is sunny.")],
    "a question at the end": [user("Hi"), assistant("Paris"), user("more")],
    "special tokens spelt": [user("<|im_end|> </s> <s> <end_of_turn> <|eot_id|>"), assistant("x<|im_end|>y</s>z")],
}


def make(directory, template):
    """A tokenizer with the tokens that a template spells, and transformers' reading of it."""
    spelt = set(SPELT.findall(template)) and {m.group() for m in SPELT.finditer(template)}
    plain = sorted(token for token in spelt if NOT_SPECIAL.fullmatch(token))
    special = sorted({*ENDS, *(token for token in spelt if token not in plain)})
    eos = next((end for end in ENDS if end in spelt), "</s>")
    ours = byte_level.make(
        directory, template, eos=eos, special=["<unk>", "<s>", "</s>", *special], added=plain, vocab_size=700
    )
    return ours, transformers.AutoTokenizer.from_pretrained(directory)


def arguments(name):
    return {"tools": TOOLS} if "tool" in name else {}


@pytest.mark.parametrize("template", TEXT)
def test_ids_are_those_of_transformers(template, tmp_path):
    ours, theirs = make(tmp_path / "t", TEMPLATES[template])
    for name, messages in CONVERSATIONS.items():
        prompt = messages[-1]["role"] == "user"
        try:
            expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False, **arguments(name))
        except Exception:  # whatever a template raises
            with pytest.raises(UserError):
                chat.encode_chat(ours, messages, prompt, arguments(name))
            continue
        try:
            ids, _ = chat.encode_chat(ours, messages, prompt, arguments(name))
        except UserError as error:  # transformers says nothing where a template leaves out a part of a conversation
            assert "does not come out of the chat template" in str(error), (name, error)
            assert left_out(str(error), theirs.decode(expected)), (name, error)
            continue
        if name == "special tokens spelt":
            assert ours.decode(ids) == theirs.decode(expected)
            assert not {ours.piece(i) for i in ids[:-1]}.intersection({"</s>", "<s>"} - {ours.bos_token, ours.eos_token})
        else:
            assert ids == expected, name


def left_out(error, rendered):
    """Whether what an error says is left out is in fact not in the text."""
    words = {"reasoning_content of message 1": "old", "reasoning_content of message 3": "I think"}
    if "reasoning_content" in error:
        return next(word for start, word in words.items() if error.startswith(start)) not in rendered
    return "東京" not in rendered if "tool_calls" in error else '"weather"' not in rendered


# Why a token is in the mask of TRL's twin alone, or (the last) in ours alone.
REASONS = {
    "after the end": "it stands after the token that ends the turn, at which generation stops",
    "the prompt": "add_generation_prompt writes it, so the model never does",
    "the end": "it ends the turn, which the twin leaves out",
}


@pytest.mark.parametrize("template", TWINS)
def test_masks_are_those_of_the_training_twin_or_leave_out_what_is_never_generated(template, tmp_path):
    twin = TEMPLATES[f"{template}_training"]
    unmarked = re.sub(r"{%([-+]?)\s*generation\s*([-+]?)%}", r"{%\1 if true \2%}", twin)
    unmarked = re.sub(r"{%([-+]?)\s*endgeneration\s*([-+]?)%}", r"{%\1 endif \2%}", unmarked)
    ours, theirs = make(tmp_path / "t", unmarked)
    marked = byte_level.Tokenizer(make(tmp_path / "m", twin)[0].directory)
    prompt = theirs.apply_chat_template([user("a")], tokenize=False, add_generation_prompt=True)
    counts: Counter[str] = Counter()
    for name, messages in CONVERSATIONS.items():
        if name in ("special tokens spelt", "a question at the end"):
            continue
        try:
            ids, mask = chat.encode_chat(ours, messages, arguments=arguments(name))
        except UserError:
            continue
        expected = theirs.apply_chat_template(
            messages, chat_template=twin, return_dict=True, return_assistant_tokens_mask=True, **arguments(name)
        )
        assert ids == expected["input_ids"]
        twins = expected["assistant_masks"]
        for i, (own, marks) in enumerate(zip(mask, twins, strict=True)):
            ends = ids[i] in chat.stop_ids(ours) and mask[i - 1]
            counts[
                "the same" if own == marks else why(ours, ids, mask, i, prompt) if marks else "the end" if ends else "?"
            ] += 1
        believed = chat.encode_chat(marked, messages, arguments=arguments(name))[1]
        differing = {ids[i] for i, (own, marks) in enumerate(zip(believed, twins, strict=True)) if own != marks}
        assert differing <= set(chat.stop_ids(ours)) and sum(believed) >= sum(twins), name
    print(template, dict(counts))
    assert counts["the same"] and counts.keys() <= {"the same", *REASONS}


def why(tokenizer, ids, mask, i, prompt):
    """Which of REASONS explains a token that the twin alone has."""
    ended = max((j for j in range(i) if mask[j]), default=-1)
    run = tokenizer.decode(ids[ended + 1 : i + 1])
    if ended >= 0 and ids[ended] in chat.stop_ids(tokenizer) and not run.replace(tokenizer.eos_token, "").strip():
        return "after the end"
    following = next(j for j in range(i, len(ids)) if mask[j])
    before = tokenizer.decode(ids[:following])
    header = tokenizer.decode(ids[i:following])
    return "the prompt" if before.endswith(header) and header in prompt else f"unknown: {header!r}"


def test_json_of_the_templates_is_as_transformers_writes_it():
    assert json.dumps(TOOLS, ensure_ascii=False) == chat.traced.to_json(TOOLS, ensure_ascii=False)
