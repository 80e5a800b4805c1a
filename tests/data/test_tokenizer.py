import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tests.conftest import TEXTS

SPELT = ["<unk>", "<s>", "</s>", "<pad>", "<CLS>", "<MASK>", "<llm-code>", "</llm-code-output>", "<0x0A>", "<0x41>", "<0xE3>"]
PARTS = st.sampled_from(
    [*SPELT, " ", "  ", "\n", "\r\n", "\t", "\0", "▁", "\u3000", "狸", "が", "か\u3099", "ｶﾞ", "①", "🦝", "👨‍👩‍👧", "12", "moon"]
)
TEXT = st.lists(PARTS | st.text(max_size=6), max_size=8).map("".join)
quick = settings(max_examples=50, deadline=None)
LONG = ["あ" * 50_000, "a b" * 20_000, "🦝" * 5_000, "\n" * 20_000, "".join(map(chr, range(0x4E00, 0x9FFF))), "<s>" * 5_000]


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
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


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
