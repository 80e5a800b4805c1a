"""Reads rows of text, dialogues, pairs or tokens from files of any format of `formats`, whole or in parts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tanuki_jax import files
from tanuki_jax.data import datasets, encodings, formats, paths
from tanuki_jax.data.conversation import Columns, read_fields
from tanuki_jax.errors import UserError


class Fields(NamedTuple):
    """Which fields of a record are read: names, with dots for nested ones (meta.lang)."""

    text: str = "text"
    language: str = ""  # a field that holds the language tag; empty = none
    row_format: str = "auto"  # a name of conversation.FORMATS, for rows that fit several


PLAIN = Fields()
PARSED_FIELDS = Columns()
KINDS = {"text": "text", "messages": "dialogue", "chosen": "pair", "tokens": "tokens"}  # field of a row -> kind


class Row(NamedTuple):
    """A row, its place (for messages), how many bytes of the files were read up to it, and its language tag."""

    where: str
    fields: dict[str, Any]
    bytes_read: int = 0
    language: str = ""


class Part(NamedTuple):
    """What a worker reads at a time: some small files whole, or a range (in units of `formats.size_of`) of a large one."""

    paths: tuple[str, ...]
    start: int
    stop: int
    size: int  # approximate bytes


WHOLE = 1 << 62
OnBadRow: TypeAlias = Callable[[str, str], None]  # called with the place of an invalid row, and the reason


def skip_silently(where: str, reason: str) -> None:
    """An OnBadRow that leaves out invalid rows without a message."""


MAX_COMMAS = 7  # maximum of commas in the name of a path


def split_patterns(patterns: str) -> list[str]:
    """Splits globs at commas, except at those of a path that exists, and those without which a glob would match nothing."""
    pieces, result = patterns.split(","), []
    while pieces:
        joined = [",".join(pieces[:n]) for n in range(min(len(pieces), MAX_COMMAS + 1), 0, -1)]  # the longest first
        local = [name for name in joined if name and not paths.is_url(name)]
        existing = [name for name in local if os.path.lexists(name)]
        if existing:
            pattern = existing[0]
        elif paths.is_url(pieces[0]) or paths.glob_files(pieces[0]):
            pattern = pieces[0]
        else:
            pattern = next((name for name in local if "," in name and paths.glob_files(name)), pieces[0])
        pieces = pieces[pattern.count(",") + 1 :]
        result += [pattern] if pattern else []
    return result


def matching_files(patterns: str) -> list[str]:
    """The files of comma-separated globs, sorted, and those of dataset folders.  A pattern without a match is an error.

    A file is listed once, however many patterns and links name it; a warning names one that was named again.
    """
    first_names: dict[Hashable, str] = {}
    again: list[tuple[str, str]] = []
    for pattern in split_patterns(patterns):
        matches = paths.glob_files(pattern)
        if not matches:
            raise UserError(f"data: no such file: {pattern!r}{_unreadable(pattern)}")
        for path in (expanded for match in matches for expanded in _expand(match)):
            key = paths.identity_key(path)
            if key in first_names:
                again.append((path, first_names[key]))
            else:
                first_names[key] = path
    if again:
        path, first = again[0]
        reason = f"{path} is named twice" if path == first else f"{path} is the same file as {first}"
        more = f" ({len(again)} such names are left out)" if len(again) > 1 else ""
        paths.warn(f"data: {reason}, and is read once{more}")
    if not first_names:
        raise UserError(f"data: no input files given; name {', '.join(formats.SUFFIXES)} files")
    return list(first_names.values())


def _expand(match: str) -> list[str]:
    """The files of what a glob matched, each of a known format and readable."""
    paths.check(match)
    expanded = datasets.expand(match)
    for path in expanded:
        paths.check(path)
        if formats.format_of(path) != "/tfds" and paths.is_directory(path):
            raise UserError(
                f"data: {path} is a directory, and no dataset that Hugging Face datasets or TFDS wrote; "
                f"name the files in it, {path}/*.jsonl for example"
            )
        if not formats.format_of(path):
            raise UserError(f"data: {path} is none of {', '.join(formats.SUFFIXES)}; convert it or narrow the pattern")
    return expanded


def _unreadable(pattern: str) -> str:
    """A message about a folder of a glob that may not be read, which is why it may match nothing."""
    for folder in reversed(Path(pattern).parents):
        if not paths.is_url(pattern) and folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
            return f"; {folder} cannot be looked into, check its permissions"
    return ""


def identity(patterns: str) -> str:
    """A fingerprint of the files' names, sizes and times of change; cheap for any amount of data."""
    return files.fingerprint([paths.identity_of(path) for path in matching_files(patterns)])


def parts(patterns: str, part_bytes: int) -> list[Part]:
    """All files in parts of about `part_bytes`, in order; the list is the same on every machine."""
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


def read_rows(patterns: str, fields: Fields = PLAIN, on_bad_row: OnBadRow | None = None) -> Iterator[Row]:
    """All rows of all files, in order.  A text file is a row {"text"}."""
    before = 0
    for path in matching_files(patterns):
        size = paths.bytes_of(path)
        for row in read_part(Part((path,), 0, WHOLE, size), fields, on_bad_row):
            if row is not None:
                yield row._replace(bytes_read=before + row.bytes_read)
        before += size


def read_records(
    patterns: str, names: Container[str], on_bad_row: OnBadRow | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of all files with its place, as it stands: it need be neither text nor a conversation.

    names: the fields that are wanted; others of columnar files are not read.  With on_bad_row, an invalid record is reported
    there and left out.
    """
    for path in matching_files(patterns):
        try:
            for record in _records(path, Part((path,), 0, WHOLE, 0), names):
                try:
                    fields = _record_fields(record)
                    encodings.check(fields, names, record.where)
                except UserError as error:
                    if on_bad_row is None:
                        raise
                    on_bad_row(record.where, _reason(error, record.where))
                else:
                    yield record.where, fields
        except UserError as error:
            if on_bad_row is None:
                raise
            on_bad_row(path, _reason(error, path))


def read_part(part: Part, fields: Fields = PLAIN, on_bad_row: OnBadRow | None = None, skip: int = 0) -> Iterator[Row | None]:
    """The rows of a part after the first `skip`; with on_bad_row, an invalid row is reported there and None yielded."""
    before = number = 0
    names = Columns(fields.text.split(".")[0], fields.language.split(".")[0])
    for path in part.paths:
        try:
            for record in _records(path, part, names):
                number += 1
                if number <= skip:
                    continue
                try:
                    row = _row(record, fields, before)
                    encodings.check(row.fields, names, record.where)
                except UserError as error:
                    if on_bad_row is None:
                        raise
                    on_bad_row(record.where, _reason(error, record.where))
                    yield None
                else:
                    yield row
        except UserError as error:  # the file is damaged; the rows before are valid
            if on_bad_row is None:
                raise
            number += 1
            if number > skip:
                on_bad_row(path, _reason(error, path))
                yield None
        before += paths.bytes_of(path) if len(part.paths) > 1 else 0


def _records(path: str, part: Part, names: Container[str]) -> Iterator[formats.Record]:
    try:
        yield from formats.READERS[formats.format_of(path)](path, part.start, part.stop, names)
    except OSError as error:  # the file is gone, or its disk
        raise UserError(f"data: {path} cannot be read: {error.strerror or error}") from error


def _reason(error: UserError, where: str) -> str:
    return str(error).removeprefix("data: ").removeprefix(where).lstrip(" :")


def _record_fields(record: formats.Record) -> dict[str, Any]:
    value, where = record.value, record.where
    if isinstance(value, UserError):
        raise value
    return _parse(value, where) if isinstance(value, bytes) else _plain_fields(value, where)


def _row(record: formats.Record, fields: Fields, before: int) -> Row:
    where, row = record.where, _record_fields(record)
    language = _field(row, fields.language) if fields.language else ""
    if fields.text != "text":
        text = _field(row, fields.text)
        if not isinstance(text, str):
            raise UserError(f"data: {where} has no text in {fields.text!r} (fields: {', '.join(row)})")
        row = {"text": text}
    try:
        row = {
            **{name: item for name, item in row.items() if name not in PARSED_FIELDS},
            **read_fields(row, fields.row_format),
        }
    except UserError as error:
        raise UserError(f"data: {where}: {error}") from error
    return Row(where, row, before + record.bytes_read, language if isinstance(language, str) else "")


def _field(value: object, name: str) -> object:
    """A field of a record; None where there is none."""
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _plain_fields(fields: Mapping[str, object], where: str) -> dict[str, object]:
    """The fields of a record of a columnar file, as JSON would give them; nulls, which stand for missing ones, left out."""
    return {name: item if name == "tokens" else _plain(item, where) for name, item in fields.items() if item is not None}


def _plain(value: object, where: str) -> object:
    """A value of a columnar file as JSON would give it: bytes as text, arrays as lists, nulls left out."""
    if isinstance(value, bytes):
        return _decode(value, where)
    if isinstance(value, dict):
        return _plain_fields(value, where)
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), where)
    if isinstance(value, list) and value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        return _plain_fields(dict(value), where)  # an Arrow map
    return [_plain(item, where) for item in value] if isinstance(value, list | tuple) else value


def kind_of(row: Row) -> str:
    """text, dialogue, pair or tokens, from the row's fields."""
    return next(kind for name, kind in KINDS.items() if name in row.fields)


def _decode(data: bytes, where: str) -> str:
    return encodings.decode(data, where)


def _parse(line: bytes, where: str) -> dict[str, object]:
    text = _decode(line, where)
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
    except UserError as error:
        raise UserError(f"data: {where} {error}") from error
    except json.JSONDecodeError as error:
        reason = encodings.problem(text)
        if reason:
            raise UserError(f"data: {where} {reason}") from error
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


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object without its nulls, which columnar files cannot tell from missing fields.

    A key may not occur twice: JSON readers differ in which value they use.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        names: set[str] = set()
        for name, _ in pairs:
            if name in names:
                raise UserError(f"has the key {name!r} twice in one object; keep one of them")
            names.add(name)
    return {name: item for name, item in value.items() if item is not None}
