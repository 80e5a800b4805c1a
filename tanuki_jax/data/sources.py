"""Rows of text, dialogues, pairs or tokens from files of any format of `formats`, whole or part by part."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tanuki_jax import files
from tanuki_jax.data import datasets, encodings, formats, paths
from tanuki_jax.data.conversation import Columns, read_fields
from tanuki_jax.errors import UserError


class Fields(NamedTuple):
    """Which fields of a record are read: names, with dots where they are nested (meta.lang)."""

    text: str = "text"
    language: str = ""  # a field that holds the language tag; empty = none
    row_format: str = "auto"  # a name of conversation.FORMATS where rows can be read in several ways


PLAIN = Fields()
PARSED_FIELDS = Columns()
KINDS = {"text": "text", "messages": "dialogue", "chosen": "pair", "tokens": "tokens"}  # field of a row that was read -> kind


class Row(NamedTuple):
    """A row, where it stands (for messages), how many bytes of the files were read up to it, and its language tag."""

    where: str
    fields: dict[str, Any]
    bytes_read: int = 0
    language: str = ""


class Part(NamedTuple):
    """What one worker reads: some small files whole, or a range (in units of `formats.size_of`) of a large one."""

    paths: tuple[str, ...]
    start: int
    stop: int
    size: int  # bytes, about


WHOLE = 1 << 62
OnBadRow = Callable[[str, str], None]  # told of a bad row: where it stands, and the reason


def skip_silently(where: str, reason: str) -> None:
    """A `Bad` that leaves bad rows out without a word."""


COMMAS = 7  # most commas that the name of a path may have


def split_patterns(patterns: str) -> list[str]:
    """Comma-separated globs apart; a comma of a path that is there, or that alone makes a glob match, separates nothing."""
    pieces, found = patterns.split(","), []
    while pieces:
        joined = [",".join(pieces[:n]) for n in range(min(len(pieces), COMMAS + 1), 0, -1)]  # the longest first
        there = [name for name in joined if name and not paths.is_url(name) and os.path.lexists(name)]
        if there or paths.is_url(pieces[0]) or paths.glob_files(pieces[0]):
            taken = there[0] if there else pieces[0]
        else:
            taken = next(
                (name for name in joined[:-1] if name and not paths.is_url(name) and paths.glob_files(name)), pieces[0]
            )
        pieces = pieces[taken.count(",") + 1 :]
        found += [taken] if taken else []
    return found


def matching_files(patterns: str) -> list[str]:
    """The files of comma-separated globs, sorted; dataset folders count.  A pattern that matches nothing is an error.

    A file is there once, however many patterns and links name it; what was left out is told.
    """
    found: dict[Any, str] = {}
    again: list[tuple[str, str]] = []
    for pattern in split_patterns(patterns):
        matches = paths.glob_files(pattern)
        if not matches:
            raise UserError(f"data: no such file: {pattern!r}{_unreadable(pattern)}")
        for path in (expanded for match in matches for expanded in _expand(match)):
            key = paths.identity_key(path)
            if key in found:
                again.append((path, found[key]))
            else:
                found[key] = path
    if again:
        path, first = again[0]
        told = f"{path} is named twice" if path == first else f"{path} is the same file as {first}"
        more = f" ({len(again)} such names are left out)" if len(again) > 1 else ""
        paths.warn(f"data: {told}, and is read once{more}")
    if not found:
        raise UserError(f"data: no input files given; name {', '.join(formats.SUFFIXES)} files")
    return list(found.values())


def _expand(match: str) -> list[str]:
    """The files of what a glob matched, each of a known format and readable."""
    paths.check(match)
    found = datasets.expand(match)
    for path in found:
        paths.check(path)
        folder = formats.format_of(path) != "/tfds" and paths.is_directory(path)
        if folder:
            raise UserError(
                f"data: {path} is a directory, and no dataset that Hugging Face datasets or TFDS wrote; "
                f"name the files in it, {path}/*.jsonl for example"
            )
        if not formats.format_of(path):
            raise UserError(f"data: {path} is none of {', '.join(formats.SUFFIXES)}; convert it or narrow the pattern")
    return found


def _unreadable(pattern: str) -> str:
    """Why a glob may match nothing: a folder on its way that may not be looked into."""
    for folder in reversed(Path(pattern).parents):
        if not paths.is_url(pattern) and folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
            return f"; {folder} cannot be looked into, check its permissions"
    return ""


def total_bytes(patterns: str) -> int:
    """Size of all files together."""
    return sum(map(paths.bytes_of, matching_files(patterns)))


def identity(patterns: str) -> str:
    """A fingerprint of the files' names, sizes and times of change; cheap for any amount of data."""
    return files.fingerprint([paths.identity_of(path) for path in matching_files(patterns)])


def parts(patterns: str, part_bytes: int) -> list[Part]:
    """All files in parts of about `part_bytes`, in order: the same list wherever it is made."""
    result: list[Part] = []
    small: list[tuple[str, int]] = []

    def flush() -> None:
        if small:
            result.append(Part(tuple(path for path, _ in small), 0, WHOLE, sum(size for _, size in small)))
            small.clear()

    for path in matching_files(patterns):
        size = paths.bytes_of(path)
        units = _units(path) if size > part_bytes else 1
        if units > 1:
            flush()
            cuts = min(units, -(-size // part_bytes))
            edges = [units * i // cuts for i in range(cuts + 1)]
            result += [Part((path,), a, b, size // cuts) for a, b in zip(edges, edges[1:], strict=False)]
            continue
        if small and sum(s for _, s in small) + size > part_bytes:
            flush()
        small.append((path, size))
    flush()
    return result


def _units(path: str) -> int:
    try:
        return formats.size_of(path)
    except UserError:  # a damaged file: its reader says so
        return 1


def read_rows(patterns: str, fields: Fields = PLAIN, bad: OnBadRow | None = None) -> Iterator[Row]:
    """All rows of all files, in order.  Text files give {"text"}."""
    before = 0
    for path in matching_files(patterns):
        size = paths.bytes_of(path)
        for row in read_part(Part((path,), 0, WHOLE, size), fields, bad):
            if row is not None:
                yield row._replace(bytes_read=before + row.bytes_read)
        before += size


def read_part(part: Part, fields: Fields = PLAIN, bad: OnBadRow | None = None, skip: int = 0) -> Iterator[Row | None]:
    """The rows of a part after the first `skip`; with `bad`, a bad one is reported there and None takes its place."""
    before = number = 0
    wanted = Columns(fields.text.split(".")[0], fields.language.split(".")[0])
    for path in part.paths:
        try:
            for record in _records(path, part, wanted):
                number += 1
                if number <= skip:
                    continue
                try:
                    row = _row(record, fields, before)
                    encodings.check(row.fields, wanted, record.where)
                except UserError as error:
                    if bad is None:
                        raise
                    bad(record.where, _reason(error, record.where))
                    yield None
                else:
                    yield row
        except UserError as error:  # the file itself is damaged: what came before it is good
            if bad is None:
                raise
            number += 1
            if number > skip:
                bad(path, _reason(error, path))
                yield None
        before += paths.bytes_of(path) if len(part.paths) > 1 else 0


def _records(path: str, part: Part, wanted: Container[str]) -> Iterator[formats.Record]:
    try:
        yield from formats.READERS[formats.format_of(path)](path, part.start, part.stop, wanted)
    except OSError as error:  # gone, or its disk is
        raise UserError(f"data: {path} cannot be read: {error.strerror or error}") from error


def _reason(error: UserError, where: str) -> str:
    return str(error).removeprefix("data: ").removeprefix(where).lstrip(" :")


def _row(record: formats.Record, fields: Fields, before: int) -> Row:
    value, where = record.value, record.where
    if isinstance(value, UserError):
        raise value
    # A column has a value in every row; where a row had none, it is a null.
    value = _parse(value, where) if isinstance(value, bytes) else _plain(value, where)
    language = _field(value, fields.language) if fields.language else ""
    if fields.text != "text":
        if not isinstance(found := _field(value, fields.text), str):
            raise UserError(f"data: {where} has no text in {fields.text!r} (fields: {', '.join(value)})")
        value = {"text": found}
    try:
        value = {
            **{name: item for name, item in value.items() if name not in PARSED_FIELDS},
            **read_fields(value, fields.row_format),
        }
    except UserError as error:
        raise UserError(f"data: {where}: {error}") from error
    return Row(where, value, before + record.bytes_read, language if isinstance(language, str) else "")


def _field(value: Any, name: str) -> Any:
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _plain(value: Any, where: str) -> Any:
    """A value of a columnar file as JSON would give it: bytes as text, arrays as lists, nulls left out."""
    if isinstance(value, bytes):
        return _decode(value, where)
    if isinstance(value, dict):
        return {name: item if name == "tokens" else _plain(item, where) for name, item in value.items() if item is not None}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), where)
    if isinstance(value, list) and value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        return _plain(dict(value), where)  # a map of Arrow's
    return [_plain(item, where) for item in value] if isinstance(value, list | tuple) else value


def kind_of(row: Row) -> str:
    """text, dialogue, pair or tokens, from the row's fields."""
    return next(kind for name, kind in KINDS.items() if name in row.fields)


def _decode(data: bytes, where: str) -> str:
    return encodings.decode(data, where)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    text = _decode(line, where)
    try:
        fields = json.loads(text, object_pairs_hook=_once)
    except UserError as error:
        raise UserError(f"data: {where} {error}") from error
    except json.JSONDecodeError as error:
        if found := encodings.problem(text):
            raise UserError(f"data: {where} {found}") from error
        raise UserError(f"data: {where} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"data: {where} is not JSON that can be read: {error}") from error
    if "\\ud" in text.lower():
        try:
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"data: {where} has half a surrogate pair (\\ud800 to \\udfff), which is no Unicode text"
            ) from error
    if not isinstance(fields, dict):
        raise UserError(f'data: {where} must be a JSON object such as {{"text": "..."}}, not {type(fields).__name__}')
    return fields


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without its nulls, which columns cannot tell from fields that are not there.

    None of its keys may stand there twice: JSON readers would take either.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UserError(f"has the key {twice!r} twice in one object; keep one of them")
    return {name: item for name, item in value.items() if item is not None}
