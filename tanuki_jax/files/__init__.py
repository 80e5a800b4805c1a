"""Files that are either whole or not there, and fingerprints that say whether two inputs are the same."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import mmap
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

from tanuki_jax.errors import UserError
from tanuki_jax.files import lock

T = TypeVar("T")

PIECE = 1 << 20  # bytes taken at a time, so few that they stay in a core's cache from one use to the next
O_DIRECT = getattr(os, "O_DIRECT", 0)
READAHEAD_BYTES = 4 << 30  # bytes that are read before anyone asks for them
ADVICE = 4 << 20  # bytes, as many as the kernel takes upon itself at once
FULL = lock.FULL


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


def absolute(path: str | Path) -> Path:
    """The path from the root, without `..`, which TensorStore does not take."""
    path = Path(path)
    return path.resolve() if ".." in path.parts else path.absolute()


def remove_unfinished(path: Path) -> None:
    """Removes what killed processes left of `path` under the names of `atomic_path`; for who holds its lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a whole UTF-8 file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; Japanese stays readable."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file; a damaged one is an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or remove it to start anew") from error


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Writes one JSON object per line atomically; returns how many."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


@contextlib.contextmanager
def disk_errors(
    directory: Path, what: str = "checkpoint", kinds: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError)
) -> Iterator[None]:
    """Turns the many ways in which a full or closed disk shows itself into one message.

    what: with which it begins; kinds: of the exceptions that are looked at.
    """
    try:
        yield
    except kinds as error:
        text = str(error)
        full = getattr(error, "errno", None) in FULL
        if full or any(
            sign in text for sign in ("No space left", "ENOSPC", "Disk quota", "RESOURCE_EXHAUSTED", "File too large")
        ):
            raise UserError(
                f"{what}: the disk of {directory} is full{_limit(error)}; free some space and run the same command again"
            ) from error
        if isinstance(error, PermissionError) or "Permission denied" in text or "Read-only file system" in text:
            raise UserError(f"{what}: {directory} cannot be written to; check its permissions") from error
        raise


def _limit(error: Exception) -> str:
    """A file may also be larger than the user or the file system allows."""
    found = getattr(error, "errno", None) == errno.EFBIG or "File too large" in str(error)
    return ", or a file larger than `ulimit -f` or its file system allows" if found else ""


def reserve(file: IO[bytes], size: int) -> None:
    """Takes the room for a file on the disk at once, where the file system can: a full disk is known before hours of work.

    Not by `os.posix_fallocate`, which elsewhere writes a byte to every block.
    """
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)  # glibc's
    if allocate and allocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        if number in FULL:
            raise OSError(number, os.strerror(number), file.name)


@contextlib.contextmanager
def direct_writer(path: Path, size: int, depth: int = 2) -> Iterator[Callable[[memoryview], None]]:
    """Yields what appends bytes to a new file of `size` bytes; when it is left without an error, they are on the disk.

    Up to `depth` pieces are on their way there: a few where several files are written at once, more keep the disk busy for one.
    They go past the page cache where the file system can do that (O_DIRECT).  What is much larger than memory would else wait
    for the kernel to make room for every page of it.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        number = os.open(path, flags | O_DIRECT)
    except OSError:
        number = os.open(path, flags)

    def put(room: memoryview, at: int) -> memoryview:
        data = room
        while data:
            try:
                count = os.pwrite(number, data, at)
                data, at = data[count:], at + count
            except OSError as error:
                on = fcntl.fcntl(number, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not on & O_DIRECT:
                    raise
                fcntl.fcntl(number, fcntl.F_SETFL, on & ~O_DIRECT)  # for the end of a file, which fills no block
        return room

    with os.fdopen(number, "wb", buffering=0) as f, ThreadPoolExecutor(depth) as pool:
        rooms = [memoryview(mmap.mmap(-1, PIECE)) for _ in range(depth)]  # begin with a page, as O_DIRECT wants it
        waiting: collections.deque[Future[memoryview]] = collections.deque()
        room, held, at = memoryview(mmap.mmap(-1, PIECE)), 0, 0

        def append(data: memoryview) -> None:
            nonlocal room, held, at
            while data:
                taken = min(len(data), PIECE - held)
                room[held : held + taken] = data[:taken]
                data, held = data[taken:], held + taken
                if held == PIECE:
                    waiting.append(pool.submit(put, room, at))
                    room, held, at = rooms.pop() if rooms else waiting.popleft().result(), 0, at + PIECE

        reserve(f, size)
        yield append
        while waiting:
            waiting.popleft().result()
        put(room[:held], at)
        os.fsync(number)


def prefetch(calls: Iterable[Callable[[], T]], count: int, threads: int) -> Iterator[T]:
    """Results of calls, in order; while one is used, the next `count` are made."""
    pool = ThreadPoolExecutor(threads)
    waiting: collections.deque[Future[T]] = collections.deque()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # what has begun is waited for


def advise_willneed(paths: Sequence[Path]) -> None:
    """Asks the kernel to read files, small ones first and at most SOON bytes, from a thread; it saves time or nothing."""
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=_advise, args=(paths,), daemon=True).start()


def _advise(paths: Sequence[Path]) -> None:
    left = READAHEAD_BYTES
    with contextlib.suppress(OSError):
        for path in sorted(paths, key=lambda path: path.stat().st_size > ADVICE):
            with path.open("rb") as f:
                size = min(os.fstat(f.fileno()).st_size, left)
                left -= size
                for at in range(0, size, ADVICE):
                    os.posix_fadvise(f.fileno(), at, ADVICE, os.POSIX_FADV_WILLNEED)


def sync(directory: Path) -> None:
    """Waits until every file of a directory is on the disk."""
    for path in (path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as f:
            os.fsync(f.fileno())


def fingerprint(*values: Any) -> str:
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
