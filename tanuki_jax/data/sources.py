"""Rows of text from files: .txt (one document a file), .jsonl and .jsonl.gz."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tanuki_jax import files
from tanuki_jax.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


class Row(NamedTuple):
    """A row, where it stands (for messages), and how many bytes of the files were read up to it."""

    where: str
    fields: dict[str, Any]
    bytes_read: int = 0


def matching_files(patterns: str) -> list[Path]:
    """The files of comma-separated globs, sorted; a pattern that matches nothing is an error."""
    found: list[Path] = []
    for pattern in filter(None, patterns.split(",")):
        matches = sorted(Path(p) for p in glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"data: no such file: {pattern!r}")
        for path in matches:
            if not path.is_file():
                raise UserError(f"data: {path} is a directory, not a file; name the files in it, {path}/*.jsonl for example")
            if not path.name.endswith(SUFFIXES):
                raise UserError(f"data: {path} is none of {', '.join(SUFFIXES)}; convert it or narrow the pattern")
        found += matches
    if not found:
        raise UserError("data: no input files given; name .txt, .jsonl or .jsonl.gz files")
    return found


def total_bytes(patterns: str) -> int:
    """Size of all files together."""
    return sum(path.stat().st_size for path in matching_files(patterns))


def identity(patterns: str) -> str:
    """A fingerprint of the files' names, sizes and times of change; cheap for any amount of data."""
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in matching_files(patterns)]
    return files.fingerprint(stats)


def read_rows(patterns: str) -> Iterator[Row]:
    """All rows of all files, in order.  Text files give {"text"}."""
    before = 0
    for path in matching_files(patterns):
        size = path.stat().st_size
        if path.name.endswith(".txt"):
            yield Row(str(path), {"text": _decode(path.read_bytes(), str(path))}, before + size)
            before += size
            continue
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw as f:
            try:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        where = f"{path}:{number}"
                        yield Row(where, _parse(line, where), before + raw.tell())
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"data: {path} is not a whole gzip file ({error}); fetch it again") from error
        before += size


def kind_of(row: Row) -> str:
    """text, dialogue or pair, from the row's fields; any other row is an error."""
    fields = row.fields
    if isinstance(fields.get("text"), str):
        return "text"
    if isinstance(fields.get("messages"), list):
        return "dialogue"
    if all(name in fields for name in ("prompt", "chosen", "rejected")):
        return "pair"
    raise UserError(
        f"data: {row.where} has neither text, nor messages, nor prompt, chosen and rejected (fields: {', '.join(fields)})"
    )


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data: {where} is not valid UTF-8 at byte {error.start}; convert it, for example with iconv"
        ) from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    text = _decode(line, where)
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
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
