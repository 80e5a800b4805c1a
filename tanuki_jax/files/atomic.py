"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import glob
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tanuki_jax.errors import UserError
from tanuki_jax.files import lock


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved to it on success and removed on failure; for a file or a directory.

    It is not moved where a lock of this process is another's by now.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.filename}: {error.strerror}") from error
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        lock.check()
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def remove_unfinished(path: Path) -> None:
    """Removes what killed processes left of `path` under the names of `atomic_path`; to be called by the holder of its lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a whole UTF-8 file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically; Japanese stays readable."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file; a damaged one is an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or remove it to start anew") from error


def json_line(value: object) -> bytes:
    """A value as a line of a JSON Lines file; Japanese stays readable."""
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def write_jsonl(path: Path, rows: Iterable[object]) -> int:
    """Writes one JSON object per line atomically; returns the number of rows."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("wb") as f:
        for row in rows:
            f.write(json_line(row))
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[Any]:
    """The values of a file of one JSON value per line, one by one; a damaged line is an error that names it."""
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number} is damaged ({error}); remove the file to make it anew") from error
