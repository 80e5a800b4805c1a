"""Which letters are of which script, and how many of each a text has."""

from __future__ import annotations

import re
from typing import NamedTuple

KANA = re.compile(r"[\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\uff66-\uff9f]")
KANJI = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff々〆]")
LATIN = re.compile(r"[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\uff21-\uff3a\uff41-\uff5a]")
HANGUL = re.compile(r"[\u1100-\u11ff\uac00-\ud7a3]")
OTHER = re.compile(
    r"[\u0370-\u0589\u05d0-\u05ea\u0620-\u064a\u0900-\u0dff\u0e00-\u0eff\u1000-\u10ff\u1200-\u137f\u1780-\u17b3]"
)  # Greek to Khmer


class Letters(NamedTuple):
    """How many letters of each script a text has."""

    kana: int
    kanji: int
    latin: int
    hangul: int
    other: int

    @property
    def total(self) -> int:
        return sum(self)


def count_letters(text: str) -> Letters:
    """The letters of a text by script."""
    return Letters(*(len(script.findall(text)) for script in (KANA, KANJI, LATIN, HANGUL, OTHER)))
