"""Rows are whole or not there."""

import errno
import os

import pytest

from tanuki_jax.endpoint.log import AnswerLog, LineLog

ROWS = [{"id": f"{number:016x}", "text": "狸" * number} for number in range(1, 6)]


@pytest.fixture
def path(tmp_path):
    log = AnswerLog(tmp_path / "answers.jsonl")
    for row in ROWS:
        log.append(row)
    log.close()
    return tmp_path / "answers.jsonl"


def load(path):
    log = AnswerLog(path)
    rows = list(log.load())
    return log, rows


def test_rows_are_found_by_id(path):
    log, rows = load(path)
    assert rows == ROWS and len(log) == 5
    assert [log.get(row["id"]) for row in ROWS[::-1]] == ROWS[::-1]
    assert log.get("00000000000000ff") is None
    log.append({"id": "00000000000000ff", "text": "new"})
    assert log.get("00000000000000ff")["text"] == "new" and log.get(ROWS[0]["id"]) == ROWS[0]


@pytest.mark.parametrize("cut", [1, 2, 5, 30])
def test_a_torn_last_line_is_cut_off_and_its_row_written_again(path, cut):
    whole = path.read_bytes()
    os.truncate(path, len(whole) - cut)  # in the middle of a character, too
    log, rows = load(path)
    assert rows == ROWS[:-1]
    log.append(ROWS[-1])
    assert path.read_bytes() == whole


def test_a_file_that_is_one_torn_line(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 200_000)
    assert list(LineLog(tmp_path / "a").rows()) == []
    assert (tmp_path / "a").stat().st_size == 0


def test_damaged_lines_are_left_out(path, caplog):
    path.write_bytes(path.read_bytes() + b"\0\0\0\0\n{}\n[1]\n")
    log, rows = load(path)
    assert rows == ROWS
    assert "damaged" in caplog.text


def test_the_first_of_two_rows_of_a_job_counts(path):
    path.write_bytes(path.read_bytes() + b'{"id": "0000000000000001", "text": "second"}\n')
    log, rows = load(path)
    assert rows == ROWS and log.get(ROWS[0]["id"]) == ROWS[0]


def test_a_full_disk_leaves_no_part_of_a_row(path, monkeypatch):
    log, _ = load(path)
    whole, write = path.read_bytes(), os.write

    def half(file, data):
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        log.append({"id": "00000000000000ff", "text": "new" * 30})
    assert path.read_bytes() == whole
    monkeypatch.undo()
    assert log.get("00000000000000ff") is None


def test_a_write_that_is_cut_short_goes_on(path, monkeypatch):
    log, _ = load(path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    log.append({"id": "00000000000000ff", "text": "new"})
    assert log.get("00000000000000ff")["text"] == "new"
