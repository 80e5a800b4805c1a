import io
import sys

import jax
import pytest

from tanuki_jax.data.chat import encode_chat
from tanuki_jax.model import Sampling, generate
from tanuki_jax.serve.chat import HINT, chat
from tests.tiny import init, small

CFG = small(vocab_size=512)
PARAMS = init(CFG, jax.random.key(1))
SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture
def talk(tokenizer, monkeypatch, capsys):
    """Gives what is typed to the chat; returns the lines of its answers."""

    def run(typed, sampling=SAMPLING, seed=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert chat(CFG, PARAMS, tokenizer, sampling, seed) is None
        out, err = capsys.readouterr()
        assert err == HINT + "\n"
        return out

    return run


def answer(tokenizer, *said):
    """The model's answer to turns of user and assistant that end with the user."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    prompt, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
    return tokenizer.decode(generate(CFG, PARAMS, [prompt], SAMPLING)[0])


def test_every_turn_is_answered_with_all_turns_before_it(talk, tokenizer):
    first = answer(tokenizer, "山の奥に")
    second = answer(tokenizer, "山の奥に", first, " 月は? ")
    assert talk("山の奥に\n 月は? \n") == f"{first}\n{second}\n"
    assert second != answer(tokenizer, " 月は? ")


def test_new_forgets_and_quit_leaves(talk, tokenizer):
    expected = answer(tokenizer, "月は?")
    assert talk("月は?\n/new\n月は?\n/quit\n月は?\n") == f"{expected}\n" * 2


def test_blank_lines_are_not_questions(talk, tokenizer):
    assert talk("\n  \n月は?\n\n") == answer(tokenizer, "月は?") + "\n"


@pytest.mark.parametrize("typed", ["", "\n", "/quit", "/quit\n", "/new\n"])
def test_the_end_of_input_ends_the_conversation_without_a_word(talk, typed):
    assert talk(typed) == ""


def test_a_last_line_without_its_newline_is_answered(talk, tokenizer):
    assert talk("月は?") == talk("月は?\n") == answer(tokenizer, "月は?") + "\n"


def test_sampled_answers_follow_the_seed(talk):
    hot = Sampling(max_new_tokens=6, temperature=2.0)
    assert talk("月は?\n山は?\n", hot, seed=1) == talk("月は?\n山は?\n", hot, seed=1) != talk("月は?\n山は?\n", hot, seed=2)


def test_special_tokens_that_are_typed_are_text(talk, tokenizer):
    assert talk("</s><s>\n") == answer(tokenizer, "</s><s>") + "\n"
