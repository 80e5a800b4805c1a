"""Cuts text into the units that no piece may cross: MeCab morphemes (the paper's rule), each with the space before it."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

MORPHEME_LINE = '-F "%M\\n" -U "%M\\n" -E "\\n"'  # surface with the white space before it, one per line


class Segmenter:
    """MeCab with the IPADIC dictionary."""

    def __init__(self) -> None:
        import ipadic
        import MeCab

        self._tagger = MeCab.Tagger(f"{ipadic.MECAB_ARGS} {MORPHEME_LINE}")

    def units(self, line: str) -> list[str]:
        """The morphemes of one line; joined they give the line without white space before a tab or its end."""
        # MeCab skips control characters like white space; each is a unit of its own here.
        result: list[str] = []
        for i, cell in enumerate(line.split("\t")):
            if i:
                result.append("\t")
            result += [u for u in self._tagger.parse(cell).split("\n") if u]
        return result


def count_units(texts: Iterable[str]) -> collections.Counter[str]:
    """How often each unit occurs."""
    segmenter = Segmenter()
    counts: collections.Counter[str] = collections.Counter()
    for line in _lines(texts):
        counts.update(segmenter.units(line))
    return counts


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from text.replace("\0", "").splitlines()
