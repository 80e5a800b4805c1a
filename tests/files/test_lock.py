"""The lock itself: who is refused, who takes over, and what becomes of one that is lost."""

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tanuki_jax import files
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tests.checkpoint.test_manager import files_of_at_most

ROOT = Path(__file__).parents[2]
HOLD = """
import os, signal, sys, time
from pathlib import Path
from tanuki_jax.files import lock
with lock.signals(), getattr(lock, sys.argv[1])(Path(sys.argv[2])):
    print("held", flush=True)
    exec(sys.stdin.read())
"""


@contextmanager
def holder(path, kind="output", then="time.sleep(100)"):
    """Another process that holds a lock, and then does as it is told."""
    default = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # it may be ignored, as under nohup
    command = [sys.executable, "-c", default + HOLD, kind, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            process.stdin.write(then)
            process.stdin.close()
            yield process
        finally:
            process.kill()


def tree(directory):
    """Every file and directory below, and when it was written last."""
    return {str(path.relative_to(directory)): path.lstat().st_mtime_ns for path in directory.rglob("*")}


@pytest.fixture
def fast(monkeypatch):
    for name, seconds in (("RENEW", 0.05), ("STALE", 0.5), ("NEAR", 0.2), ("POLL", 0.02)):
        monkeypatch.setattr(lock, name, seconds)


def lie(path, **changes):
    """A lock that nobody of this process holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(replace(lock._current_holder(), **changes))))
    return path


def elsewhere(path):
    return lie(path, host="elsewhere", boot="another", pid=12)


# --- refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["output", "workdir"])
def test_the_second_process_is_told_at_once_who_holds_it_and_leaves_nothing(tmp_path, kind):
    place = tmp_path / "place"
    with holder(place, kind) as first:
        before, began = tree(tmp_path), time.monotonic()
        with pytest.raises(UserError) as refused, getattr(lock, kind)(place):
            pytest.fail("two hold it")
        assert time.monotonic() - began < 1 and "\n" not in str(refused.value)
        found = json.loads(next(path for path in tmp_path.rglob("*") if path.is_file()).read_text())
        for part in (f"process {first.pid} on {found['host']}", f"since {found['since']}", found["command"], "end it"):
            assert part in str(refused.value)
        assert tree(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("kind", ["output", "workdir"])
def test_one_place_has_one_lock_however_it_is_spelt(tmp_path, monkeypatch, kind):
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "deep")
    spellings = [
        Path("place"),
        Path("../deep/place"),
        tmp_path / "link" / "place",
        tmp_path / "deep/./place",
        Path("../link/place/"),
    ]
    with holder(tmp_path / "deep" / "place", kind):
        for path in spellings:
            with pytest.raises(UserError, match="is in use by process"), getattr(lock, kind)(path):
                pass
    for path in spellings:
        with holder(path.absolute(), kind), pytest.raises(UserError), getattr(lock, kind)(tmp_path / "deep" / "place"):
            pass


def test_another_thread_is_refused_and_the_same_one_goes_on(tmp_path):
    found = []

    def other():
        try:
            with lock.output(tmp_path / "x"):
                found.append("held")
        except UserError as error:
            found.append(str(error))

    with lock.output(tmp_path / "x"):
        with lock.output(tmp_path / "x"), lock.output(tmp_path / "y"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()}" in found[0] and not list(tmp_path.iterdir())


def test_what_cannot_be_locked_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    for hold, said in ((lock.output, "cannot write .*file/x: "), (lock.workdir, "--workdir: cannot write to .*file/x: ")):
        with pytest.raises(UserError, match=said), hold(tmp_path / "file" / "x"):
            pass


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    with files_of_at_most(100), pytest.raises(UserError, match=rf"the disk of {tmp_path}/a is full; free some space"):
        lock.output(tmp_path / "a" / "x").__enter__()
    assert not list(tmp_path.iterdir())


def test_directories_that_were_made_for_a_lock_go_with_it_if_they_are_empty(tmp_path):
    with pytest.raises(UserError), lock.workdir(tmp_path / "a" / "b"):
        raise UserError("a config that is wrong")
    assert not list(tmp_path.iterdir())
    with lock.output(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b").write_text("")
    assert tree(tmp_path).keys() == {"a", "a/b"}


# --- given back and taken over ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending", ["pass", "raise SystemExit(3)", "os.kill(os.getpid(), signal.SIGTERM)", "os.kill(os.getpid(), signal.SIGHUP)"]
)
def test_whoever_ends_gives_it_back(tmp_path, caplog, ending):
    with holder(tmp_path / "x", then=ending) as process:
        code = process.wait(20)
    assert code == {"p": 0, "r": 3}.get(ending[0], -15 if "TERM" in ending else -1)
    assert not list(tmp_path.iterdir())
    with lock.output(tmp_path / "x"):
        assert "taken over" not in caplog.text


def test_a_lock_touches_no_signal_by_itself(tmp_path):
    """Of several processes of a run JAX listens to SIGTERM, without Python's knowledge."""
    before = signal.getsignal(signal.SIGTERM)
    with lock.output(tmp_path / "x"):
        assert signal.getsignal(signal.SIGTERM) is before
        with lock.signals():
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_killed_holder_is_replaced_at_once_and_this_is_logged(tmp_path, caplog):
    with holder(tmp_path / "x") as process:
        process.kill()  # and nobody waits for it: a zombie
        began = time.monotonic()
        while time.monotonic() < began + 5:
            with suppress(UserError), lock.output(tmp_path / "x"):
                break
    assert time.monotonic() - began < 3
    assert f"taken over from process {process.pid} on " in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pid", [os.getppid(), os.getpid(), 2**22 + 1, 2**70], ids=["parent", "own", "too large", "huge"])
def test_a_process_with_the_number_of_a_dead_holder_does_not_hold(tmp_path, pid):
    """As after a restart of a container, whose first process always is number 1."""
    lie(tmp_path / ".x.lock", pid=pid, started="1")
    with lock.output(tmp_path / "x"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_process_of_another_user_holds(tmp_path, monkeypatch):
    lie(tmp_path / ".x.lock", pid=os.getppid(), started=lock._started(os.getppid()))

    def not_mine(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", not_mine)
    with pytest.raises(UserError, match="in use"), lock.output(tmp_path / "x"):
        pass


def test_a_holder_elsewhere_that_renews_its_lock_holds_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "POLL", 0.02)
    path = elsewhere(tmp_path / ".x.lock")
    threading.Timer(0.3, os.utime, (path,)).start()
    with pytest.raises(UserError, match="in use by process 12 on elsewhere"), lock.output(tmp_path / "x"):
        pass
    assert "watching" in caplog.text and path.exists()


@pytest.mark.parametrize("age", [0, 1000, -1000], ids=["new", "old", "clock ahead"])
@pytest.mark.parametrize(
    ("where", "seconds"),
    [("elsewhere", 0.5), ("another container", 0.2), ("unreadable", 0.5), ("empty", 0.5), ("no process", 0.5)],
)
def test_a_holder_that_cannot_be_looked_for_and_does_not_renew_is_replaced(tmp_path, fast, caplog, age, where, seconds):
    path = elsewhere(tmp_path / ".x.lock")
    if where == "another container":
        lie(path, namespace="another", pid=1)
    if where in ("unreadable", "empty", "no process"):
        path.write_text({"unreadable": "{", "empty": "", "no process": path.read_text().replace(": 12,", ": -1,")}[where])
    now = time.time() - age
    os.utime(path, (now, now))
    began = time.monotonic()
    with lock.output(tmp_path / "x"):
        assert seconds <= time.monotonic() - began < seconds + 3
    who = {"elsewhere": "process 12 on elsewhere", "another container": "process 1 on "}.get(where, "another process")
    watching, taken_over = caplog.messages
    assert "watching its lock" in watching and f"taken over from {who}" in taken_over


def test_a_lock_that_is_given_back_while_it_is_watched_is_taken_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "POLL", 0.02)
    threading.Timer(0.2, elsewhere(tmp_path / ".x.lock").unlink).start()
    began = time.monotonic()
    with lock.output(tmp_path / "x"):
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("stale", [True, False])
def test_of_many_at_one_time_one_takes_it(tmp_path, monkeypatch, links, stale):
    """Whatever the order in which their steps come."""
    order = random.Random(0)

    def late(owner, name):
        whole = getattr(owner, name)

        def call(*args, **more):
            time.sleep(order.random() * 2e-3)
            if name == "hardlink_to" and not links:
                raise OSError(errno.EOPNOTSUPP, "no links here")
            return whole(*args, **more)

        monkeypatch.setattr(owner, name, call)

    for name in ("hardlink_to", "open", "unlink", "mkdir"):
        late(Path, name)
    monkeypatch.setattr(lock, "POLL", 0.001)
    for number in range(12):
        held, all_done = [], threading.Barrier(4)

        def contend(place=tmp_path / str(number), held=held, all_done=all_done):
            with suppress(UserError), lock.output(place):
                held.append(threading.get_ident())
                all_done.wait(20)
                return
            all_done.wait(20)

        if stale:
            lie(tmp_path / f".{number}.lock", started="1")
        threads = [threading.Thread(target=contend) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held) == 1, number
    assert not list(tmp_path.iterdir())


CONTEND = """
import os, random, sys, time
from pathlib import Path
from tanuki_jax.files import lock
from tanuki_jax.errors import UserError
place, order = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
inside, until, had = place / "inside", time.monotonic() + 0.7, 0
while time.monotonic() < until:
    killed = os.fork() if order.random() < 0.4 else None
    try:
        with lock.output(place / "x"):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # two inside: an error
            had += 1
            time.sleep(order.random() * 2e-3)
            inside.unlink()
            if killed == 0:
                os._exit(0)
    except UserError:
        pass
    if killed == 0:
        os._exit(0)
    if killed:
        os.waitpid(killed, 0)
print(had)
"""


def test_processes_that_are_killed_in_turn_never_hold_it_together(tmp_path):
    command = [sys.executable, "-c", CONTEND, str(tmp_path)]
    started = [
        subprocess.Popen([*command, str(n)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    ended = [process.communicate(timeout=60) for process in started]
    assert all("Error" not in err for _, err in ended), ended[0][1]
    assert sum(int(out) for out, _ in ended) > 10 and any("taken over" in err for _, err in ended)


# --- file systems ---------------------------------------------------------------------------------------------------------


def test_without_hard_links_a_new_file_is_the_lock(tmp_path, monkeypatch):
    def none(path, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", none)
    with lock.output(tmp_path / "x"):
        code = "from pathlib import Path; from tanuki_jax.files import lock; "
        code += f"lock.output(Path({str(tmp_path / 'x')!r})).__enter__()"
        found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert f"in use by process {os.getpid()}" in found.stderr
    lie(tmp_path / ".x.lock", started="1")
    with lock.output(tmp_path / "x"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_link_that_was_made_although_the_server_says_that_it_is_there_is_ours(tmp_path, monkeypatch):
    link = Path.hardlink_to

    def asked_twice(path, target):
        link(path, target)
        link(path, target)

    monkeypatch.setattr(Path, "hardlink_to", asked_twice)
    with lock.output(tmp_path / "x"):
        lock.check()


def test_where_only_closing_a_file_tells_that_another_was_faster_it_is_the_others(tmp_path, monkeypatch):
    """As gcsfuse does."""
    opened = Path.open

    class Late:
        def __enter__(self):
            return io.StringIO()

        def __exit__(self, *_):
            lie(tmp_path / ".x.lock", pid=os.getppid(), started=lock._started(os.getppid()))
            raise OSError(errno.ESTALE, "Stale file handle")

    def none(path, target):
        raise OSError(errno.ENOSYS, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", none)
    monkeypatch.setattr(Path, "open", lambda path, mode="r", *a, **k: Late() if mode == "x" else opened(path, mode, *a, **k))
    with pytest.raises(UserError, match=f"in use by process {os.getppid()}"), lock.output(tmp_path / "x"):
        pass


# --- lost -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["removed", "taken over"])
@pytest.mark.parametrize("look", [True, False])
def test_whoever_lost_it_writes_nothing_more(tmp_path, fast, how, look):
    path = tmp_path / ".x.lock"
    with lock.output(tmp_path / "x"):
        files.write_text(tmp_path / "before", "")
        if how == "removed":
            path.unlink()
        else:
            elsewhere(path)
        if not look:
            time.sleep(0.5)  # the thread that renews it has seen it
        with pytest.raises(UserError, match="was removed" if how == "removed" else "was taken over by process 12 on elsewhere"):
            lock.check(look)
        with pytest.raises(UserError), files.atomic_path(tmp_path / "x") as temporary:
            temporary.write_text("")
    assert tree(tmp_path).keys() == ({"before", ".x.lock"} if how == "taken over" else {"before"})


def test_it_is_renewed_until_it_is_given_back(tmp_path, fast):
    path = tmp_path / ".x.lock"
    with lock.output(tmp_path / "x"):
        seen = {path.stat().st_mtime_ns}
        until = time.monotonic() + 10
        while len(seen) < 3 and time.monotonic() < until:
            time.sleep(0.02)
            seen.add(path.stat().st_mtime_ns)
        assert len(seen) == 3
        lock.check()


def test_a_file_system_that_does_not_answer_for_a_while_loses_nothing(tmp_path, fast, monkeypatch):
    with lock.output(tmp_path / "x"):
        with monkeypatch.context() as patched:
            patched.setattr(lock, "_read", lambda path: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale")))
            time.sleep(0.3)
            lock.check()
        lock.check()
    assert not list(tmp_path.iterdir())


def test_a_signal_to_a_fork_does_not_give_back_its_parents_lock(tmp_path):
    then = """
ready, begun = os.pipe()
child = os.fork()
if not child:
    os.write(begun, b".")
    time.sleep(100)
os.read(ready, 1)
os.kill(child, signal.SIGTERM)
assert os.waitpid(child, 0)[1] == signal.SIGTERM
lock.check()
print("still", flush=True)
"""
    with holder(tmp_path / "x", then=then) as process:
        assert process.stdout.readline() == "still\n" and process.wait(20) == 0
