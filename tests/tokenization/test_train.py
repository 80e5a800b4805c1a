import tempfile

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tests.conftest import TEXTS
from tokenization.export import export
from tokenization.segment import Segmenter
from tokenization.train import BOS, CONTROLS, EOS, PAD, UNK, seed_pieces, train


@pytest.fixture(scope="module")
def model(tokenizer):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.directory / "tokenizer.model"))


@pytest.fixture(scope="module")
def pieces(model):
    """The pieces that text can give, with real spaces, and not the bytes."""
    ids = (i for i in range(len(model)) if not model.is_control(i) and not model.is_unknown(i) and not model.is_byte(i))
    return [model.id_to_piece(i).replace("▁", " ") for i in ids]


def test_no_piece_crosses_a_boundary_of_mecab(pieces):
    segmenter = Segmenter()
    units = {unit for text in TEXTS for line in text.splitlines() for unit in segmenter.units(line)}
    longer = [p for p in pieces if len(p) > 1]
    assert len(longer) > 20 and [p for p in longer if not any(p in unit for unit in units)] == []


def test_digits_stand_alone(pieces, tokenizer):
    assert [p for p in pieces if any(c.isdigit() for c in p) and len(p) > 1] == []
    assert [tokenizer.piece(i) for i in tokenizer.encode("1234")] == list("1234")


def test_the_newline_is_a_piece_of_its_own(pieces, model, tokenizer):
    assert [p for p in pieces if "\n" in p] == ["\n"]
    assert model.encode("狸\n\na", out_type=str) == ["狸", "\n", "\n", "a"]
    assert [tokenizer.piece(i) for i in tokenizer.encode("狸\n\na")] == ["狸", "\n", "\n", "a"]


def test_all_bytes_are_pieces_and_spell_what_is_unknown(model):
    assert [model.id_to_piece(i) for i in range(len(model)) if model.is_byte(i)] == [f"<0x{b:02X}>" for b in range(256)]
    assert model.encode("🦝", out_type=str) == [f"<0x{b:02X}>" for b in "🦝".encode()]


@settings(max_examples=50, deadline=None)
@given(st.text(st.sampled_from("狸山 aＡ①㍿é\u3099か\n\t"), max_size=12))
def test_the_model_neither_normalises_nor_adds_a_space_before_the_text(model, text):
    assert model.decode(model.encode(text)) == text
    assert not text or text.startswith(" ") or not model.encode(text, out_type=str)[0].startswith("▁")


def test_special_tokens_are_controls_that_the_model_does_not_read_from_text(model):
    assert [model.id_to_piece(i) for i in range(4)] == [UNK, BOS, EOS, PAD] and model.is_unknown(0)
    controls = [model.piece_to_id(p) for p in (BOS, EOS, PAD, *CONTROLS)]
    assert all(map(model.is_control, controls)) and len(set(controls)) == 3 + len(CONTROLS)
    spelt = "".join((UNK, BOS, EOS, PAD, *CONTROLS))
    assert not set(model.encode(spelt)) & {0, *controls} and model.decode(model.encode(spelt)) == spelt


def test_the_vocabulary_has_the_size_asked_for(tmp_path):
    trained = train(TEXTS, tmp_path, vocab_size=405, character_coverage=1.0)
    assert trained.pieces == Tokenizer(tmp_path).vocab_size == 405


def test_little_text_gives_fewer_pieces_than_asked_for(tmp_path):
    assert train(["狸 山"] * 3, tmp_path, vocab_size=2000).pieces < 400
    assert Tokenizer(tmp_path).decode(Tokenizer(tmp_path).encode("狸 山 moon")) == "狸 山 moon"


def test_training_twice_gives_the_same_tokenizer(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        train(iter(TEXTS), directory, vocab_size=420)
    names = sorted(p.name for p in one.iterdir())
    assert names == ["special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names if name.endswith("json"))
    assert len({export(directory / "tokenizer.model", tmp_path / "three") for directory in (one, two)}) == 1
    assert (tmp_path / "three" / "tokenizer.json").read_bytes() == (one / "tokenizer.json").read_bytes()


def test_the_model_tells_nothing_of_the_machine_it_was_trained_on(tokenizer):
    data = (tokenizer.directory / "tokenizer.model").read_bytes()
    assert tempfile.gettempdir().encode() not in data and str(tokenizer.directory).encode() not in data


@pytest.mark.parametrize(
    ("texts", "size", "message"), [([], 512, "corpus is empty"), (["\n"], 512, "empty"), (TEXTS, 100, "100 pieces")]
)
def test_what_cannot_be_trained_is_an_error_that_says_why(tmp_path, texts, size, message):
    with pytest.raises(UserError, match=message):
        train(texts, tmp_path, vocab_size=size)


def test_seeds_are_the_repeated_substrings_of_units_with_their_true_counts():
    assert dict(seed_pieces({" aba": 3, "ab": 4, "xy": 1})) == {
        "▁a": 3, "▁ab": 3, "▁aba": 3, "ab": 7, "aba": 3, "ba": 3,
    }  # fmt: skip
