import ipadic
import MeCab
import pytest
import sentencepiece

from tanuki_jax.errors import UserError
from tests.conftest import TEXTS
from tokenization.report import is_byte, report

SAMPLE = [*TEXTS[:6], "見たことのない漢字: 鵺 🦝", "two\nlines"]


def test_the_numbers_are_what_sentencepiece_and_mecab_count(tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.directory / "tokenizer.model"))
    wakati = MeCab.Tagger(f"{ipadic.MECAB_ARGS} -O wakati")
    lines = [line for text in SAMPLE for line in text.splitlines(keepends=True)]
    ids = [i for line in lines for i in model.encode(line)]
    characters, size = sum(map(len, SAMPLE)), sum(len(t.encode()) for t in SAMPLE)
    words = sum(len(wakati.parse(line).split()) for line in lines)
    assert report(tokenizer, SAMPLE) == {
        "lines": len(lines),
        "characters": characters,
        "tokens": len(ids),
        "characters_per_token": pytest.approx(characters / len(ids), abs=1e-4),
        "bytes_per_token": pytest.approx(size / len(ids), abs=1e-4),
        "fertility": pytest.approx(len(ids) / words, abs=1e-4),
        "byte_fallback": pytest.approx(sum(map(model.is_byte, ids)) / len(ids), abs=1e-6),
        "round_trip": 1.0,
        "special": 0,
        "vocabulary": len(model),
        "vocabulary_used": len(set(ids)),
    }


def test_unknown_characters_count_as_the_bytes_they_fall_back_to(tokenizer):
    assert report(tokenizer, ["🦝"])["byte_fallback"] == 1.0 and report(tokenizer, ["狸"])["byte_fallback"] == 0.0


def test_control_tokens_spelt_in_text_are_not_counted_as_special(tokenizer):
    found = report(tokenizer, ["<s></s><pad> <0x41>\n"])
    assert (found["special"], found["round_trip"], found["byte_fallback"]) == (0, 1.0, 0.0)


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_an_error(tokenizer, texts):
    with pytest.raises(UserError, match="no text"):
        report(tokenizer, texts)


@pytest.mark.parametrize(
    ("piece", "byte"), [("<0x41>", True), ("<0xFF>", True), ("<0x4>", False), ("<pad>", False), ("a", False)]
)
def test_byte_pieces_are_known_by_their_spelling(piece, byte):
    assert is_byte(piece) == byte
