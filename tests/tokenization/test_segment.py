import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization.segment import Segmenter, count_units

SEGMENTER = Segmenter()
# A line: no line ends, as count_units cuts there; MeCab is told nothing of NUL.
LINE = st.lists(
    st.sampled_from(["狸", "が", "山の奥", "moon", " ", "  ", "\t", "\u3000", "3.14", "🦝", "、", "▁", "ＡＢ"])
    | st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=4),
    max_size=8,
).map("".join)


@settings(max_examples=50, deadline=None)
@given(LINE)
def test_units_joined_are_the_line_but_for_spaces_that_no_word_follows(line):
    assert "".join(SEGMENTER.units(line)) == re.sub(r" +(\t|$)", r"\1", line)


@pytest.mark.parametrize(
    ("line", "units"),
    [
        ("狸は山に住む。", ["狸", "は", "山", "に", "住む", "。"]),
        ("すもももももももものうち", ["すもも", "も", "もも", "も", "もも", "の", "うち"]),
        ("東京都に行きました", ["東京", "都", "に", "行き", "まし", "た"]),
        ("the big moon", ["the", " big", " moon"]),
        ("a  b", ["a", "  b"]),
        ("a\tb", ["a", "\t", "b"]),
        ("", []),
    ],
)
def test_units_are_mecabs_morphemes_with_the_space_before_them(line, units):
    assert SEGMENTER.units(line) == units


def test_units_are_counted_over_all_lines_of_all_texts():
    counts = count_units(["狸は狸\n\n狸", "は\0狸"])
    assert counts == {"狸": 4, "は": 2}
