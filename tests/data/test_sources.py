import gzip
import json
import os

import pytest

from tanuki_jax.data import sources
from tanuki_jax.errors import UserError

ROWS = [{"text": "狸\n山"}, {"text": "moon", "meta": {"n": 1}}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ZIPPED = gzip.compress(JSONL * 500, mtime=0)


def read(patterns):
    rows = list(sources.read_rows(str(patterns)))
    for row in rows:
        sources.kind_of(row)
    return rows


def test_a_text_file_is_one_document_read_to_the_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("一行目\r\n\n二行目 ".encode())
    assert [row[:2] for row in read(path)] == [(str(path), {"text": "一行目\r\n\n二行目 "})]


@pytest.mark.parametrize(("name", "data"), [("a.jsonl", JSONL), ("a.jsonl.gz", gzip.compress(JSONL))], ids=["plain", "gzip"])
def test_lines_are_rows_with_their_line_numbers(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert [row[:2] for row in read(tmp_path / name)] == [(f"{tmp_path / name}:{n}", row) for n, row in enumerate(ROWS, 1)]


def test_blank_lines_are_skipped_but_counted_and_the_last_needs_no_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\n \r\n{"text": "b"}')
    assert [row.where for row in read(path)] == [f"{path}:2", f"{path}:4"]


def test_a_line_ends_at_a_newline_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert [row.fields["text"] for row in read(path)] == ["a\u2028b\u0085c"]


def test_globs_and_lists_name_files_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", "d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "d.jsonl" else name)
    found = [row.fields["text"] for row in read(f"{tmp_path}/d.jsonl,{tmp_path}/*.txt,{tmp_path}/deep/**/*.txt")]
    assert found == ["a.txt", "b.txt", "deep/c.txt"]


def test_the_bytes_read_grow_to_the_size_of_all_files(tmp_path):
    for name, data in (("a.jsonl", JSONL * 500), ("b.jsonl.gz", ZIPPED), ("c.txt", b"abc")):
        (tmp_path / name).write_bytes(data)
    found = [row.bytes_read for row in read(f"{tmp_path}/*")]
    assert found == sorted(found) and found[-1] == sources.total_bytes(f"{tmp_path}/*") == len(JSONL * 500) + len(ZIPPED) + 3


BAD = {
    "no text": ("a.jsonl", b'{"text": "a"}\n{"title": "b"}\n', r"a\.jsonl:2.*title"),
    "text not a string": ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1"),
    "not JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl:3.*not JSON"),
    "not an object": ("a.jsonl", b'["a"]\n', r"a\.jsonl:1.*list"),
    "huge number": ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", r"a\.jsonl:1"),
    "not UTF-8 in a line": ("a.jsonl", b'{"text": "a"}\n{"text": "\x83\x5c"}\n', r"a\.jsonl:2.*UTF-8 at byte 10"),
    "not UTF-8 in a text": ("a.txt", "狸".encode("cp932"), r"a\.txt.*UTF-8 at byte 0"),
    "not gzip": ("a.jsonl.gz", JSONL, r"a\.jsonl\.gz.*gzip"),
    "gzip cut short": ("a.jsonl.gz", ZIPPED[:-9], r"a\.jsonl\.gz.*gzip"),
    "gzip with a wrong checksum": ("a.jsonl.gz", ZIPPED[:-8] + b"\0" * 4 + ZIPPED[-4:], r"a\.jsonl\.gz.*gzip"),
    "gzip with wrong bytes inside": ("a.jsonl.gz", ZIPPED[:12] + b"\xff" * 8 + ZIPPED[20:], r"a\.jsonl\.gz.*gzip"),
    "another suffix": ("a.csv", b"text\na\n", r"a\.csv is none of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_that_names_the_file_and_the_line(tmp_path, case):
    name, data, message = BAD[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_pattern_that_matches_nothing_is_an_error_even_beside_one_that_does(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"no such file.*missing\*\.txt"):
        read(f"{tmp_path}/a.txt,{tmp_path}/missing*.txt")
    with pytest.raises(UserError, match="no input files"):
        read("")


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"text": "a", "id": 1}, "text"),
        ({"messages": [], "meta": {}}, "dialogue"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pair"),
    ],
)
def test_the_fields_of_a_row_say_its_kind(fields, kind):
    assert sources.kind_of(sources.Row("x:1", fields)) == kind


def test_the_identity_of_files_changes_with_their_size_their_time_and_their_names(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    os.utime(path, ns=(0, 0))
    seen = [sources.identity(str(path))]
    assert sources.identity(str(path)) == seen[0]
    os.utime(path, ns=(0, 1))
    seen.append(sources.identity(str(path)))
    path.write_text("ab")
    os.utime(path, ns=(0, 1))
    seen.append(sources.identity(str(path)))
    seen.append(sources.identity(str(path.rename(tmp_path / "b.txt"))))
    assert len(set(seen)) == 4
