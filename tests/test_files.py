import errno
import fcntl
import json
import os
import platform
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax import files

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


def test_pieces_are_on_the_disk_when_all_are_written(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files.os, "fsync", lambda number: flushed.append(os.fstat(number).st_size))
    with (tmp_path / "file").open("wb") as f:
        for piece in files.written_back(f, (bytes([n]) * 1000 for n in range(50))):
            f.write(piece)
        assert flushed[-1] == 50_000
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([n]) * 1000 for n in range(50))


def test_an_error_while_pieces_are_made_or_written_comes_through(tmp_path):
    def pieces():
        yield b"x"
        raise ValueError("read")

    with (tmp_path / "file").open("wb") as f:
        with pytest.raises(ValueError, match="read"):
            for piece in files.written_back(f, pieces()):
                f.write(piece)
        with pytest.raises(ValueError, match="write"):
            for _ in files.written_back(f, [b"x", b"y"]):
                raise ValueError("write")
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


@pytest.mark.parametrize("pieces", [1, 50])
def test_a_disk_that_fails_while_pieces_are_written_is_an_error(tmp_path, monkeypatch, pieces):
    """The kernel tells of it once, to whoever asks first."""
    left = [OSError(errno.EIO, "Input/output error")]

    def fails(number):
        if left:
            raise left.pop()

    monkeypatch.setattr(files.os, "fdatasync", fails, raising=False)
    with (tmp_path / "file").open("wb") as f, pytest.raises(OSError, match="Input/output"):
        for piece in files.written_back(f, [b"x"] * pieces):
            f.write(piece)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="room is reserved by glibc's fallocate64")
def test_room_on_the_disk_is_taken_or_refused_at_once(tmp_path):
    with (tmp_path / "a").open("wb") as f:
        files.reserve(f, 1 << 20)
        if not os.fstat(f.fileno()).st_size:
            pytest.skip("this file system reserves nothing")
        assert os.fstat(f.fileno()).st_blocks * 512 >= 1 << 20
        with pytest.raises(OSError) as found:
            files.reserve(f, 1 << 60)
    assert found.value.errno in (errno.ENOSPC, errno.EFBIG) and found.value.filename == f.name


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 9000) | st.sampled_from([files.PIECE - 1, files.PIECE, files.PIECE + 4097]), max_size=4))
def test_what_goes_past_the_page_cache_is_what_was_appended(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("direct") / "file"
    pieces = [os.urandom(size) for size in sizes]
    with files.direct(path, sum(sizes)) as append:
        for piece in pieces:
            append(memoryview(piece))
    assert path.read_bytes() == b"".join(pieces)


@pytest.mark.parametrize("refuses", ["open", "write"])
def test_a_file_system_that_knows_no_direct_writes_takes_others(tmp_path, monkeypatch, refuses):
    real = {name: getattr(os, name) for name in ("open", "write")}
    direct = set()

    def opened(path, flags, *more):
        if flags & files.O_DIRECT and refuses == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        number = real["open"](path, flags, *more)
        if flags & files.O_DIRECT:
            direct.add(number)
        return number

    def written(number, data):
        if refuses == "write" and number in direct and fcntl.fcntl(number, fcntl.F_GETFL) & files.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real["write"](number, data[:5000])  # as a system call may

    monkeypatch.setattr(files.os, "open", opened)
    monkeypatch.setattr(files.os, "write", written)
    content = os.urandom(20_001)
    with files.direct(tmp_path / "file", len(content)) as append:
        append(memoryview(content))
    assert (tmp_path / "file").read_bytes() == content


def test_a_disk_without_room_says_so_past_the_page_cache_too(tmp_path, monkeypatch):
    def full(number, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(OSError, match="No space left"), files.direct(tmp_path / "file", 3) as append:
        append(memoryview(b"abc"))
