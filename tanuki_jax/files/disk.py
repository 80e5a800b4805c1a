"""Paths, full disks, space that is reserved, content that is flushed, and fingerprints of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tanuki_jax.errors import UserError
from tanuki_jax.files.lock import DISK_FULL


def absolute(path: str | Path) -> Path:
    """The path from the root, without `..`, which TensorStore does not take."""
    path = Path(path)
    return path.resolve() if ".." in path.parts else path.absolute()


@contextlib.contextmanager
def disk_errors(
    directory: Path, label: str = "checkpoint", kinds: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError)
) -> Iterator[None]:
    """Turns the many ways in which a full or read-only disk shows itself into one message.

    label: with which it begins; kinds: of the exceptions that are looked at.
    """
    try:
        yield
    except kinds as error:
        text = str(error)
        full = getattr(error, "errno", None) in DISK_FULL
        if full or any(
            sign in text for sign in ("No space left", "ENOSPC", "Disk quota", "RESOURCE_EXHAUSTED", "File too large")
        ):
            raise UserError(
                f"{label}: the disk of {directory} is full{_file_size_hint(error)}; "
                "free some space and run the same command again"
            ) from error
        if isinstance(error, PermissionError) or "Permission denied" in text or "Read-only file system" in text:
            raise UserError(f"{label}: {directory} cannot be written to; check its permissions") from error
        raise


def _file_size_hint(error: Exception) -> str:
    """A file may also be larger than the user or the file system allows."""
    too_large = getattr(error, "errno", None) == errno.EFBIG or "File too large" in str(error)
    return ", or a file larger than `ulimit -f` or its file system allows" if too_large else ""


def reserve(file: IO[bytes], size: int) -> None:
    """Reserves the space for a file at once, where the file system can: a full disk shows before hours of work, not after.

    Not by `os.posix_fallocate`, which elsewhere writes a byte to every block.
    """
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)  # glibc's
    if allocate and allocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        if number in DISK_FULL:
            raise OSError(number, os.strerror(number), file.name)


def sync(directory: Path) -> None:
    """Waits until every file of a directory is on the disk."""
    for path in (path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as f:
            os.fsync(f.fileno())


def fingerprint(*values: object) -> str:
    """Twelve hexadecimal digits of a SHA-256 over JSON values and the contents of `Path`s."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Path):
            with value.open("rb") as f:
                while block := f.read(1 << 20):
                    digest.update(block)
        else:
            digest.update(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:12]
