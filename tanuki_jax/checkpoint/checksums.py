"""Sizes and check sums of a checkpoint's files, written once it is whole and compared whenever it is read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import numpy as np

from tanuki_jax import files

THREADS = 8


def write(path: Path, array: np.ndarray) -> list[int]:
    """Writes the numbers of an array as a file, onto the disk; returns its size and CRC-32."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    crc = 0
    with files.direct_writer(path, len(data)) as append:
        for at in range(0, len(data), files.PIECE):
            piece = data[at : at + files.PIECE]
            crc = zlib.crc32(piece, crc)
            append(piece)
    return [len(data), crc]


def write_checksums(step: Path, process: int, processes: int, known: Mapping[str, list[int]] = MappingProxyType({})) -> None:
    """Writes the sums of this process's share of the files of a step: every so many-th.

    known: what `write` said of files, by their paths in the step; they are not read again.
    """
    mine = {str(path.relative_to(step)): path for path in _contents(step)[process::processes]}
    with ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(lambda name: known.get(name) or _sum(mine[name]), mine)
        found = {name: entry for name, entry in zip(mine, sums, strict=True) if entry}
    temporary = step / f".sums-{process}"
    temporary.write_text(json.dumps(found), encoding="utf-8")  # retention may have removed the directory, which then fails
    temporary.replace(step / f"sums-{process}-of-{processes}.json")


def has_checksums(step: Path) -> bool:
    """Whether every process came to write its sums; a kill just after a save can prevent it."""
    return any(len(list(step.glob(f"sums-*-of-{count}.json"))) == int(count) for count in _counts(step))


def _counts(step: Path) -> set[str]:
    return {path.stem.rpartition("-")[2] for path in step.glob("sums-*-of-*.json")}


class ChecksumVerifier:
    """Compares with their sums what is read of a step's files anyway, so that none is read once more for that."""

    def __init__(self, step: Path) -> None:
        self.right: set[str] = set()  # paths in the step
        try:
            self._told = read(step)
        except ValueError:  # whoever compares the rest will say so
            self._told = {}

    def differs(self, name: str, array: np.ndarray) -> bool:
        """Whether the contents of a file, all of it, are not what was written; one without a sum is trusted."""
        if name in self._told and name not in self.right:
            data = array.reshape(-1).view(np.uint8).data
            if [len(data), zlib.crc32(data)] != self._told[name]:
                return True
            self.right.add(name)
        return False


def read(step: Path) -> dict[str, list[int]]:
    """Sizes and sums of a step's files, as they were written; ValueError, with the file's name, where they cannot be read."""
    found: dict[str, list[int]] = {}
    for path in step.glob("sums-*.json"):
        try:
            found |= json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path.name} cannot be read") from error
    return found


def find_corruption(step: Path, process: int = 0, processes: int = 1, item: str = "", right: Collection[str] = ()) -> str:
    """What is wrong with this process's share of a step's files (of one item), or nothing; a step without sums is trusted.

    right: those that need no look.
    """
    try:
        written = read(step)
    except ValueError as error:
        return str(error)
    names = sorted(name for name in written if not item or name.startswith(f"{item}/"))[process::processes]
    names = [name for name in names if name not in right]
    with ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(names, pool.map(lambda n: _sum(step / n), names), strict=True):
            if found is None:
                return f"{name} is missing"
            if found[0] != written[name][0]:
                return f"{name} has {found[0]:,} bytes, and had {written[name][0]:,}"
            if found != written[name]:
                return f"{name} has other contents than were written"
    return ""


def _contents(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file() and not path.name.startswith(("sums-", ".sums-")))


def _sum(path: Path) -> list[int] | None:
    """Size and CRC-32 of a file, or None where it cannot be read."""
    size = crc = 0
    piece = memoryview(bytearray(files.PIECE))
    try:
        with path.open("rb", buffering=0) as f:
            while count := f.readinto(piece):
                size, crc = size + count, zlib.crc32(piece[:count], crc)
    except OSError:
        return None
    return [size, crc]
