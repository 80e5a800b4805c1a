"""One writer at a time: a lock is a small file that names its holder and is renewed while the holder lives.

It is created by a hard link, which is atomic on NFS, too; where there are no links, by a file that must be new.  A process
that finds it held ends with an error that names the holder.  A dead holder is replaced: on the same machine its process is
looked up; elsewhere the lock is watched, so that no clocks are compared.  Only the holder of the lock on a lock may remove it,
so that of several processes that find a dead holder one takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
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
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from tanuki_jax.errors import UserError

logger = logging.getLogger(__name__)

RENEW = 5.0  # seconds between two renewals
STALE = 75.0  # seconds that the lock of a holder elsewhere is watched; NFS and gcsfuse may show what was there a minute ago
NEAR = 15.0  # the same for one in another container of this machine
POLL = 0.5  # seconds between two checks
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a write where there is no space
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES)
END_SIGNALS = ("SIGTERM", "SIGHUP")


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as the lock's file names it."""

    token: str  # of this lock alone
    host: str
    boot: str  # of the machine's kernel; with `namespace` it shows whether `pid` means anything here
    namespace: str
    pid: int
    started: str  # in the kernel's ticks since boot, since process numbers are reused
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} ({self.command})"


@dataclass(eq=False)
class _HeldLock:
    """A lock that this process holds."""

    path: Path
    label: str  # of what it protects, for messages
    holder: Holder
    new_directories: list[Path]  # created for it
    thread: int = field(default_factory=threading.get_ident)
    stop: threading.Event = field(default_factory=threading.Event)
    lost: str = ""  # the reason, where it is no longer ours


_held: dict[str, _HeldLock] = {}  # by the path of the file
_tokens: set[str] = set()  # of locks that are held or being taken


def workdir(directory: Path) -> contextlib.AbstractContextManager[None]:
    """The lock on a run's directory, which is created; see `hold`."""
    return hold(Path(directory) / ".lock", f"--workdir: {directory}", f"--workdir: cannot write to {directory}")


def output(path: Path) -> contextlib.AbstractContextManager[None]:
    """The lock on a file or directory that is going to be written, and next to which it lies; see `hold`."""
    path = Path(path)
    whole = path if path.name not in ("", "..") else path.resolve()
    return hold(whole.with_name(f".{whole.name}.lock"), f"--output: {path}", f"cannot write {path}")


@contextlib.contextmanager
def hold(path: Path, label: str, cannot: str = "") -> Iterator[None]:
    """Holds the lock in the file `path`, however that is spelt; a thread that holds it already goes on.

    Args:
      label: of what the lock protects, for messages.
      cannot: beginning of the message where it cannot be written.

    Raises:
      UserError: another process or thread holds it, or it cannot be written.
    """
    path = Path(os.path.realpath(path.parent)) / path.name
    held = _held.get(str(path))
    if held and held.holder.pid == os.getpid() and held.thread == threading.get_ident():
        yield
        return
    lock = _HeldLock(path, label, _current_holder(), [])
    try:
        _take(lock)
    except BaseException as error:
        _remove_directories(lock)
        if isinstance(error, OSError):
            reason = f"{cannot or f'cannot write {path}'}: {error.strerror}"
            if error.errno in DISK_FULL:
                reason = f"checkpoint: the disk of {path.parent} is full; free some space and run the same command again"
            raise UserError(reason) from error
        raise
    threading.Thread(target=_renew, args=(lock,), name="lock", daemon=True).start()
    try:
        yield
    finally:
        _release(lock)


def check(look: bool = True) -> None:
    """An error where a lock of this process has been lost; to be called before anything is written that others could see.

    look: read the locks' files again, instead of relying on the last renewal.
    """
    for lock in list(_held.values()):
        if lock.holder.pid == os.getpid():
            if look:
                with contextlib.suppress(OSError):  # a file system that does not answer; the next write will fail, too
                    _is_ours(lock)
            if lock.lost:
                raise UserError(f"{lock.label}: the lock {lock.path} {lock.lost}; this process ends and writes nothing more")


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """While inside, SIGTERM and SIGHUP release the locks before they end the process.

    Not for one of several processes of a run: there JAX handles SIGTERM, without Python's knowledge.
    """
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in END_SIGNALS if main and hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _release_and_end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def end_with_parent() -> None:
    """Ends this process, a worker, as soon as its parent is gone: it works under the parent's lock and must not outlive it."""

    def wait(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    parent = multiprocessing.parent_process()
    if parent:
        threading.Thread(target=wait, args=(parent,), name="parent", daemon=True).start()


# --- taking, renewing and releasing -------------------------------------------------------------------------------------


def _take(lock: _HeldLock) -> None:
    """Creates the lock's file, or raises UserError where another holds it."""
    text = json.dumps(asdict(lock.holder), ensure_ascii=False)
    private = lock.path.with_name(f"{lock.path.name}.{lock.holder.token}")
    _tokens.add(lock.holder.token)  # before the file exists, so that another thread sees that its holder lives
    try:
        _write_private(lock, private, text)
        while not _create(lock.path, private, text):
            state = _read(lock.path)
            if state and not _is_free(lock, state):
                raise UserError(_refusal(lock, state[0]))
        private.unlink(missing_ok=True)
    except BaseException:
        _tokens.discard(lock.holder.token)
        with contextlib.suppress(OSError):
            private.unlink(missing_ok=True)
        raise
    _held[str(lock.path)] = lock


def _write_private(lock: _HeldLock, private: Path, text: str) -> None:
    """Writes a file that no other process writes, and creates its directory."""
    for attempt in range(9):  # a process that releases a lock removes empty directories that it created
        try:
            lock.new_directories += _make_directories(lock.path.parent)
            private.write_text(text, encoding="utf-8")
            break
        except FileNotFoundError:
            if attempt == 8:
                raise


def _create(path: Path, private: Path, text: str) -> bool:
    """Whether `path` could be created, with the text of `private`."""
    try:
        path.hardlink_to(private)
    except FileExistsError:
        return private.stat().st_nlink == 2  # it was created, but NFS lost the answer and asked again
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            with path.open("x", encoding="utf-8") as f:
                f.write(text)
        except OSError as second:
            # gcsfuse learns only when the file is closed that another process was faster
            if second.errno not in (errno.EEXIST, errno.ESTALE):
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
    state = _read(lock.path)
    if state and state[0] and state[0].token == lock.holder.token:
        return True
    if not lock.stop.is_set():
        reason = f"was taken over by {state[0] or 'another'}" if state else "was removed"
        lock.lost = lock.lost or reason
    return False


def _release(lock: _HeldLock) -> None:
    lock.stop.set()
    _tokens.discard(lock.holder.token)
    if _held.get(str(lock.path)) is lock:
        del _held[str(lock.path)]
    with contextlib.suppress(OSError):
        state = _read(lock.path)
        if state and state[0] and state[0].token == lock.holder.token:
            lock.path.unlink()
    _remove_directories(lock)


def _make_directories(directory: Path) -> list[Path]:
    """Creates a directory and its parents; returns the new ones, the innermost first."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return new


def _remove_directories(lock: _HeldLock) -> None:
    """Removes those that were created for a lock and are empty: a command that ends in an error leaves nothing."""
    with contextlib.suppress(OSError):
        for directory in lock.new_directories:
            directory.rmdir()


def _release_and_end(number: int, frame: FrameType | None) -> None:
    for lock in list(_held.values()):
        if lock.holder.pid == os.getpid():  # a fork has a copy of its parent's
            _release(lock)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# --- the holder of a lock ---------------------------------------------------------------------------------------------

LockState: TypeAlias = tuple[Holder | None, int]  # the holder, None where it cannot be read, and the time of renewal in ns


def _read(path: Path) -> LockState | None:
    """The state of a lock, None where there is none; the file is opened, since NFS then asks the server."""
    for attempt in range(9):
        try:
            with path.open("rb") as f:
                renewed, text = os.fstat(f.fileno()).st_mtime_ns, f.read()
            break
        except FileNotFoundError:
            return None
        except OSError as error:  # it has just been removed or renewed
            if error.errno != errno.ESTALE or attempt == 8:
                raise
            time.sleep(POLL)
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None, renewed
    return (holder if isinstance(holder.pid, int) and holder.pid > 0 else None), renewed


def _is_free(lock: _HeldLock, state: LockState) -> bool:
    """Whether the holder of an existing lock is gone; then the lock is removed."""
    holder = state[0]
    alive = _is_alive(holder) if holder else None
    if alive is None:
        logger.warning(
            "%s is locked by %s, which cannot be looked for here; watching its lock", lock.label, holder or "another process"
        )
        same_machine = holder and holder.boot and holder.boot == lock.holder.boot
        alive = _is_renewed(lock.path, state, NEAR if same_machine else STALE)
    if not alive:
        with hold(lock.path.with_name(f"{lock.path.name}~"), lock.label):
            if _read(lock.path) == state:
                lock.path.unlink()
                if holder:  # which may have been killed while it took the lock
                    lock.path.with_name(f"{lock.path.name}.{holder.token}").unlink(missing_ok=True)
                logger.warning("%s: taken over from %s, which is gone", lock.label, holder or "another process")
    return not alive


def _is_renewed(path: Path, state: LockState, seconds: float) -> bool:
    """Watches a lock until it is renewed, the time is over, or another has taken its place."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(POLL)
        now = _read(path)
        if not now or now[0] != state[0]:
            return False
        if now[1] != state[1]:
            return True
    return False


def _is_alive(holder: Holder) -> bool | None:
    """Whether a holder lives; None where that cannot be seen from here."""
    if (holder.host, holder.boot, holder.namespace) != _place():
        return None
    if holder.pid == os.getpid():  # a run in this process that is over, or another process with the same number
        return holder.token in _tokens
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return _started(holder.pid) in (holder.started, None)


def _current_holder() -> Holder:
    host, boot, namespace = _place()
    script = Path(sys.argv[0])
    name = "tanuki" if script.parts[-2:] == ("cli", "__main__.py") else script.name
    command = shlex.join([name, *sys.argv[1:]])
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
    """The start time of a process, "gone" for a zombie, None where that cannot be seen."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return "gone" if state in "ZX" else fields[18]


def _refusal(lock: _HeldLock, holder: Holder | None) -> str:
    return (
        f"{lock.label} is in use by {holder or 'another process'}; wait for it, or end it: "
        f"the same command then takes its place (its lock is {lock.path})"
    )
