"""Text that remembers where each of its characters came from, through everything that a chat template does with it.

A `Traced` is a `str` in every respect.  Slices, sums, strips, splits and replacements keep the origin of each character;
what an operation makes anew from traced text belongs to that text as a whole.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, SupportsIndex

Source = tuple[int | str, ...]  # (number of the message, field) or (argument of the template,)


class Run(NamedTuple):
    """`length` characters from `offset` on of the text `source`; without an offset they were made from it.

    A length of 0 marks where an empty text stands.
    """

    length: int
    source: Source | None = None  # None: the template's own text
    offset: int | None = None
    generated: int = 0  # number of the {% generation %} block that it stands in; 0 = none


LINEAR_SEARCH_RUNS = 8  # runs that are looked through one by one


class Traced(str):
    """A string with the origin of its characters as runs, in order."""

    _runs: tuple[Run, ...]
    _stops: list[int]  # where each run ends; there once it has been asked for

    def __new__(cls, text: str, runs: Iterable[Run] | None = None) -> Traced:
        self = super().__new__(cls, text)
        self._runs = tuple(runs) if runs is not None else (Run(len(text)),) if text else ()
        return self

    @classmethod
    def of(cls, text: str, source: Source) -> Traced:
        """A whole text as its own origin."""
        return cls(text, (Run(len(text), source, 0),))

    def __str__(self) -> Traced:  # str(x) is x, so that Jinja's filters keep it
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (str.__str__(self), self._runs)

    def part(self, start: int, stop: int) -> Traced:
        """Characters [start, stop)."""
        runs = []
        if len(self._runs) > LINEAR_SEARCH_RUNS and not hasattr(self, "_stops"):
            self._stops = list(itertools.accumulate(run.length for run in self._runs))
        first = bisect.bisect_left(self._stops, start) if len(self._runs) > LINEAR_SEARCH_RUNS else 0
        at = self._stops[first - 1] if first else 0
        for run in itertools.islice(self._runs, first, None):
            if at > stop:
                break
            a, b = max(start, at), min(stop, at + run.length)
            if a < b or a == b and run.source and start == stop:
                offset = None if run.offset is None else run.offset + a - at
                runs.append(run._replace(length=b - a, offset=offset))
            at += run.length
        return Traced(str.__getitem__(self, slice(start, stop)), runs)

    def __getitem__(self, key: SupportsIndex | slice) -> Traced:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self.part(start, stop) if step == 1 else join(self.part(i, i + 1) for i in range(start, stop, step))
        text = str.__getitem__(self, key)  # raises what str raises
        at = range(len(self))[key]
        return self.part(at, at + 1) if text else Traced("")

    def __iter__(self) -> Iterator[Traced]:
        return (self.part(i, i + 1) for i in range(len(self)))

    def __add__(self, other: str) -> Traced:
        return join((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> Traced:
        return join((other, self)) if isinstance(other, str) else NotImplemented

    def __mod__(self, other: Any) -> Any:
        return apply(str.__mod__, (self, other))

    def __rmod__(self, other: Any) -> Any:
        return apply(str.__mod__, (other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> Traced:
        return join([self] * count.__index__())

    __rmul__ = __mul__

    def _pieces(self, pieces: Iterable[str], skip: int = 0) -> list[Traced]:
        """Parts of this string that str's own method found, in order, `skip` characters between them."""
        found, at = [], 0
        for piece in pieces:
            at = str.index(self, piece, at)
            found.append(self.part(at, at + len(piece)))
            at += len(piece) + skip
        return found

    def strip(self, chars: str | None = None) -> Traced:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> Traced:
        return self.part(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None) -> Traced:
        return self.part(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str) -> Traced:
        return self.part(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str) -> Traced:
        return self.part(0, len(str.removesuffix(self, suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Traced]:  # type: ignore[override]
        return self._pieces(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Traced]:  # type: ignore[override]
        return self._pieces(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[Traced]:  # type: ignore[override]
        return self._pieces(str.splitlines(self, keepends))

    def partition(self, sep: str) -> tuple[Traced, Traced, Traced]:
        before, middle, _ = (len(piece) for piece in str.partition(self, sep))
        return self.part(0, before), self.part(before, before + middle), self.part(before + middle, len(self))

    def rpartition(self, sep: str) -> tuple[Traced, Traced, Traced]:
        before, middle, _ = (len(piece) for piece in str.rpartition(self, sep))
        return self.part(0, before), self.part(before, before + middle), self.part(before + middle, len(self))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Traced:
        if not old:
            return derive(str.replace(self, old, new, count), (self, new))
        return join(self.split(old, count), new)

    def join(self, pieces: Iterable[Any]) -> Traced:
        listed = list(pieces)
        str.join(self, listed)  # raises what str raises
        return join(listed, self)

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return str.encode(str.__str__(self), encoding, errors)


def _derived_method(name: str) -> Callable[..., Any]:
    own = getattr(str, name)

    def method(self: Traced, *arguments: Any, **named: Any) -> Any:
        return apply(own, (self, *arguments), named)

    method.__name__ = name
    return method


# These change single characters, or set text into other text.
for _name in (
    *("capitalize", "casefold", "center", "expandtabs", "format", "format_map", "ljust", "lower", "rjust", "swapcase", "title"),
    *("translate", "upper", "zfill"),
):
    setattr(Traced, _name, _derived_method(_name))


def join(values: Iterable[Any], separator: str = "") -> Traced:
    """The texts of all values one after another, with their origins."""
    texts: list[str] = []
    runs: list[Run] = []
    for number, value in enumerate(values):
        for text in (separator, value) if number and separator else (value,):
            piece = text if isinstance(text, str) else derive(str(text), (text,))
            texts.append(piece)
            for run in piece._runs if isinstance(piece, Traced) else (Run(len(piece)),):
                if run.length or run.source:
                    _append(runs, run)
    return Traced("".join(texts), runs)


def _append(runs: list[Run], run: Run) -> None:
    """Adds a run, together with the last where it goes on with it."""
    if runs:
        last = runs[-1]
        goes_on = last.offset + last.length if last.offset is not None else None
        if (run.source, run.offset, run.generated) == (last.source, goes_on, last.generated) and last.length:
            runs[-1] = last._replace(length=last.length + run.length)
            return
    runs.append(run)


def apply(function: Callable[..., Any], arguments: tuple[Any, ...], named: Mapping[str, Any] | None = None) -> Any:
    """function(*arguments), traced where it only sets its texts into another, as formats do; else derived as a whole.

    It is called once more with a character in the place of each traced text; what then stands around these is its own.
    """
    named = dict(named or {})
    result = function(*arguments, **named)
    if not isinstance(result, str):
        return derive(result, (*arguments, *named.values()))
    texts = [text for text in _texts((arguments, list(named.values()))) if any(run.source for run in text._runs)]
    marks = {id(text): chr(0x100000 + number) for number, text in enumerate(texts[:0xFFFF])}
    try:
        marked = function(*_with_marks(arguments, marks), **_with_marks(named, marks))
    except Exception:  # it looks into the texts
        marked = ""
    back = {marks[id(text)]: text for text in texts}
    pieces = join(back.get(piece, piece) for piece in re.split(f"([{''.join(marks.values())}])", marked)) if marks else ""
    if texts and str.__str__(pieces) == str.__str__(result):
        return pieces
    return derive(str.__str__(result), (*arguments, *named.values()))


def _with_marks(value: Any, marks: Mapping[int, str]) -> Any:
    if isinstance(value, Traced):
        return marks.get(id(value), str.__str__(value))
    if isinstance(value, dict):
        return {name: _with_marks(item, marks) for name, item in value.items()}
    return type(value)(_with_marks(item, marks) for item in value) if isinstance(value, list | tuple) else value


def derive(result: Any, arguments: Iterable[Any]) -> Any:
    """What was made from `arguments` by an operation that does not trace: as a whole it belongs to the first traced one."""
    if not isinstance(result, str) or isinstance(result, Traced):
        return [derive(item, arguments) for item in result] if isinstance(result, list) else result
    texts = [text for text in _texts(tuple(arguments)) if any(run.source for run in text._runs)]
    if not texts or not result:
        return result
    if len(texts) == 1 and len(texts[0]) == len(result):  # upper, lower, ...
        return Traced(result, texts[0]._runs)
    sources = list(dict.fromkeys(run.source for text in texts for run in text._runs if run.source))
    return Traced(result, (Run(len(result), sources[0]), *(Run(0, source) for source in sources[1:])))


def _texts(value: Any) -> Iterator[Traced]:
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def trace(value: Any, source: Source) -> Any:
    """A copy of a JSON value in which every string, keys included, is traced to where it stands: source, key, number, ..."""
    if isinstance(value, str):
        return Traced.of(value, source)
    if isinstance(value, dict):
        return {trace(name, (*source, f"key {name}")): trace(item, (*source, name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [trace(item, (*source, number)) for number, item in enumerate(value)]
    return value


def runs_of(text: Traced) -> tuple[Run, ...]:
    """The origins of a text's characters."""
    return text._runs


def spans_of(text: Traced) -> list[tuple[tuple[int, int], Run]]:
    """The characters [start, stop) of each run."""
    stops = itertools.accumulate(run.length for run in text._runs)
    return [((stop - run.length, stop), run) for stop, run in zip(stops, text._runs, strict=True)]


_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def to_json(value: Any, sort_keys: bool = False, **options: Any) -> Traced:
    """json.dumps, traced: what stands for a string, quotes included, belongs to it."""
    text = json.dumps(value, sort_keys=sort_keys, **options)
    pieces: list[str] = []
    at = 0
    for literal, string in zip(_LITERAL.finditer(text), _strings(value, sort_keys), strict=True):
        pieces += [text[at : literal.start()], derive(literal.group(), (string,))]
        at = literal.end()
    return join([*pieces, text[at:]])


def _strings(value: Any, sort_keys: bool) -> Iterator[Any]:
    """The strings of a JSON value in the order in which json.dumps writes them; a key that is no string, as it is."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in sorted(value.items()) if sort_keys else value.items():
            yield name
            yield from _strings(item, sort_keys)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, sort_keys)
