import errno
import fcntl
import functools
import json
import os
import platform
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax import files
from tanuki_jax.files import direct_io, disk

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_an_error_leaves_the_old_directory_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(KeyError), files.atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "half").touch()
        raise KeyError
    assert names(path) == ["old"] and names(tmp_path) == ["a"]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    for name in ("a[1]", ".a[1].0123abcd.tmp", ".a[1].mine.tmp", ".a1.0123abcd.tmp", ".b.0123abcd.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    (tmp_path / ".a[1].ffffffff.tmp").touch()
    files.remove_unfinished(tmp_path / "a[1]")
    assert names(tmp_path) == [".a1.0123abcd.tmp", ".a[1].mine.tmp", ".b.0123abcd.tmp", "a[1]"]


def test_a_directory_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "a"
    for name in ("one", "two"):
        with files.atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
            assert not (path / name).exists()
    assert names(path) == ["two"] and names(path.parent) == ["a"]


def test_a_row_that_cannot_be_written_leaves_no_jsonl(tmp_path):
    with pytest.raises(TypeError):
        files.write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, {"a": object()}])
    assert names(tmp_path) == []


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(JSON, max_size=5))
def test_jsonl_comes_back_line_by_line(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    assert files.write_jsonl(path, rows) == len(rows)
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == rows


def test_json_keeps_japanese_readable(tmp_path):
    files.write_json(tmp_path / "a.json", {"名前": "狸"})
    assert "狸" in (tmp_path / "a.json").read_text(encoding="utf-8")


@settings(max_examples=50, deadline=None)
@given(a=st.lists(JSON, max_size=3), b=st.lists(JSON, max_size=3))
def test_fingerprints_are_equal_exactly_where_the_values_are(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (files.fingerprint(*a) == files.fingerprint(*b)) == same
    assert files.fingerprint(*a) == files.fingerprint(*json.loads(json.dumps(a)))


def test_a_fingerprint_knows_no_order_of_keys_but_that_of_values():
    assert files.fingerprint({"a": 1, "b": 2}) == files.fingerprint({"b": 2, "a": 1})
    assert files.fingerprint("a", "b") != files.fingerprint("b", "a") != files.fingerprint("ba")


def test_a_file_counts_by_its_content_alone(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"x" * (1 << 21))
    two.write_bytes(one.read_bytes())
    assert files.fingerprint(one) == files.fingerprint(two)
    two.write_bytes(b"x" * (1 << 21) + b"y")
    assert files.fingerprint(one) != files.fingerprint(two)


def test_what_is_done_ahead_comes_in_order_and_no_more_than_asked_for():
    begun, used = [], 0

    def call(number):
        begun.append(number)
        time.sleep(0.001 * (number % 3))
        return number

    for found in files.prefetch((functools.partial(call, number) for number in range(30)), 2, 2):
        assert found == used and max(begun) <= used + 2
        used += 1
    assert used == 30


def test_what_is_not_wanted_any_more_is_not_begun():
    begun = []
    results = files.prefetch((functools.partial(begun.append, number) for number in range(9)), 2, 1)
    next(results)
    results.close()
    assert len(begun) <= 3


def test_an_error_among_what_is_done_ahead_comes_in_its_turn_and_leaves_no_thread():
    def fails():
        raise ValueError("the second")

    results = files.prefetch([lambda: 1, fails, lambda: 3], 1, 1)
    assert next(results) == 1
    with pytest.raises(ValueError, match="the second"):
        next(results)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("size", [3, 20 * files.PIECE])
def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch, call, size):
    """The kernel tells of it once, to whoever asks first."""
    left, real = [OSError(errno.EIO, "Input/output error")], getattr(os, call)

    def fails(*arguments):
        if left:
            raise left.pop()
        return real(*arguments)

    monkeypatch.setattr(direct_io.os, call, fails)
    with pytest.raises(OSError, match="Input/output"), files.direct_writer(tmp_path / "file", size) as append:
        append(memoryview(bytes(size)))
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_an_error_of_who_appends_comes_through(tmp_path):
    with pytest.raises(ValueError, match="read"), files.direct_writer(tmp_path / "file", 3) as append:
        append(memoryview(b"abc"))
        raise ValueError("read")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the kernel takes no advice")
def test_what_is_read_soon_is_all_of_the_files_small_ones_first_up_to_a_limit(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        direct_io.os, "posix_fadvise", lambda number, at, size, _: asked.append((os.fstat(number).st_size, at, size))
    )
    monkeypatch.setattr(direct_io, "READAHEAD_BYTES", 3 * direct_io.ADVICE)
    sizes = dict(large=direct_io.ADVICE + 5, small=7, larger=5 * direct_io.ADVICE)
    for name, size in sizes.items():
        with (tmp_path / name).open("wb") as f:
            f.truncate(size)
    direct_io._advise([tmp_path / name for name in sizes])
    assert [size for size, at, _ in asked if at == 0] == [7, direct_io.ADVICE + 5, 5 * direct_io.ADVICE]
    assert sum(min(size, at + step) - at for size, at, step in asked if size != sizes["larger"]) == direct_io.ADVICE + 12
    assert len([at for size, at, _ in asked if size == sizes["larger"]]) == 2
    direct_io._advise([tmp_path / "gone"])  # of which nobody hears
    assert (tmp_path / "small").read_bytes() == bytes(7)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="room is reserved by glibc's fallocate64")
def test_room_on_the_disk_is_taken_or_refused_at_once(tmp_path):
    with (tmp_path / "a").open("wb") as f:
        disk.reserve(f, 1 << 20)
        if not os.fstat(f.fileno()).st_size:
            pytest.skip("this file system reserves nothing")
        assert os.fstat(f.fileno()).st_blocks * 512 >= 1 << 20
        with pytest.raises(OSError) as found:
            disk.reserve(f, 1 << 60)
    assert found.value.errno in (errno.ENOSPC, errno.EFBIG) and found.value.filename == f.name


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 9000) | st.sampled_from([files.PIECE - 1, files.PIECE, files.PIECE + 4097]), max_size=6))
def test_what_goes_past_the_page_cache_is_what_was_appended(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("direct") / "file"
    pieces = [os.urandom(size) for size in sizes]
    with files.direct_writer(path, sum(sizes)) as append:
        for piece in pieces:
            append(memoryview(piece))
    assert path.read_bytes() == b"".join(pieces)


@pytest.mark.parametrize("refuses", ["open", "write"])
def test_a_file_system_that_knows_no_direct_writes_takes_others(tmp_path, monkeypatch, refuses):
    real = {name: getattr(os, name) for name in ("open", "pwrite")}
    direct = set()

    def opened(path, flags, *more):
        if flags & direct_io.O_DIRECT and refuses == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        number = real["open"](path, flags, *more)
        if flags & direct_io.O_DIRECT:
            direct.add(number)
        return number

    def written(number, data, at):
        if refuses == "write" and number in direct and fcntl.fcntl(number, fcntl.F_GETFL) & direct_io.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real["pwrite"](number, data[:5000], at)  # as a system call may

    monkeypatch.setattr(direct_io.os, "open", opened)
    monkeypatch.setattr(direct_io.os, "pwrite", written)
    content = os.urandom(2 * files.PIECE + 20_001)
    with files.direct_writer(tmp_path / "file", len(content)) as append:
        append(memoryview(content))
    assert (tmp_path / "file").read_bytes() == content


def test_a_disk_without_room_says_so_past_the_page_cache_too(tmp_path, monkeypatch):
    def full(number, data, at):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_io.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"), files.direct_writer(tmp_path / "file", 3) as append:
        append(memoryview(b"abc"))
