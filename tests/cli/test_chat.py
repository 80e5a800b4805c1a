import io
import json
import signal
import sys

import jax
import pytest

from tanuki_jax import model
from tanuki_jax.cli import chat as chat_module
from tanuki_jax.cli.chat import HINT, OFFER, ChatModel, chat, stored_questions, text_pieces
from tanuki_jax.data.chat import encode_chat
from tanuki_jax.data.tokenizer import Tokenizer, byte_of
from tanuki_jax.errors import UserError
from tanuki_jax.model import Sampling, generate
from tests.tiny import init, small

CFG = small(vocab_size=512)
PARAMS = init(CFG, jax.random.key(1))
SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture
def talk(tokenizer, monkeypatch, capsys):
    """Gives typed lines to the chat; returns its answers, and keeps its other lines in `hints`."""

    def run(typed, sampling=SAMPLING, seed=0, max_seq_len=0, questions=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert chat(ChatModel(CFG, PARAMS, tokenizer, max_seq_len), sampling, seed, questions) is None
        out, err = capsys.readouterr()
        assert err.startswith(HINT + "\n")
        run.hints = err.splitlines()[1:]
        return out

    return run


def spelt(tokenizer, ids):
    """The text of ids, in which bytes that spell no character spoil no other."""
    return "".join(text_pieces(tokenizer, [], ids))


def answer(tokenizer, *said):
    """The model's answer to turns of user and assistant that end with the user."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    prompt, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
    return spelt(tokenizer, generate(CFG, PARAMS, [prompt], SAMPLING)[0])


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
    assert talk(typed) == "" and talk.hints == []


def test_a_last_line_without_its_newline_is_answered(talk, tokenizer):
    assert talk("月は?") == talk("月は?\n") == answer(tokenizer, "月は?") + "\n"


def test_sampled_answers_follow_the_seed(talk):
    hot = Sampling(max_new_tokens=6, temperature=2.0)
    assert talk("月は?\n山は?\n", hot, seed=1) == talk("月は?\n山は?\n", hot, seed=1) != talk("月は?\n山は?\n", hot, seed=2)
    talk("月は?\n", hot, seed=2**63 - 1)


def test_special_tokens_that_are_typed_are_text(talk, tokenizer):
    assert talk("</s><s>\n") == answer(tokenizer, "</s><s>") + "\n"


# --- a piece at a time ----------------------------------------------------------------------------------------------------


def test_what_is_said_is_on_the_screen_before_the_next_token_is_made(talk, monkeypatch, capsys, tokenizer):
    on_screen = []

    def streamed(*_):
        capsys.readouterr()
        for token in tokenizer.encode("狸が山の奥で月を"):
            yield token
            on_screen.append(capsys.readouterr().out)

    monkeypatch.setattr(model, "stream", streamed)
    monkeypatch.setattr(sys, "stdin", io.StringIO("月は?"))
    chat(ChatModel(CFG, PARAMS, tokenizer), SAMPLING, 0)
    assert "".join(on_screen) == "狸が山の奥で月を" and len(on_screen) > 3 and all(on_screen)


@pytest.mark.parametrize("text", ["狸🦝が月を", " 月 ", "鵺👨‍👩‍👧驢", "a\n\nb", "한국어ไทย", "é\u0301"])
def test_pieces_are_whole_characters_and_come_as_soon_as_they_are(tokenizer, text):
    prompt, ids = tokenizer.encode("### 応答:\n"), tokenizer.encode(text)
    pieces = list(text_pieces(tokenizer, prompt, ids))
    assert "".join(pieces) == text and "\ufffd" not in text and all(pieces)
    spellings = [byte_of(tokenizer.piece(i)) for i in ids]
    assert len(pieces) == sum(byte is None or byte & 0xC0 != 0x80 for byte in spellings)  # one for each first byte


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (b"\xe7\x8b", "\ufffd"),  # cut at the end
        (b"\xe7\x8b\xb8\xe7", "狸\ufffd"),  # after a whole one
        (b"A\xffB", "A\ufffdB"),
        (b"\xff\xff", "\ufffd\ufffd"),
    ],
)
def test_bytes_that_are_no_character_lose_nothing_else(tokenizer, given, text):
    ids = [tokenizer._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in given]
    assert "".join(text_pieces(tokenizer, [], ids)) == text


def save_tokenizer(directory, made, **options):
    """A directory with a tokenizer of somebody else's."""
    made.add_special_tokens(["</s>"])
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return Tokenizer(directory)


def test_the_space_before_a_word_is_kept_though_the_decoder_drops_the_first(tmp_path):
    from tokenizers import Tokenizer as Made
    from tokenizers import decoders, models, pre_tokenizers

    made = Made(models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("▁moon", -1.0), ("light", -1.0)], unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = save_tokenizer(tmp_path, made)
    assert list(text_pieces(tokenizer, [1], [2, 3, 1])) == [" moon", "light", " the"]
    assert list(text_pieces(tokenizer, [], [2, 3, 1])) == ["moon", "light", " the"]


def test_characters_of_a_byte_level_tokenizer_are_whole(tmp_path):
    from tokenizers import Tokenizer as Made
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Made(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = save_tokenizer(tmp_path, made)
    assert list(text_pieces(tokenizer, [], tokenizer.encode("a狸🦝 é"))) == list("a狸🦝 é")


# --- what ends an answer --------------------------------------------------------------------------------------------------


def test_an_answer_that_is_cut_says_so_and_why(talk):
    talk("月は?\n")
    assert talk.hints == ["(the answer is cut here: --max_new_tokens=6)"]


def test_a_full_conversation_is_one_line_and_new_begins_anew(talk, tokenizer):
    length = len(encode_chat(tokenizer, [{"role": "user", "content": "月は?"}], add_generation_prompt=True)[0])
    expected = answer(tokenizer, "月は?")
    assert talk("月は?\n月は?\n/new\n月は?\n", max_seq_len=length + 6) == f"{expected}\n" * 2
    assert len(talk.hints) == 3 and "no room for an answer" in talk.hints[1] and f"of {length + 6:,} tokens" in talk.hints[1]
    assert talk("月は?\n", max_seq_len=length + 2)
    assert talk.hints == [f"(the answer is cut here: this model knows {length + 2:,} tokens)"]


@pytest.fixture
def sigint_raises():
    """SIGINT raises KeyboardInterrupt; a shell starts its background processes with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(after, monkeypatch):
    """Has Ctrl-C come after so many tokens of the first answer; later ones are left alone."""
    real, calls = model.stream, []

    def streamed(*given):
        calls.append(given)
        for number, token in enumerate(real(*given)):
            if len(calls) == 1 and number == after:
                signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr(model, "stream", streamed)


@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupt_ends_the_answer_and_not_the_conversation(talk, tokenizer, monkeypatch, sigint_raises, after):
    whole = answer(tokenizer, "月は?")
    interrupting(after, monkeypatch)
    first, *others = talk("月は?\n/new\n月は?\n").removesuffix(whole + "\n").split("\n")
    assert whole.startswith(first) and first != whole and others == [""]


def test_two_interrupts_leave(talk, monkeypatch):
    def streamed(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(model, "stream", streamed)
    monkeypatch.setattr(chat_module, "EXIT_SECONDS", 100.0)  # a busy machine may take a second from one answer to the next
    assert talk("a\nb\nc\nd\n") == "\n\n"


def test_an_interrupt_where_a_question_is_awaited_leaves(talk, monkeypatch):
    class Waiting(io.StringIO):
        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(io, "StringIO", Waiting)
    assert talk("a\n") == ""


def test_input_that_is_no_text_is_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(UserError, match="not UTF-8"):
        chat(ChatModel(CFG, PARAMS, tokenizer), SAMPLING, 0)


@pytest.mark.parametrize("out", [False, True])
def test_the_prompt_of_a_terminal_is_not_in_what_is_piped(talk, monkeypatch, out):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: out, raising=False)
    assert talk("\n/quit\n") == "> > " * out


# --- what the hint offers -------------------------------------------------------------------------------------------------


def test_a_finished_stage_offers_its_questions(tmp_path):
    (tmp_path / "done.json").write_text(json.dumps({"questions": ["平均は?", "Mean?"]}))
    assert stored_questions(tmp_path) == ["平均は?", "Mean?"]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"questions": 3}', '{"questions": [1, null]}'])
def test_a_checkpoint_of_somebody_else_offers_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "done.json").write_text(content)
    assert stored_questions(tmp_path) == []


def test_the_hint_shows_what_is_offered(talk):
    talk("", questions=["平均は?", "Mean?"])
    assert talk.hints == [OFFER, "平均は?", "Mean?"]
