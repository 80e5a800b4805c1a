"""Reading ahead and writing past the page cache, for files that are larger than memory."""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tanuki_jax.files.disk import reserve

T = TypeVar("T")

PIECE = 1 << 20  # bytes written at a time, so few that they stay in a core's cache from one use to the next
O_DIRECT = getattr(os, "O_DIRECT", 0)
READAHEAD_BYTES = 4 << 30  # bytes that are read before anyone asks for them
ADVICE = 4 << 20  # bytes per call, as many as the kernel accepts at once


@contextlib.contextmanager
def direct_writer(path: Path, size: int, depth: int = 2) -> Iterator[Callable[[memoryview], None]]:
    """Yields a function that appends bytes to a new file of `size` bytes; they are on the disk when the context ends well.

    Up to `depth` pieces are being written at a time: a few where several files are written at once, more to keep the disk busy
    with one.  They bypass the page cache where the file system allows it (O_DIRECT).  A file much larger than memory would
    else wait for the kernel to free every page.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        number = os.open(path, flags | O_DIRECT)
    except OSError:
        number = os.open(path, flags)
    with os.fdopen(number, "wb", buffering=0) as f, ThreadPoolExecutor(depth) as pool:
        spare = [memoryview(mmap.mmap(-1, PIECE)) for _ in range(depth)]  # aligned to pages, as O_DIRECT requires
        pending: collections.deque[Future[memoryview]] = collections.deque()
        buffer, filled, offset = memoryview(mmap.mmap(-1, PIECE)), 0, 0

        def append(data: memoryview) -> None:
            nonlocal buffer, filled, offset
            while data:
                count = min(len(data), PIECE - filled)
                buffer[filled : filled + count] = data[:count]
                data, filled = data[count:], filled + count
                if filled == PIECE:
                    pending.append(pool.submit(_write_at, number, buffer, offset))
                    buffer = spare.pop() if spare else pending.popleft().result()
                    filled, offset = 0, offset + PIECE

        reserve(f, size)
        yield append
        while pending:
            pending.popleft().result()
        _write_at(number, buffer[:filled], offset)
        os.fsync(number)


def _write_at(number: int, buffer: memoryview, offset: int) -> memoryview:
    """Writes a buffer at an offset of an open file; returns the buffer, to be used again."""
    data = buffer
    while data:
        try:
            count = os.pwrite(number, data, offset)
            data, offset = data[count:], offset + count
        except OSError as error:
            flags = fcntl.fcntl(number, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & O_DIRECT:
                raise
            fcntl.fcntl(number, fcntl.F_SETFL, flags & ~O_DIRECT)  # for the end of a file, which fills no block
    return buffer


def prefetch(calls: Iterable[Callable[[], T]], count: int, threads: int) -> Iterator[T]:
    """Results of calls, in order; while one is used, the next `count` calls are made."""
    pool = ThreadPoolExecutor(threads)
    pending: collections.deque[Future[T]] = collections.deque()
    try:
        for call in calls:
            pending.append(pool.submit(call))
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the calls that have begun


def advise_willneed(paths: Sequence[Path]) -> None:
    """Asks the kernel to read files, small ones first and at most READAHEAD_BYTES, from a thread; it saves time or nothing."""
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=_advise, args=(paths,), daemon=True).start()


def _advise(paths: Sequence[Path]) -> None:
    left = READAHEAD_BYTES
    with contextlib.suppress(OSError):
        for path in sorted(paths, key=lambda path: path.stat().st_size > ADVICE):
            with path.open("rb") as f:
                size = min(os.fstat(f.fileno()).st_size, left)
                left -= size
                for offset in range(0, size, ADVICE):
                    os.posix_fadvise(f.fileno(), offset, ADVICE, os.POSIX_FADV_WILLNEED)
