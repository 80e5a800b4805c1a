"""Files of rows that only grow: whole lines, one writer, and an index by id of what is there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tanuki_jax import files

logger = logging.getLogger(__name__)

BLOCK = 1 << 16


class LineLog:
    """Appends JSON rows to a file as whole lines; a torn last line, of a process that was killed, is cut off at first.

    A row is in the kernel when `append` returns, so that the death of the process loses nothing; `sync` is for power failures.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = _cut_torn_line(self._file, path)
        self._synced = self._size

    def append(self, row: Mapping[str, Any]) -> int:
        """Writes a row; returns its offset.  Where the disk is full, OSError, and no part of the row stays."""
        line = files.json_line(row)
        offset, view = self._size, memoryview(line)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError:
            os.ftruncate(self._file, offset)
            raise
        self._size += len(line)
        return offset

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """All rows with their offsets."""
        return read_rows(self.path)

    def sync(self) -> None:
        """Waits until all rows are on the disk; may be called by another thread."""
        size = self._size
        if size > self._synced:
            os.fsync(self._file)
            self._synced = size

    def close(self) -> None:
        """Syncs and closes."""
        try:
            self.sync()
        finally:
            os.close(self._file)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """All rows of a log with their offsets; damaged lines, of a power failure or a kill, are left out."""
    offset = damaged = 0
    with path.open("rb") as f:
        for line in f:
            try:
                row = json.loads(line)
                if isinstance(row, dict):
                    yield offset, row
                else:
                    damaged += 1
            except ValueError:
                damaged += 1
            offset += len(line)
    if damaged:
        logger.warning("%s: %d damaged lines are left out", path, damaged)


class AnswerLog:
    """The answers of a run; in memory there are only their ids and where they lie."""

    def __init__(self, path: Path) -> None:
        self.log = LineLog(path)
        self._offsets: dict[int, int] = {}
        self._reader = path.open("rb")

    def load(self) -> Iterator[dict[str, Any]]:
        """Reads the index; yields every row once."""
        for offset, row in self.log.rows():
            number = int(str(row.get("id", "")) or "0", 16)
            if number and number not in self._offsets:
                self._offsets[number] = offset
                yield row

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, job_id: str) -> bool:
        return int(job_id, 16) in self._offsets

    def get(self, job_id: str) -> dict[str, Any] | None:
        """The row of a job; None where there is none."""
        offset = self._offsets.get(int(job_id, 16))
        if offset is None:
            return None
        self._reader.seek(offset)
        row: dict[str, Any] = json.loads(self._reader.readline())
        return row

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes the row of a job that has none."""
        number = int(row["id"], 16)
        assert number not in self._offsets, row["id"]
        self._offsets[number] = self.log.append(row)

    def close(self) -> None:
        """Syncs and closes."""
        self._reader.close()
        self.log.close()


def _cut_torn_line(file: int, path: Path) -> int:
    """Cuts off what follows the last end of a line; returns the size that remains."""
    size = end = os.fstat(file).st_size
    while end:
        start = max(0, end - BLOCK)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        logger.warning("%s: a torn last line of %d bytes is cut off", path, size - end)
        os.ftruncate(file, end)
    return end
