import math
import re

import pytest

from tests.conftest import TEXTS
from tokenization.errors import TokenizationError
from tokenization.options import TrainOptions
from tokenization.train import train
from tokenization.vocab_size import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE, check_vocab_size

PAIRS = [("", text) for text in TEXTS]


@pytest.mark.parametrize("size", [-1, 0, 100, MIN_VOCAB_SIZE - 1, MAX_VOCAB_SIZE + 1, 2**31, 10**30])
def test_a_vocabulary_that_no_text_gives_is_refused_before_any_text_is_read(size):
    texts = (pytest.fail("the text was read") for _ in range(1))
    with pytest.raises(TokenizationError, match=f"no vocabulary has {size:,} pieces.* {MIN_VOCAB_SIZE}, .*{MAX_VOCAB_SIZE:,}"):
        check_vocab_size(texts, TrainOptions(size))


@pytest.mark.parametrize("coverage", [-1.0, 0.0, 0.9, 1.5, math.nan])
def test_a_coverage_that_sentencepiece_does_not_know_is_refused(coverage):
    with pytest.raises(TokenizationError, match=r"character_coverage .* from 0.98 to 1"):
        check_vocab_size(PAIRS, TrainOptions(512, coverage))


@pytest.mark.parametrize(("texts", "asked"), [([("", "狸 山")] * 3, 65_000), (PAIRS[:6], 65_000), (PAIRS[:4], 3_000)])
def test_text_too_short_for_a_vocabulary_is_told_the_largest_that_works(tmp_path, texts, asked):
    with pytest.raises(TokenizationError, match=f"{asked:,} pieces cannot come of") as told:
        check_vocab_size(texts, TrainOptions(asked))
    [largest] = map(int, re.findall(r"--vocab_size=(\d+)", str(told.value)))
    check_vocab_size(texts, TrainOptions(largest))
    assert train(texts, tmp_path, TrainOptions(largest)).pieces == largest


def test_a_vocabulary_without_room_for_the_characters_is_told_what_has_room(tmp_path):
    texts = [("", "".join(map(chr, range(0x4E00, 0x4E00 + 3000))))]
    with pytest.raises(TokenizationError, match="2,000 pieces have no room for the characters") as told:
        check_vocab_size(texts, TrainOptions(2000))
    [enough] = map(int, re.findall(r"--vocab_size=(\d+)", str(told.value)))
    check_vocab_size(texts, TrainOptions(enough))
    assert 3000 < train(texts, tmp_path, TrainOptions(enough, boundary="none")).pieces <= enough < 3500


def test_what_can_be_reached_is_not_refused_and_no_more_is_read_than_needed():
    for size in (405, 700, 2000):
        check_vocab_size(PAIRS, TrainOptions(size, 1.0))
    rows = iter([("", TEXTS[0] * 1000), ("", pytest.fail)])
    check_vocab_size(rows, TrainOptions(65_000))
    assert len(list(rows)) == 1
    check_vocab_size([], TrainOptions(65_000))  # an empty corpus has its own message
