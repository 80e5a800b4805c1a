"""Strings that know where each of their characters came from, through everything that a chat template does with them.

A `Traced` is a `str` in every respect.  Slices, sums, strips, splits and replacements keep the origin of each character;
text that an operation derives from traced text (upper, escape) belongs to that text as a whole.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

Source: TypeAlias = tuple[int | str, ...]  # (number of the message, field) or (argument of the template,)


class Run(NamedTuple):
    """`length` characters of the text `source` from `offset` on; without an offset, characters derived from it.

    A length of 0 marks the place of an empty text.
    """

    length: int
    source: Source | None = None  # None: the template's own text
    offset: int | None = None
    generated: int = 0  # number of the {% generation %} block around it; 0 = none


LINEAR_SEARCH_RUNS = 8  # up to so many runs are searched one by one


class Traced(str):
    """A string with the origin of its characters as runs, in order."""

    _runs: tuple[Run, ...]
    _stops: list[int]  # where each run ends; set when it is first needed

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

    def __mod__(self, other: object) -> str:
        return apply(str.__mod__, (self, other))

    def __rmod__(self, other: object) -> str:
        return apply(str.__mod__, (other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> Traced:
        return join([self] * count.__index__())

    __rmul__ = __mul__

    def _pieces(self, pieces: Iterable[str], skip: int = 0) -> list[Traced]:
        """The pieces into which a method of str has cut this string, in order, `skip` characters between them."""
        parts, at = [], 0
        for piece in pieces:
            at = str.index(self, piece, at)
            parts.append(self.part(at, at + len(piece)))
            at += len(piece) + skip
        return parts

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
            return join([derive_text(str.replace(self, old, new, count), (self, new))])
        return join(self.split(old, count), new)

    def join(self, pieces: Iterable[str]) -> Traced:
        listed = list(pieces)
        str.join(self, listed)  # raises what str raises
        return join(listed, self)

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return str.encode(str.__str__(self), encoding, errors)


def _derived_method(name: str) -> Callable[..., object]:
    str_method = getattr(str, name)

    def method(self: Traced, *arguments: object, **named: object) -> object:
        return apply(str_method, (self, *arguments), named)

    method.__name__ = name
    return method


# These change single characters, or set text into other text.
for _name in (
    *("capitalize", "casefold", "center", "expandtabs", "format", "format_map", "ljust", "lower", "rjust", "swapcase", "title"),
    *("translate", "upper", "zfill"),
):
    setattr(Traced, _name, _derived_method(_name))


def join(values: Iterable[object], separator: str = "") -> Traced:
    """The texts of all values, joined, with their origins."""
    texts: list[str] = []
    runs: list[Run] = []
    for number, value in enumerate(values):
        for text in (separator, value) if number and separator else (value,):
            piece = text if isinstance(text, str) else derive_text(str(text), (text,))
            texts.append(piece)
            for run in piece._runs if isinstance(piece, Traced) else (Run(len(piece)),):
                if run.length or run.source:
                    _append(runs, run)
    return Traced("".join(texts), runs)


def _append(runs: list[Run], run: Run) -> None:
    """Appends a run, merged with the last one if it continues that."""
    if runs:
        last = runs[-1]
        next_offset = last.offset + last.length if last.offset is not None else None
        if (run.source, run.offset, run.generated) == (last.source, next_offset, last.generated) and last.length:
            runs[-1] = last._replace(length=last.length + run.length)
            return
    runs.append(run)


def apply(
    function: Callable[..., object], arguments: tuple[object, ...], named: Mapping[str, object] | None = None
) -> Any:  # what the function returns
    """function(*arguments, **named), traced."""
    named = named or {}
    return trace_result(function(*arguments, **named), function, arguments, named)


def trace_result(
    result: object, function: Callable[..., object], arguments: tuple[object, ...], named: Mapping[str, object]
) -> object:
    """The result of function(*arguments, **named), traced.

    A function that only puts its texts into another one, as formats do, keeps their origins.  This is found out by a second
    call with one character in the place of each traced text.  Any other result is derived from its arguments as a whole.
    """
    if not isinstance(result, str):
        return derive(result, (*arguments, *named.values()))
    plain = str.__str__(result)
    texts = [text for text in _texts((arguments, list(named.values()))) if any(run.source for run in text._runs)]
    if not texts:
        return plain
    marks = {id(text): chr(0x100000 + number) for number, text in enumerate(texts[:0xFFFF])}
    try:
        marked = function(*_with_marks(arguments, marks), **_with_marks(dict(named), marks))
    except Exception:  # it does not accept the marks in place of the texts
        marked = None
    if isinstance(marked, str):
        originals = {marks[id(text)]: text for text in texts if id(text) in marks}
        pieces = join(originals.get(piece, piece) for piece in re.split(f"([{''.join(marks.values())}])", marked))
        if str.__str__(pieces) == plain:
            return pieces
    return derive_text(plain, (*arguments, *named.values()))


def _with_marks(value: Any, marks: Mapping[int, str]) -> Any:  # a value of the same type
    if isinstance(value, Traced):
        return marks.get(id(value), str.__str__(value))
    if isinstance(value, dict):
        return {name: _with_marks(item, marks) for name, item in value.items()}
    return type(value)(_with_marks(item, marks) for item in value) if isinstance(value, list | tuple) else value


def derive(result: object, arguments: Iterable[object]) -> object:
    """A result with its texts derived from `arguments`; lists are copied."""
    if isinstance(result, list):
        return [derive(item, arguments) for item in result]
    return derive_text(result, arguments) if isinstance(result, str) else result


def derive_text(text: str, arguments: Iterable[object]) -> str:
    """A text that an operation which does not trace made from `arguments`: as a whole it belongs to the first traced one."""
    if isinstance(text, Traced):
        return text
    texts = [argument for argument in _texts(tuple(arguments)) if any(run.source for run in argument._runs)]
    if not texts or not text:
        return text
    if len(texts) == 1 and len(texts[0]) == len(text):  # upper, lower, ...
        return Traced(text, texts[0]._runs)
    sources = list(dict.fromkeys(run.source for argument in texts for run in argument._runs if run.source))
    return Traced(text, (Run(len(text), sources[0]), *(Run(0, source) for source in sources[1:])))


def _texts(value: object) -> Iterator[Traced]:
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def trace(value: object, source: Source) -> object:
    """A copy of a JSON value in which every string, keys included, is traced to its path: source, key, number, ..."""
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


def to_json(
    value: object,
    sort_keys: bool = False,
    ensure_ascii: bool = True,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
) -> Traced:
    """json.dumps, traced: the literal of a string, quotes included, belongs to the string."""
    text = json.dumps(value, sort_keys=sort_keys, ensure_ascii=ensure_ascii, indent=indent, separators=separators)
    pieces: list[str] = []
    at = 0
    for literal, string in zip(_LITERAL.finditer(text), _strings(value, sort_keys), strict=True):
        pieces += [text[at : literal.start()], derive_text(literal.group(), (string,))]
        at = literal.end()
    return join([*pieces, text[at:]])


def _strings(value: object, sort_keys: bool) -> Iterator[object]:
    """The strings of a JSON value in the order in which json.dumps writes them; a key that is not a string, as it is."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in sorted(value.items()) if sort_keys else value.items():
            yield name
            yield from _strings(item, sort_keys)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, sort_keys)
