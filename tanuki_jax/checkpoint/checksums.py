"""Sizes and check sums of a checkpoint's files: written once it is complete, compared whenever it is read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from tanuki_jax import files

THREADS = 8

Checksum: TypeAlias = list[int]  # size in bytes and CRC-32; a list, as JSON has it


def write(path: Path, array: np.ndarray) -> Checksum:
    """Writes the numbers of an array as a file, through to the disk; returns its check sum."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    crc = 0
    with files.direct_writer(path, len(data)) as append:
        for at in range(0, len(data), files.PIECE):
            piece = data[at : at + files.PIECE]
            crc = zlib.crc32(piece, crc)
            append(piece)
    return [len(data), crc]


def write_checksums(step: Path, process: int, processes: int, computed: Mapping[str, Checksum] = MappingProxyType({})) -> None:
    """Writes the check sums of this process's share of the files of a step: every `processes`-th.

    computed: what `write` returned, by the files' paths in the step; these files are not read again.
    """
    paths = {str(path.relative_to(step)): path for path in _contents(step)[process::processes]}
    with ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(lambda name: computed.get(name) or _checksum(paths[name]), paths)
        readable = {name: checksum for name, checksum in zip(paths, sums, strict=True) if checksum}
    temporary = step / f".sums-{process}"
    temporary.write_text(json.dumps(readable), encoding="utf-8")  # fails where retention has removed the directory
    temporary.replace(step / f"sums-{process}-of-{processes}.json")


def has_checksums(step: Path) -> bool:
    """Whether every process has written its check sums; a kill just after a save can prevent it."""
    return any(len(list(step.glob(f"sums-*-of-{count}.json"))) == int(count) for count in _counts(step))


def _counts(step: Path) -> set[str]:
    """The numbers of processes that check sums were written by."""
    return {path.stem.rpartition("-")[2] for path in step.glob("sums-*-of-*.json")}


class ChecksumVerifier:
    """Compares files of a step with their check sums as they are read, so that none is read twice for that."""

    def __init__(self, step: Path) -> None:
        self.verified: set[str] = set()  # paths in the step
        try:
            self._checksums = read(step)
        except ValueError:  # `find_corruption`, which compares the other files, reports it
            self._checksums = {}

    def differs(self, name: str, array: np.ndarray) -> bool:
        """Whether the whole contents of a file are not what was written; a file without a check sum is trusted."""
        if name in self._checksums and name not in self.verified:
            data = array.reshape(-1).view(np.uint8).data
            if [len(data), zlib.crc32(data)] != self._checksums[name]:
                return True
            self.verified.add(name)
        return False


def read(step: Path) -> dict[str, Checksum]:
    """The check sums of a step's files; ValueError, with the file's name, where they cannot be read."""
    checksums: dict[str, Checksum] = {}
    for path in step.glob("sums-*.json"):
        try:
            checksums |= json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path.name} cannot be read") from error
    return checksums


def find_corruption(step: Path, process: int = 0, processes: int = 1, item: str = "", verified: Collection[str] = ()) -> str:
    """What is wrong with this process's share of a step's files (of one item); empty if nothing is, or there are no sums.

    verified: files that were compared already.
    """
    try:
        expected = read(step)
    except ValueError as error:
        return str(error)
    names = sorted(name for name in expected if not item or name.startswith(f"{item}/"))[process::processes]
    names = [name for name in names if name not in verified]
    with ThreadPoolExecutor(THREADS) as pool:
        for name, checksum in zip(names, pool.map(lambda n: _checksum(step / n), names), strict=True):
            if checksum is None:
                return f"{name} is missing"
            if checksum[0] != expected[name][0]:
                return f"{name} has {checksum[0]:,} bytes, and had {expected[name][0]:,}"
            if checksum != expected[name]:
                return f"{name} has other contents than were written"
    return ""


def _contents(step: Path) -> list[Path]:
    """The files of a step that have check sums."""
    return sorted(path for path in step.rglob("*") if path.is_file() and not path.name.startswith(("sums-", ".sums-")))


def _checksum(path: Path) -> Checksum | None:
    """The check sum of a file, or None where it cannot be read."""
    size = crc = 0
    piece = memoryview(bytearray(files.PIECE))
    try:
        with path.open("rb", buffering=0) as f:
            while count := f.readinto(piece):
                size, crc = size + count, zlib.crc32(piece[:count], crc)
    except OSError:
        return None
    return [size, crc]
