"""Cuts text into the units that no piece may cross, and counts them: in parallel, in bounded memory.

The boundary says what a unit is: one MeCab morpheme (the paper's rule), a predicate with its auxiliaries, or a bunsetsu (a
content word with the words that attach to it).  White space before a unit belongs to it, and always begins a new one.
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
from typing import TypeAlias

from tokenization.errors import TokenizationError

BOUNDARIES = ("morpheme", "predicate", "bunsetsu", "none")
# Surface with the white space before it, part of speech, its two finer classes, and the dictionary form.
NODE = '-F "%M\\t%f[0],%f[1],%f[2],%f[6]\\n" -U "%M\\t%f[0],%f[1],%f[2],*\\n" -E "\\n"'
INNER_SPACE = re.compile(r"(?<=\S)(?=\s)")
BATCH_CHARACTERS = 4_000_000  # that a worker counts at one time
MAX_UNITS = 8_000_000  # distinct units of a language kept in memory (about 1 GB); beyond, the rarest are forgotten


class Segmenter:
    """MeCab with the IPADIC dictionary, or with UniDic (pip install unidic-lite)."""

    def __init__(self, boundary: str = "bunsetsu", dictionary: str = "ipadic") -> None:
        import MeCab

        if boundary not in BOUNDARIES[:3]:
            raise ValueError(f"boundary {boundary!r} has no units; it must be one of {', '.join(BOUNDARIES[:3])}")
        rules: dict[str, Callable[[str, str], bool]]
        rules = {"morpheme": _never_attaches, "predicate": _attaches_to_predicate, "bunsetsu": _attaches_to_bunsetsu}
        self._attaches = rules[boundary]
        self._tagger = MeCab.Tagger(f"{_dictionary_arguments(dictionary)} {NODE}")

    def units(self, line: str) -> list[str]:
        """The units of one line; joined they give the line without white space before a tab or its end."""
        # MeCab skips control characters like white space; each is a unit of its own here.
        result: list[str] = []
        for i, cell in enumerate(line.split("\t")):
            if i:
                result.append("\t")
            previous = ""
            for node in self._tagger.parse(cell).split("\n"):
                surface, tab, tags = node.rpartition("\t")
                if not tab:
                    continue
                if INNER_SPACE.search(surface):  # MeCab may join an unknown symbol and the wide space after it
                    *starts, surface = INNER_SPACE.split(surface)
                    attaches = previous and not starts[0][0].isspace() and self._attaches(previous, tags)
                    result += [result.pop() + starts[0] if attaches else starts[0], *starts[1:]]
                if previous and not surface[0].isspace() and self._attaches(previous, tags):
                    result[-1] += surface
                else:
                    result.append(surface)
                previous = tags
        return result


def _dictionary_arguments(name: str) -> str:
    if name == "ipadic":
        import ipadic

        return ipadic.MECAB_ARGS
    try:
        import unidic_lite
    except ImportError as error:
        raise TokenizationError("tokenizer: the UniDic dictionary is not installed; pip install unidic-lite") from error
    return f'-r "{os.devnull}" -d "{unidic_lite.DICDIR}"'


# --- which morpheme attaches to the one before it: tags are part of speech, finer class, finest class, dictionary form -----


def _never_attaches(previous: str, tags: str) -> bool:
    return False


@functools.cache
def _attaches_to_predicate(previous: str, tags: str) -> bool:
    """Auxiliaries, dependent verbs and te-forms, after a verb, an adjective or another of them."""
    head, (pos, kind, _, form) = previous.split(","), tags.split(",")
    chain = head[0] in ("動詞", "形容詞", "助動詞") or (head[0] == "助詞" and head[1] == "接続助詞")
    dependent = pos == "助動詞" or (pos in ("動詞", "形容詞") and kind in ("非自立", "接尾", "非自立可能"))
    return chain and (dependent or (pos == "助詞" and kind == "接続助詞" and form in ("て", "で", "ば", "ちゃ", "じゃ")))


@functools.cache
def _attaches_to_bunsetsu(previous: str, tags: str) -> bool:
    """Particles, auxiliaries, suffixes and dependent words; what follows a prefix; the する of a verbal noun."""
    head, (pos, kind, finer, form) = previous.split(","), tags.split(",")
    if head[0] in ("記号", "補助記号", "空白"):
        return False
    if pos in ("助詞", "助動詞", "接尾辞") or head[0] in ("接頭詞", "接頭辞"):
        return True
    if pos in ("動詞", "形容詞"):
        return kind in ("非自立", "接尾", "非自立可能") or (head[1] == "サ変接続" and form in ("する", "できる"))
    return pos == "名詞" and (kind == "接尾" or (kind == "非自立" and (finer == "助動詞語幹" or form in ("の", "ん"))))


# --- counting ---------------------------------------------------------------------------------------------------------

Counts: TypeAlias = dict[str, collections.Counter[str]]  # language -> unit -> occurrences
Batch: TypeAlias = tuple[str, list[str]]  # a language and texts
BatchCounts: TypeAlias = tuple[str, collections.Counter[str]]


def count_units(
    texts: Iterable[tuple[str, str]],
    boundary: str = "bunsetsu",
    dictionary: str = "ipadic",
    workers: int = 0,
    init_worker: Callable[[], None] | None = None,
) -> tuple[Counts, int]:
    """Occurrences of each unit in (language, text) pairs, and the number of occurrences of rare units that were forgotten.

    Beyond MAX_UNITS distinct units of a language those seen once are forgotten, then those seen twice, and so on; forgotten
    ones are counted.  Besides, only the input on its way to the workers (default: one per core) is in memory.  `init_worker`
    is called first in every worker process.
    """
    counts: Counts = {}
    forgotten = 0
    batches = _batches(texts)
    head = list(itertools.islice(batches, 2))
    workers = workers or os.cpu_count() or 1
    if len(head) < 2 or workers < 2:  # small input is not worth a process
        results: Iterator[BatchCounts] = (
            (language, _count(batch, boundary, dictionary)) for language, batch in itertools.chain(head, batches)
        )
    else:
        results = _count_in_workers(itertools.chain(head, batches), boundary, dictionary, workers, init_worker)
    for language, units in results:
        total = counts.setdefault(language, collections.Counter())
        total.update(units)
        rare = 1
        while len(total) > MAX_UNITS:
            dropped = [unit for unit, n in total.items() if n <= rare]
            forgotten += sum(total.pop(unit) for unit in dropped)
            rare += 1
    return counts, forgotten


def _count_in_workers(
    batches: Iterable[Batch], boundary: str, dictionary: str, workers: int, init_worker: Callable[[], None] | None
) -> Iterator[BatchCounts]:
    """The counts of each batch, in order."""
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), init_worker) as pool:
        pending: collections.deque[tuple[str, concurrent.futures.Future[collections.Counter[str]]]] = collections.deque()
        for language, texts in batches:
            pending.append((language, pool.submit(_count, texts, boundary, dictionary)))
            if len(pending) > workers:
                language, future = pending.popleft()
                yield language, future.result()
        for language, future in pending:
            yield language, future.result()


def _count(texts: list[str], boundary: str, dictionary: str) -> collections.Counter[str]:
    segmenter = _segmenter(boundary, dictionary)
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        for line in split_lines(text):
            counts.update(segmenter.units(line))
    return counts


@functools.cache
def _segmenter(boundary: str, dictionary: str) -> Segmenter:
    return Segmenter(boundary, dictionary)


def split_lines(text: str) -> list[str]:
    """The lines of a text without NUL, which SentencePiece's input cannot hold; long ones are kept whole."""
    return text.replace("\0", "").splitlines()


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[Batch]:
    """Texts of one language together, about BATCH_CHARACTERS characters each."""
    pending: dict[str, list[str]] = {}
    size: collections.Counter[str] = collections.Counter()
    for language, text in texts:
        pending.setdefault(language, []).append(text)
        size[language] += len(text)
        if size[language] >= BATCH_CHARACTERS:
            yield language, pending.pop(language)
            size[language] = 0
    yield from pending.items()
