"""One writer at a time: a lock is a small file that says who holds it and is renewed while the holder lives.

It is made by a hard link, which is atomic on NFS, too; where there are no links, by a file that must be new.  Whoever finds it
held ends with an error that names the holder.  A holder that is dead is replaced: on the same machine the process is looked
for; elsewhere the lock is watched, so that no clocks are compared.  Only who holds the lock on a lock may remove it, so that of
several that find a dead holder one takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tanuki_jax.errors import UserError

RENEW = 5.0  # seconds between two renewals
STALE = 75.0  # seconds that the lock of a holder elsewhere is watched; NFS and gcsfuse may show what was there a minute ago
NEAR = 15.0  # the same for one in another container of this machine
POLL = 0.5  # seconds between two looks
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write says where there is no room
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES)
ENDING = ("SIGTERM", "SIGHUP")


@dataclass(frozen=True)
class Holder:
    """What a lock says of the process that holds it."""

    token: str  # of this lock alone
    host: str
    boot: str  # of the machine's kernel; with `namespace` it tells whether `pid` means anything here
    namespace: str
    pid: int
    started: str  # in the kernel's ticks since boot, for numbers of processes are used again
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} ({self.command})"


@dataclass(eq=False)
class _HeldLock:
    """A lock that this process holds."""

    path: Path
    what: str
    me: Holder
    made: list[Path]  # directories that were made for it
    thread: int = field(default_factory=threading.get_ident)
    stop: threading.Event = field(default_factory=threading.Event)
    lost: str = ""  # how, where it is no longer ours


_held: dict[str, _HeldLock] = {}  # by the path of the file
_tokens: set[str] = set()  # of locks that are held or being taken


def workdir(directory: Path) -> contextlib.AbstractContextManager[None]:
    """The lock on a run's directory, which is made; `hold` says the rest."""
    return hold(Path(directory) / ".lock", f"--workdir: {directory}", f"--workdir: cannot write to {directory}")


def output(path: Path) -> contextlib.AbstractContextManager[None]:
    """The lock on a file or directory that is going to be written; it lies beside it.  `hold` says the rest."""
    path = Path(path)
    whole = path if path.name not in ("", "..") else path.resolve()
    return hold(whole.with_name(f".{whole.name}.lock"), f"--output: {path}", f"cannot write {path}")


@contextlib.contextmanager
def hold(path: Path, what: str, cannot: str = "") -> Iterator[None]:
    """Holds the lock in the file `path`, however that is spelt; a thread that holds it already goes on.

    Args:
      what: it protects, for messages.
      cannot: what is said where it cannot be written.

    Raises:
      UserError: another process or thread holds it, or it cannot be written.
    """
    path = Path(os.path.realpath(path.parent)) / path.name
    mine = _held.get(str(path))
    if mine and mine.me.pid == os.getpid() and mine.thread == threading.get_ident():
        yield
        return
    lock = _HeldLock(path, what, _this_holder(), [])
    try:
        _take(lock)
    except BaseException as error:
        _remove_directories(lock)
        if isinstance(error, OSError):
            full = f"checkpoint: the disk of {path.parent} is full; free some space and run the same command again"
            raise UserError(full if error.errno in FULL else f"{cannot or f'cannot write {path}'}: {error.strerror}") from error
        raise
    threading.Thread(target=_renew, args=(lock,), name="lock", daemon=True).start()
    try:
        yield
    finally:
        _release(lock)


def check(look: bool = True) -> None:
    """An error where a lock of this process is another's by now; to be asked before anything is written that others could see.

    look: at the files, and not only at what the last renewal found.
    """
    for lock in list(_held.values()):
        if lock.me.pid == os.getpid():
            with contextlib.suppress(OSError):  # of a file system that does not answer: what is written next will say so
                _ = look and _is_ours(lock)
            if lock.lost:
                raise UserError(f"{lock.what}: the lock {lock.path} {lock.lost}; this process ends and writes nothing more")


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """While inside, SIGTERM and SIGHUP give the locks back before they end the process.

    Not for one of several processes: there JAX listens, of which Python does not know.
    """
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ENDING if main and hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def end_with_parent() -> None:
    """Ends this process, a worker, as soon as the one that started it is gone: what works for a lock must not outlive it."""

    def wait(parent: Any) -> None:
        parent.join()
        os._exit(1)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=wait, args=(parent,), name="parent", daemon=True).start()


# --- taking, renewing and giving back ---------------------------------------------------------------------------------


def _take(lock: _HeldLock) -> None:
    """Makes the lock's file, or raises UserError where another holds it."""
    text = json.dumps(asdict(lock.me), ensure_ascii=False)
    own = lock.path.with_name(f"{lock.path.name}.{lock.me.token}")
    _tokens.add(lock.me.token)  # first, so that another thread sees that its holder lives
    try:
        _write_own(lock, own, text)
        while not _create(lock.path, own, text):
            if (found := _read(lock.path)) and not _is_free(lock, found):
                raise UserError(_refusal(lock, found[0]))
        own.unlink(missing_ok=True)
    except BaseException:
        _tokens.discard(lock.me.token)
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)
        raise
    _held[str(lock.path)] = lock


def _write_own(lock: _HeldLock, own: Path, text: str) -> None:
    """Writes a file that nobody else has, in a directory that is made."""
    for attempt in range(9):  # who gives a lock back removes directories that it made and that are empty
        try:
            lock.made += _make_directories(lock.path.parent)
            own.write_text(text, encoding="utf-8")
            break
        except FileNotFoundError:
            if attempt == 8:
                raise


def _create(path: Path, own: Path, text: str) -> bool:
    """Whether `path` could be made, with the text of `own`."""
    try:
        path.hardlink_to(own)
    except FileExistsError:
        return own.stat().st_nlink == 2  # it was made, but NFS lost the answer and asked again
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            with path.open("x", encoding="utf-8") as f:
                f.write(text)
        except OSError as second:
            if second.errno not in (
                errno.EEXIST,
                errno.ESTALE,
            ):  # gcsfuse learns only when it is closed that another was faster
                raise
            return False
    return True


def _renew(lock: _HeldLock) -> None:
    while not lock.stop.wait(RENEW):
        with contextlib.suppress(OSError):  # a file server that does not answer may do so the next time
            if not _is_ours(lock):
                return
            os.utime(lock.path)


def _is_ours(lock: _HeldLock) -> bool:
    found = _read(lock.path)
    if found and found[0] and found[0].token == lock.me.token:
        return True
    if not lock.stop.is_set():
        lost = f"was taken over by {found[0] or 'another'}" if found else "was removed"
        lock.lost = lock.lost or lost
    return False


def _release(lock: _HeldLock) -> None:
    lock.stop.set()
    _tokens.discard(lock.me.token)
    if _held.get(str(lock.path)) is lock:
        del _held[str(lock.path)]
    with contextlib.suppress(OSError):
        if (found := _read(lock.path)) and found[0] and found[0].token == lock.me.token:
            lock.path.unlink()
    _remove_directories(lock)


def _make_directories(directory: Path) -> list[Path]:
    """Makes a directory and those above it; returns the new ones, the innermost first."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return new


def _remove_directories(lock: _HeldLock) -> None:
    """Those that were made for a lock and are empty: a command that ends in an error leaves nothing."""
    with contextlib.suppress(OSError):
        for directory in lock.made:
            directory.rmdir()


def _end(number: int, frame: Any) -> None:
    for lock in list(_held.values()):
        if lock.me.pid == os.getpid():  # a fork has a copy of its parent's
            _release(lock)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# --- who holds a lock -------------------------------------------------------------------------------------------------

LockState = tuple[Holder | None, int]  # what a lock says, None where that cannot be read, and when it was renewed


def _read(path: Path) -> LockState | None:
    """What a lock says, None where there is none; the file is opened, since NFS then asks the server."""
    for attempt in range(9):
        try:
            with path.open("rb") as f:
                when, text = os.fstat(f.fileno()).st_mtime_ns, f.read()
            break
        except FileNotFoundError:
            return None
        except OSError as error:  # it was removed or renewed just now
            if error.errno != errno.ESTALE or attempt == 8:
                raise
            time.sleep(POLL)
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None, when
    return (holder if isinstance(holder.pid, int) and holder.pid > 0 else None), when


def _is_free(lock: _HeldLock, found: LockState) -> bool:
    """Whether a lock that was found has no holder any more; then it is removed."""
    holder = found[0]
    lives = _is_alive(holder) if holder else None
    if lives is None:
        _log(f"{lock.what} is locked by {holder or 'another process'}, which cannot be looked for here; watching its lock")
        near = holder and holder.boot and holder.boot == lock.me.boot
        lives = _is_renewed(lock.path, found, NEAR if near else STALE)
    if not lives:
        with hold(lock.path.with_name(f"{lock.path.name}~"), lock.what):
            if _read(lock.path) == found:
                lock.path.unlink()
                if holder:  # which may have been killed while it took the lock
                    lock.path.with_name(f"{lock.path.name}.{holder.token}").unlink(missing_ok=True)
                _log(f"{lock.what}: taken over from {holder or 'another process'}, which is gone")
    return not lives


def _is_renewed(path: Path, found: LockState, seconds: float) -> bool:
    """Watches a lock until it is renewed, the time is over, or another has taken its place."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(POLL)
        now = _read(path)
        if not now or now[0] != found[0]:
            return False
        if now[1] != found[1]:
            return True
    return False


def _is_alive(holder: Holder) -> bool | None:
    """Whether a holder lives; None where this cannot be seen from here."""
    if (holder.host, holder.boot, holder.namespace) != _place():
        return None
    if holder.pid == os.getpid():  # of a run in this process that is over, or of another with the same number
        return holder.token in _tokens
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return _started(holder.pid) in (holder.started, None)


def _this_holder() -> Holder:
    host, boot, namespace = _place()
    name = Path(sys.argv[0]).name
    command = shlex.join(["tanuki" if name in ("cli.py", "tanuki") else name, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    shown = " ".join(command.split())[:300]
    return Holder(uuid.uuid4().hex, host, boot, namespace, os.getpid(), _started(os.getpid()) or "", since, shown)


def _place() -> tuple[str, str, str]:
    """Host, boot and namespace of process numbers."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return socket.gethostname(), boot, namespace


def _started(pid: int) -> str | None:
    """When a process began, "gone" for one that only waits for its parent, None where this cannot be seen."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return "gone" if state in "ZX" else rest[18]


def _refusal(lock: _HeldLock, holder: Holder | None) -> str:
    return (
        f"{lock.what} is in use by {holder or 'another process'}; wait for it, or end it: "
        f"the same command then takes its place (its lock is {lock.path})"
    )


def _log(text: str) -> None:
    print(f"tanuki: {text}", file=sys.stderr, flush=True)
