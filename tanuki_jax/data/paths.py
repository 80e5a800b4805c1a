"""Paths to data: local ones, or URLs of any file system that fsspec knows."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import json
import os
import stat
import sys
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tanuki_jax.errors import UserError

if TYPE_CHECKING:  # imported where it is needed
    import fsspec


def is_url(path: str) -> bool:
    """Whether a path names a file system, as gs://bucket/file does."""
    return "://" in path


HINTS = {
    "gs": "pip install 'tanuki-jax[gcs]'",
    "gcs": "pip install 'tanuki-jax[gcs]'",
    "s3": "pip install s3fs",
    "hf": "fetch it first: hf download NAME --repo-type dataset --local-dir DIR, and name DIR",
    "http": "fetch it first, with curl -LO for example",
    "https": "fetch it first, with curl -LO for example",
}


@contextlib.contextmanager
def _remote_errors(path: str) -> Iterator[None]:
    """Turns the exceptions of all file systems (no package, network, permission or bucket) into one message."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library raises its own
        scheme = path.split("://")[0].lower()
        hint = HINTS.get(scheme, "copy it here, or install fsspec's package for it")
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"data: {path} cannot be opened: {reason} ({hint})") from error


def _remote(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if path.lower().startswith("hf://"):
        raise UserError(f"data: {path} cannot be opened: data of the Hub is read from a copy of it ({HINTS['hf']})")
    import fsspec

    with _remote_errors(path):
        system, inner = fsspec.core.url_to_fs(path)
    return system, inner


def glob_files(pattern: str) -> list[str]:
    """The paths that a glob matches, sorted; a path that exists matches itself alone, whatever its name looks like."""
    if is_url(pattern):
        system, path = _remote(pattern)
        with _remote_errors(pattern):
            return sorted(system.unstrip_protocol(match) for match in system.glob(path))
    return [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))


def check(path: str) -> None:
    """Refuses a path that is neither a file nor a folder that may be read."""
    if is_url(path):
        return
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        link = f"a link to {Path(path).readlink()}, and there " if Path(path).is_symlink() else ""
        raise UserError(f"data: {path} cannot be read: {link}{error.strerror}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"data: {path} is a pipe or a device; write what it gives to a file, since data is read more than once")
    if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
        raise UserError(f"data: {path} cannot be read: {os.strerror(errno.EACCES)}; check its permissions")


def identity_key(path: str) -> Hashable:
    """A key that all names of a file share, those of symbolic and hard links too."""
    if is_url(path):
        return path
    status = Path(path).stat()
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


@functools.cache
def warn(line: str) -> None:
    """Prints a line on stderr, once per process."""
    print(line, file=sys.stderr, flush=True)


def is_directory(path: str) -> bool:
    """Whether a path is a folder."""
    if not is_url(path):
        return Path(path).is_dir()
    system, inner = _remote(path)
    return bool(system.isdir(inner))


def bytes_of(path: str) -> int:
    """Size of a file, or of all files of a folder."""
    if is_url(path):
        system, inner = _remote(path)
        return int(system.du(inner))
    if path.endswith(".bin") or Path(path).is_file():
        return Path(path).stat().st_size
    return sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file())


def identity_of(path: str) -> list[object]:
    """What changes when a file does: its name, size and time of change, or the key that a remote file system gives it."""
    if path.endswith(".bin") and not is_url(path):
        return [*_stats([Path(path), Path(path).with_suffix(".idx")])]
    if is_url(path):
        system, inner = _remote(path)
        return [path, system.ukey(inner)]
    return _stats(sorted(p for p in Path(path).rglob("*") if p.is_file()) if Path(path).is_dir() else [Path(path)])


def _stats(paths: Iterable[Path]) -> list[object]:
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in paths if p.exists()]


def open_file(path: str) -> IO[bytes]:
    """Opens a file to read bytes."""
    if not is_url(path):
        return Path(path).open("rb")
    system, inner = _remote(path)
    file: IO[bytes] = system.open(inner, "rb")
    return file


def exists(path: str) -> bool:
    """Whether a path is a file."""
    if not is_url(path):
        return Path(path).is_file()
    system, inner = _remote(path)
    return bool(system.isfile(inner))


def read_json(path: str) -> Any:
    """The value of a JSON file."""
    with open_file(path) as f:
        return json.loads(f.read().decode("utf-8"))
