"""Cuts text into the units that no piece may cross, and counts them: in parallel, in bounded memory.

The boundary says what a unit is: one MeCab morpheme (the paper's rule), a predicate with its auxiliaries, or a bunsetsu (a
content word with what leans on it).  White space before a unit belongs to it, and always begins a new one.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator

from tanuki_jax.files import lock

LEVELS = ("morpheme", "predicate", "bunsetsu", "none")
# Surface with the white space before it, part of speech, its two finer classes, and the dictionary form.
NODE = '-F "%M\\t%f[0],%f[1],%f[2],%f[6]\\n" -U "%M\\t%f[0],%f[1],%f[2],*\\n" -E "\\n"'
INNER_SPACE = re.compile(r"(?<=\S)(?=\s)")
BATCH = 4_000_000  # characters that a worker counts at one time
MOST_UNITS = 8_000_000  # distinct units of a language kept in memory (about 1 GB); beyond, the rarest are forgotten


class Segmenter:
    """MeCab with the IPADIC dictionary, or with UniDic (pip install unidic-lite)."""

    def __init__(self, boundary: str = "bunsetsu", dictionary: str = "ipadic") -> None:
        import MeCab

        if boundary not in LEVELS[:3]:
            raise ValueError(f"boundary {boundary!r} has no units; it must be one of {', '.join(LEVELS[:3])}")
        leans: dict[str, Callable[[str, str], bool]]
        leans = {"morpheme": _never, "predicate": _in_predicate, "bunsetsu": _in_bunsetsu}
        self._leans = leans[boundary]
        self._tagger = MeCab.Tagger(f"{_dictionary(dictionary)} {NODE}")

    def units(self, line: str) -> list[str]:
        """The units of one line; joined they give the line without white space before a tab or its end."""
        # MeCab skips control characters like white space; each is a unit of its own here.
        result: list[str] = []
        for i, cell in enumerate(line.split("\t")):
            if i:
                result.append("\t")
            before = ""
            for node in self._tagger.parse(cell).split("\n"):
                surface, tab, tags = node.rpartition("\t")
                if not tab:
                    continue
                if INNER_SPACE.search(surface):  # MeCab may join an unknown symbol and the wide space after it
                    *starts, surface = INNER_SPACE.split(surface)
                    lean = before and not starts[0][0].isspace() and self._leans(before, tags)
                    result += [result.pop() + starts[0] if lean else starts[0], *starts[1:]]
                if before and not surface[0].isspace() and self._leans(before, tags):
                    result[-1] += surface
                else:
                    result.append(surface)
                before = tags
        return result


def _dictionary(name: str) -> str:
    if name == "ipadic":
        import ipadic

        return ipadic.MECAB_ARGS
    from tanuki_jax.errors import UserError

    try:
        import unidic_lite
    except ImportError as error:
        raise UserError("tokenizer: the UniDic dictionary is not installed; pip install unidic-lite") from error
    return f'-r "{os.devnull}" -d "{unidic_lite.DICDIR}"'


# --- which morpheme leans on the one before it: tags are part of speech, finer class, finest class, dictionary form --------


def _never(before: str, tags: str) -> bool:
    return False


@functools.cache
def _in_predicate(before: str, tags: str) -> bool:
    """Auxiliaries, dependent verbs and te-forms, after a verb, an adjective or another of them."""
    head, (pos, kind, _, form) = before.split(","), tags.split(",")
    chain = head[0] in ("動詞", "形容詞", "助動詞") or (head[0] == "助詞" and head[1] == "接続助詞")
    dependent = pos == "助動詞" or (pos in ("動詞", "形容詞") and kind in ("非自立", "接尾", "非自立可能"))
    return chain and (dependent or (pos == "助詞" and kind == "接続助詞" and form in ("て", "で", "ば", "ちゃ", "じゃ")))


@functools.cache
def _in_bunsetsu(before: str, tags: str) -> bool:
    """Particles, auxiliaries, suffixes and dependent words; what follows a prefix; the する of a verbal noun."""
    head, (pos, kind, finer, form) = before.split(","), tags.split(",")
    if head[0] in ("記号", "補助記号", "空白"):
        return False
    if pos in ("助詞", "助動詞", "接尾辞") or head[0] in ("接頭詞", "接頭辞"):
        return True
    if pos in ("動詞", "形容詞"):
        return kind in ("非自立", "接尾", "非自立可能") or (head[1] == "サ変接続" and form in ("する", "できる"))
    return pos == "名詞" and (kind == "接尾" or (kind == "非自立" and (finer == "助動詞語幹" or form in ("の", "ん"))))


# --- counting ---------------------------------------------------------------------------------------------------------

Counts = dict[str, collections.Counter[str]]  # language -> unit -> how often


def count_units(
    texts: Iterable[tuple[str, str]], boundary: str = "bunsetsu", dictionary: str = "ipadic", workers: int = 0
) -> tuple[Counts, int]:
    """How often each unit occurs in (language, text) pairs, and how many occurrences of rare units were forgotten.

    Beyond MOST_UNITS distinct units of a language those seen once are forgotten, then those seen twice, and so on; forgotten
    ones are counted.  Only the input on its way to the workers (default: one for each core) is held besides.
    """
    counts: Counts = {}
    forgotten = 0
    for language, found in _count_batch(_batches(texts), boundary, dictionary, workers or os.cpu_count() or 1):
        total = counts.setdefault(language, collections.Counter())
        total.update(found)
        rare = 1
        while len(total) > MOST_UNITS:
            dropped = [unit for unit, n in total.items() if n <= rare]
            forgotten += sum(total.pop(unit) for unit in dropped)
            rare += 1
    return counts, forgotten


def _count_batch(
    batches: Iterator[tuple[str, list[str]]], boundary: str, dictionary: str, workers: int
) -> Iterator[tuple[str, collections.Counter[str]]]:
    """The counts of each batch, in order; the first batches are counted here, since small input is not worth a process."""
    head = list(itertools.islice(batches, 2))
    if len(head) < 2 or workers < 2:
        for language, texts in (*head, *batches):
            yield language, _count(texts, boundary, dictionary)
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), lock.end_with_parent)
    with pool:
        waiting: collections.deque = collections.deque()
        for language, texts in (*head, *batches):
            waiting.append((language, pool.submit(_count, texts, boundary, dictionary)))
            if len(waiting) > workers:
                language, future = waiting.popleft()
                yield language, future.result()
        for language, future in waiting:
            yield language, future.result()


def _count(texts: list[str], boundary: str, dictionary: str) -> collections.Counter[str]:
    segmenter = _segmenter(boundary, dictionary)
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        for line in lines(text):
            counts.update(segmenter.units(line))
    return counts


@functools.cache
def _segmenter(boundary: str, dictionary: str) -> Segmenter:
    return Segmenter(boundary, dictionary)


def lines(text: str) -> list[str]:
    """The lines of a text without NUL, which SentencePiece's input cannot hold; long ones are kept whole."""
    return text.replace("\0", "").splitlines()


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Texts of one language together, about BATCH characters each."""
    held: dict[str, list[str]] = {}
    size: collections.Counter[str] = collections.Counter()
    for language, text in texts:
        held.setdefault(language, []).append(text)
        size[language] += len(text)
        if size[language] >= BATCH:
            yield language, held.pop(language)
            size[language] = 0
    yield from held.items()
