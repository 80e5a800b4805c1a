import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tanuki_jax.data import tokenizer as tokenizer_module
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tests.conftest import TEXTS

SPELT = ["<unk>", "<s>", "</s>", "<pad>", "<CLS>", "<MASK>", "<llm-code>", "</llm-code-output>", "<0x0A>", "<0x41>", "<0xE3>"]
PARTS = st.sampled_from(
    [*SPELT, " ", "  ", "\n", "\r\n", "\t", "\0", "▁", "\u3000", "狸", "が", "か\u3099", "ｶﾞ", "①", "🦝", "👨‍👩‍👧", "12", "moon"]
)
TEXT = st.lists(PARTS | st.text(max_size=6), max_size=8).map("".join)
quick = settings(max_examples=40, deadline=None)
LONG = ["あ" * 20_000, "a b" * 8_000, "🦝" * 3_000, "\n" * 10_000, "".join(map(chr, range(0x4E00, 0x9FFF))), "<s>" * 5_000]


@quick
@given(TEXT)
@example("\ufeff \n\x00\x1f\x7f\u2028\u200b\ufffd\U0010ffff")
def test_decoding_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:4]))
def test_long_text_comes_back_too(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@quick
@given(TEXT)
def test_no_text_gives_a_special_token_or_the_piece_of_a_byte_it_spells(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special.values())
    spelt = b"".join(bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.encode() for p in map(tokenizer.piece, ids))
    assert spelt == text.encode()


@quick
@given(TEXT)
@example("🦝🦝")
@example("a🦝🦝b")
def test_offsets_are_the_characters_in_which_tokens_start(tokenizer, text):
    ids, starts = tokenizer.encode_with_offsets(text)
    at, expected = 0, []
    for piece in map(tokenizer.piece, ids):
        expected.append(len(text.encode()[:at].decode(errors="ignore")))
        at += 1 if piece.startswith("<0x") else len(piece.encode())
    assert ids == tokenizer.encode(text) and starts == expected


@quick
@given(st.lists(TEXT, max_size=5))
def test_a_batch_is_encoded_like_each_text_alone(tokenizer, texts):
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(t) for t in texts]


def test_a_batch_gives_arrays_of_four_bytes_an_id_to_which_more_can_be_added(tokenizer):
    ids = tokenizer.encode_batch(["", "moon"])[1]
    ids.append(tokenizer.eos)
    assert np.frombuffer(ids, np.uint32).tolist() == [*tokenizer.encode("moon"), tokenizer.eos]


@pytest.fixture(scope="module", params=["cut at newlines", "not cut at newlines"])
def either(request, tokenizer, tmp_path_factory):
    """The tokenizer, and one like it that does not cut text at newlines, as older ones."""
    if request.param == "cut at newlines":
        return tokenizer
    directory = tmp_path_factory.mktemp("older")
    for path in tokenizer.directory.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    (directory / "tokenizer.json").write_text(json.dumps({**model, "pre_tokenizer": None}), encoding="utf-8")
    return Tokenizer(directory)


@pytest.fixture
def cut(monkeypatch):
    """Sets the lengths at which texts are cut."""

    def to(part, longest):
        monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", part)
        monkeypatch.setattr(tokenizer_module, "MAX_PART_CHARACTERS", longest)

    return to


by_patching = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY_LINES = st.lists(PARTS | st.sampled_from(["\n", "\n\n", " \n", "\n ", "moon"]) | st.text(max_size=6), max_size=30).map(
    "".join
)


@by_patching
@given(MANY_LINES, st.integers(1, 20))
@example("a" * 30 + "\n\n\nmoon\n", 1)
@example("\n" * 10, 1)
@example("🦝\n🦝🦝\n", 2)
def test_a_text_that_is_cut_at_newlines_has_the_ids_of_the_whole(either, cut, text, part):
    cut(part, 1 << 20)
    assert [ids.tolist() for ids in either.encode_batch([text, "moon", text])] == [
        either.encode(t) for t in (text, "moon", text)
    ]


@by_patching
@given(MANY_LINES, st.integers(1, 8), st.integers(1, 12))
@example("  moon  " * 5, 3, 3)
@example("🦝か\u3099" * 5, 1, 1)
def test_a_text_that_is_cut_anywhere_comes_back_and_has_no_special_token(either, cut, text, part, longest):
    cut(min(part, longest), longest)
    (ids,) = either.encode_batch([text])
    assert either.decode(ids) == text
    assert not set(ids) & set(either.special.values())


@by_patching
@given(MANY_LINES, st.integers(1, 8), st.integers(1, 40))
def test_what_is_encoded_together_is_never_longer_than_the_longest(tokenizer, cut, text, part, longest):
    cut(min(part, longest), longest)
    parts = tokenizer._parts(text)
    assert "".join(parts) == text and max(map(len, parts)) <= longest


DOCUMENTS = {  # a bit longer than 1 << 20 characters
    "one line": ("狸が山に住む。", 160_000),
    "many lines": ("The moon.\n", 110_000),
    "newlines": ("\n", 1_100_000),
    "long lines": ("a" * 40_000 + "\n", 30),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("shrink", [pytest.param(1, marks=pytest.mark.slow), 10])
def test_a_document_longer_than_what_is_encoded_together_comes_back(tokenizer, cut, name, shrink):
    """`test_prepare` has one of full size."""
    unit, count = DOCUMENTS[name]
    text = unit * (count // shrink)
    cut(tokenizer_module.PART_CHARACTERS // shrink, tokenizer_module.MAX_PART_CHARACTERS // shrink)
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    if "\n" in text:
        line = tokenizer.encode(text[: text.index("\n")])
        assert ids.tolist() == (line + tokenizer.encode("\n")) * text.count("\n")


@pytest.mark.parametrize("text", [*TEXTS[:6], "2024年12月、東京 (Tokyo) で\n  雪が 降った。\n\n", "ＡＢＣ ①㍿ é"])
def test_tokenizer_json_encodes_like_the_sentencepiece_model(tokenizer, text):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.directory / "tokenizer.model"))
    assert tokenizer.encode(text) == model.encode(text)


def test_special_ids_are_those_that_their_spellings_have(tokenizer):
    assert {tokenizer.piece(i): i for i in tokenizer.special.values()} == tokenizer.special
    assert [tokenizer.piece(i) for i in (tokenizer.bos, tokenizer.eos, tokenizer.pad)] == ["<s>", "</s>", "<pad>"]
    assert tokenizer.decode([tokenizer.bos, tokenizer.eos]) == "<s></s>"


def test_a_lone_surrogate_is_an_error_that_says_where(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match="surrogate at character 2"):
            encode("ab\ud800")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_directory_without_a_file_is_an_error_that_names_it(tokenizer, tmp_path, name):
    for path in tokenizer.directory.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=f"has no {name}"):
        Tokenizer(tmp_path)


def test_the_fingerprint_knows_the_files_and_not_the_place(tokenizer, tmp_path):
    for path in tokenizer.directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert Tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("指示", "質問"), encoding="utf-8")
    assert Tokenizer(tmp_path).fingerprint != tokenizer.fingerprint
