import collections
import concurrent.futures
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import TEXTS
from tokenization import segment
from tokenization.segment import Segmenter, count_units

BOUNDARIES = ("morpheme", "predicate", "bunsetsu")
SEGMENTERS = {boundary: Segmenter(boundary) for boundary in BOUNDARIES}
# A line: no line ends, as count_units cuts there; MeCab is told nothing of NUL.
PARTS = [
    "狸",
    "が",
    "山の奥",
    "食べて",
    "いる",
    "ました",
    "お",
    "的な",
    "moon",
    " ",
    "  ",
    "\t",
    "\u3000",
    "3.14",
    "🦝",
    "、",
    "▁",
]
LINE = st.lists(
    st.sampled_from(PARTS) | st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=4), max_size=8
).map("".join)
SENTENCE = "東京の学校で勉強しているので、とても楽しかったです。"


def starts(units):
    return set(itertools.accumulate(map(len, units)))


@pytest.mark.parametrize("boundary", BOUNDARIES)
@settings(max_examples=50, deadline=None)
@given(line=LINE)
def test_units_joined_are_the_line_but_for_spaces_that_no_word_follows(boundary, line):
    assert "".join(SEGMENTERS[boundary].units(line)) == re.sub(r" +(\t|$)", r"\1", line)


@settings(max_examples=100, deadline=None)
@given(LINE)
def test_units_of_a_coarser_boundary_are_whole_morphemes(line):
    morphemes = starts(SEGMENTERS["morpheme"].units(line))
    assert all(starts(SEGMENTERS[boundary].units(line)) <= morphemes for boundary in BOUNDARIES)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@settings(max_examples=50, deadline=None)
@given(line=LINE)
def test_white_space_always_begins_a_unit(boundary, line):
    for unit in SEGMENTERS[boundary].units(line):
        assert not re.search(r"\S[ \t]", unit)


@pytest.mark.parametrize("line", ["狸:\u3000山", "☆\u2009☆", "ก\u00a0ข"])
def test_white_space_of_any_kind_begins_a_unit(line):
    assert not any(re.search(r"\S\s", unit) for unit in SEGMENTERS["morpheme"].units(line))


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
    assert SEGMENTERS["morpheme"].units(line) == units


@pytest.mark.parametrize(
    ("boundary", "units"),
    [
        ("morpheme", "東京|の|学校|で|勉強|し|て|いる|ので|、|とても|楽しかっ|た|です|。"),
        ("predicate", "東京|の|学校|で|勉強|している|ので|、|とても|楽しかったです|。"),
        ("bunsetsu", "東京の|学校で|勉強しているので|、|とても|楽しかったです|。"),
    ],
)
def test_a_boundary_says_how_much_is_one_unit(boundary, units):
    assert SEGMENTERS[boundary].units(SENTENCE) == units.split("|")


@pytest.mark.parametrize(
    ("line", "units"),
    [
        ("食べなければならない日", "食べなければならない|日"),
        ("美しい山を見ませんでした。", "美しい|山を|見ませんでした|。"),
        ("お茶と新製品的なもの", "お茶と|新製品的な|もの"),
        ("食べ ない", "食べ| ない"),  # nothing attaches across a space
        ("、が", "、|が"),
    ],
)
def test_a_bunsetsu_is_a_content_word_with_the_words_attached_to_it(line, units):
    assert SEGMENTERS["bunsetsu"].units(line) == units.split("|")


def test_the_default_boundary_is_the_bunsetsu():
    assert Segmenter().units(SENTENCE) == SEGMENTERS["bunsetsu"].units(SENTENCE)
    assert count_units([("", SENTENCE)]) == count_units([("", SENTENCE)], "bunsetsu")


@pytest.mark.parametrize("boundary", ["none", "word"])
def test_a_boundary_without_units_is_refused(boundary):
    with pytest.raises(ValueError, match=f"'{boundary}'.*morpheme, predicate, bunsetsu"):
        Segmenter(boundary)


def test_units_are_counted_over_all_lines_of_all_texts():
    counts, forgotten = count_units([("", "狸は狸\n\n狸"), ("", "は\0狸")], "morpheme")
    assert counts == {"": {"狸": 4, "は": 2}} and forgotten == 0


def test_languages_are_counted_apart():
    texts = [("ja", "狸"), ("en", "moon"), ("ja", "山"), ("en", "a moon")]
    assert count_units(texts, "morpheme")[0] == {"ja": {"狸": 1, "山": 1}, "en": {"moon": 1, "a": 1, " moon": 1}}


def test_text_without_units_has_no_counts():
    assert count_units([]) == ({}, 0)
    assert not any(count_units([("ja", "\n"), ("en", "")])[0].values())


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_small_batches_give_the_counts_of_all_text_at_once(monkeypatch, boundary):
    texts = [(("ja", "en")[i % 2], text) for i, text in enumerate(TEXTS)]
    expected = {language: collections.Counter() for language, _ in texts}
    for language, text in texts:
        expected[language].update(unit for line in text.splitlines() for unit in SEGMENTERS[boundary].units(line))
    assert count_units(texts, boundary) == (expected, 0)
    monkeypatch.setattr(segment, "BATCH_CHARACTERS", 100)
    assert count_units(texts, boundary, workers=1) == (expected, 0)


def test_processes_count_the_same(monkeypatch):
    texts = [(("ja", "en")[i % 3 % 2], text) for i, text in enumerate(TEXTS)]
    expected = count_units(texts, workers=1)
    pools, pool = [], concurrent.futures.ProcessPoolExecutor
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda *args: pools.append(args[0]) or pool(*args))
    monkeypatch.setattr(segment, "BATCH_CHARACTERS", 1000)
    assert count_units(iter(texts), workers=2) == expected and pools == [2]


def test_a_long_line_is_counted_whole():
    line = "狸は山に住む。" * 3000
    assert count_units([("", line)], "morpheme")[0][""] == dict.fromkeys(["狸", "は", "山", "に", "住む", "。"], 3000)


def test_the_rarest_units_are_forgotten_and_counted_where_memory_ends(monkeypatch):
    monkeypatch.setattr(segment, "MAX_UNITS", 3)
    text = " ".join(word for n, word in enumerate(["狸", "山", "川", "月", "魚"], 1) for _ in range(n))
    whole = collections.Counter(unit for unit in SEGMENTERS["morpheme"].units(text))
    counts, forgotten = count_units([("ja", text), ("en", "moon")], "morpheme")
    kept = counts["ja"]
    assert 0 < len(kept) <= 3 and counts["en"] == {"moon": 1}
    assert all(kept[unit] == whole[unit] for unit in kept)
    assert min(kept.values()) > max(n for unit, n in whole.items() if unit not in kept)
    assert forgotten == whole.total() - kept.total() > 0


def test_what_is_kept_is_never_counted_too_often(monkeypatch):
    monkeypatch.setattr(segment, "BATCH_CHARACTERS", 50)
    texts = [("", text) for text in TEXTS]
    whole, _ = count_units(texts, workers=1)
    monkeypatch.setattr(segment, "MAX_UNITS", 40)
    counts, forgotten = count_units(texts, workers=1)
    assert len(counts[""]) <= 40 and counts[""] <= whole[""]
    assert forgotten == whole[""].total() - counts[""].total()
