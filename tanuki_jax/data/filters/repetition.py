"""Texts that repeat themselves: characters, lines, n-grams, and loops at the end of an answer.

The thresholds are those of the Tanuki project's web and synthetic corpora, which are Gopher's (Rae et al., 2021, table A1).
Its n-grams are of words; without a segmenter, ours are of runs of one script (kanji, hiragana, katakana, letters, digits).
"""

from __future__ import annotations

import collections
import re

import numpy as np

from tanuki_jax.data.filters.texts import without_code

CHARACTER = 0.30  # share of the most frequent character
LINES, LINE_CHARACTERS = 0.30, 0.20  # share of lines, of characters in lines, that were there before
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}  # share of characters in the most frequent n-gram
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # in all n-grams that occur more than once
LOOP, SHORT_LOOP = 0.30, 0.50  # share of characters in a piece that follows itself at once, three times or more
LONG = 40  # characters of a loop from which LOOP holds; a refrain is shorter
PERIOD = 64  # characters of the longest such piece
FEW_CHARACTERS, FEW_LINES, FEW_UNITS = 20, 4, 12  # texts with less are not looked at
FEW_NGRAMS = 5  # an n-gram that occurs less often is no repetition, however short the text
WINDOW = 20_000  # characters of a long text that are looked at for loops

_UNITS = re.compile(r"[\u4e00-\u9fff々]+|[\u3041-\u309f]+|[\u30a0-\u30ff]+|[^\W\d_\u3041-\u30ff\u4e00-\u9fff]+|\d+")
_DRAWING = frozenset("-=_*#|~.,:、。・…─━ \t\n\u3000")  # of rules, lists and tables
_MARKER = re.compile(r"^(?:[-*+・•◦]|[(（]?\d{1,3}[.)）.、:]?|第[\d一二三四五六七八九十百]+[条章節回]?)\s*")  # of a list
_WORDY = re.compile(r"[^\W\d_]")


def find_repetition(text: str) -> str:
    """What a text repeats too much; empty = nothing."""
    text = without_code(text).strip()
    if len(text) < FEW_CHARACTERS:
        return ""
    return _characters(text) or _lines(text) or _loops(text) or _ngrams(text)


def _characters(text: str) -> str:
    counts = collections.Counter(text)
    for space in " \t\n\u3000":
        counts.pop(space, None)
    if not counts:
        return ""
    total = sum(counts.values())
    character, count = max(counts.items(), key=lambda item: item[1])
    if character in _DRAWING or character.isdigit():
        return ""
    return f"{character!r} is {count / total:.0%} of it" if count >= CHARACTER * total else ""


def _lines(text: str) -> str:
    lines = [line for line in (_MARKER.sub("", line.strip()).strip() for line in text.split("\n")) if _WORDY.search(line)]
    if len(lines) < FEW_LINES:
        return ""
    earlier: set[str] = set()
    repeated = [line for line in lines if line in earlier or earlier.add(line)]  # type: ignore[func-returns-value]
    characters = sum(map(len, repeated)) / sum(map(len, lines))
    if len(repeated) > LINES * len(lines) or characters > LINE_CHARACTERS:
        return f"{len(repeated) / len(lines):.0%} of the lines ({characters:.0%} of their characters) were there before"
    return ""


def _ngrams(text: str) -> str:
    units = _UNITS.findall(text)
    if len(units) < FEW_UNITS:
        return ""
    lengths = [len(unit) for unit in units]
    total = sum(lengths)
    for n, limit in TOP_NGRAM.items():
        counts = collections.Counter(zip(*(units[i:] for i in range(n)), strict=False))
        frequent = [(count * sum(map(len, ngram)) / total, ngram) for ngram, count in counts.items() if count >= FEW_NGRAMS]
        if not frequent:  # nor is there a longer one
            break
        share, ngram = max(frequent)
        if share > limit:
            return f"{' '.join(ngram)!r} is {share:.0%} of it"
    for n, limit in REPEATED_NGRAMS.items():
        share = _repeated_share(units, lengths, n) / total
        if share > limit:
            return f"{share:.0%} of it are repeated {n}-grams"
        if not share:
            break
    return ""


def _repeated_share(units: list[str], lengths: list[int], n: int) -> int:
    """Characters in n-grams that were there before; each is counted once, however many n-grams hold it."""
    earlier: set[tuple[str, ...]] = set()
    covered = bytearray(len(units))
    for start in range(len(units) - n + 1):
        ngram = tuple(units[start : start + n])
        if ngram in earlier:
            covered[start : start + n] = b"\1" * n
        earlier.add(ngram)
    return sum(length for length, flag in zip(lengths, covered, strict=True) if flag)


def _loops(text: str) -> str:
    """A piece of up to PERIOD characters that follows itself at once three times or more, as models do that cannot end."""
    points = np.frombuffer(text[-WINDOW:].encode("utf-32-le"), np.uint32)
    size = len(points)
    best, period = 0, 0
    for step in range(1, min(PERIOD, size // 3) + 1):
        same = points[step:] == points[:-step]
        if np.count_nonzero(same) < max(2 * step, LOOP * size - step):
            continue
        edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False]))))
        starts, stops = edges[::2], edges[1::2]
        for start, stop in zip(starts, stops, strict=True):
            length = stop - start + step
            if length >= 3 * step and length > best and not _DRAWING.issuperset(text[-WINDOW:][start : stop + step]):
                best, period = int(length), step
    if best >= (LOOP if best >= LONG else SHORT_LOOP) * size:
        return f"a piece of {period} characters follows itself over {best / size:.0%} of it"
    return ""
