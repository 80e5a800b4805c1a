import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tanuki_jax.data import paths, sources
from tanuki_jax.errors import UserError

ROWS = [{"text": "狸\n山"}, {"text": "moon", "meta": {"n": 1}}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ZIPPED = gzip.compress(JSONL * 500, mtime=0)
quick = settings(max_examples=40, deadline=None)


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
    assert found == sorted(found) and found[-1] == len(JSONL * 500) + len(ZIPPED) + 3


INVALID = {
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


@pytest.mark.parametrize("case", INVALID)
def test_bad_input_is_an_error_that_names_the_file_and_the_line(tmp_path, case):
    name, data, message = INVALID[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


# --- bad rows that are reported ---------------------------------------------------------------------------------------------

BAD_LINES = {
    b"moon": "is not JSON",
    b'{"body": "\x83\x5c"}': "is not valid UTF-8 at byte 10",
    b'["a"]': "must be a JSON object",
    b'{"body": "\\ud800"}': "half a surrogate pair",
    b'{"body": ' + b"[" * 100_000 + b"}": "is not JSON",
    b'{"title": "a"}': "has no text in 'body' (fields: title)",
    b'{"body": 5}': "has no text in 'body'",
}
BODY = sources.Fields("body")


def whole(*paths):
    return sources.Part(tuple(map(str, paths)), 0, sources.WHOLE, 1)


def reported(part, fields=sources.PLAIN, skip=0):
    """The texts of the rows, None for a bad one, and what was reported of those."""
    bad = []
    rows = list(sources.read_part(part, fields, lambda *told: bad.append(told), skip))
    return [row and row.fields["text"] for row in rows], bad


def test_a_bad_line_is_reported_once_and_none_takes_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b'\n{"body": "%d"}\n%s\n' % (i, line) for i, line in enumerate(BAD_LINES)))
    rows, bad = reported(whole(path), BODY)
    assert rows == [text for i in range(len(BAD_LINES)) for text in (str(i), None)]
    assert [where for where, _ in bad] == [f"{path}:{3 * i + 3}" for i in range(len(BAD_LINES))]
    for (_, reason), start in zip(bad, BAD_LINES.values(), strict=True):
        assert reason.startswith(start) or start in reason
        assert str(path) not in reason and not reason.startswith(("data", ":", " "))
    with pytest.raises(UserError, match=r"a\.jsonl:3 is not JSON"):
        list(sources.read_part(whole(path), BODY))
    assert [row.fields["text"] for row in sources.read_rows(str(path), BODY, lambda *told: None)] == list("0123456")


def test_a_bad_line_of_a_part_is_named_by_its_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL + b"moon\n")
    rows, bad = reported(sources.Part((str(path),), 5, len(JSONL) + 5, 1))
    assert rows == ["moon", None] and [where for where, _ in bad] == [f"{path}, byte {len(JSONL)}"]


DAMAGED = {
    "a.jsonl.gz": ZIPPED[:-9],
    "b.jsonl.gz": JSONL,
    "a.parquet": b"PAR1" + JSONL,
    "a.txt": b"\xff",
    "a.jsonl": JSONL + b"moon\n" + JSONL,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_gives_what_came_before_and_is_reported_once(tmp_path, name):
    (tmp_path / name).write_bytes(DAMAGED[name])
    (tmp_path / "z.jsonl").write_bytes(JSONL)
    good = ROWS * {"a.jsonl.gz": 500, "a.jsonl": 2}.get(name, 0)
    rows, bad = reported(whole(tmp_path / name, tmp_path / "z.jsonl"))
    assert rows.count(None) == len(bad) == 1 and bad[0][0].startswith(str(tmp_path / name))
    assert [text for text in rows if text is not None][-2:] == [row["text"] for row in ROWS]
    assert len(rows) <= len(good) + 3 and set(rows) <= {None, *(row["text"] for row in ROWS)}


@pytest.mark.parametrize("name", DAMAGED)
def test_skip_passes_over_exactly_that_many_records_and_what_they_reported(tmp_path, name):
    (tmp_path / name).write_bytes(DAMAGED[name])
    (tmp_path / "z.jsonl").write_bytes(JSONL + b"moon\n" + JSONL)
    part = whole(tmp_path / name, tmp_path / "z.jsonl", tmp_path / "z.jsonl")
    rows, bad = reported(part)
    for skip in {*range(4), *range(max(0, len(rows) - 8), len(rows) + 2)}:  # the damage is among the last eight rows
        remaining, reports = reported(part, skip=skip)
        assert remaining == rows[skip:] and reports == bad[len(bad) - remaining.count(None) :]


# --- parts ------------------------------------------------------------------------------------------------------------------


def in_parts(patterns, part_bytes, fields=sources.PLAIN):
    parts = sources.parts(str(patterns), part_bytes)
    assert parts == sources.parts(str(patterns), part_bytes)
    assert sum(part.size for part in parts) <= sum(map(paths.bytes_of, sources.matching_files(str(patterns))))
    return [list(sources.read_part(part, fields)) for part in parts]


def check_parts(patterns, part_bytes):
    """The rows of all parts in order are the rows, each is named once, and skipping goes on anywhere in a part."""
    parts = in_parts(patterns, part_bytes)
    expected = list(sources.read_rows(str(patterns)))
    rows = [row for part in parts for row in part]
    assert [row.fields for row in rows] == [row.fields for row in expected]
    assert len({row.where for row in rows}) == len(rows)
    for part, found in zip(sources.parts(str(patterns), part_bytes), parts, strict=True):
        skip = len(found) // 2
        assert list(sources.read_part(part, skip=skip)) == found[skip:]
    return parts


LINE = st.text(st.characters(exclude_characters="\0\x1b", exclude_categories=["Cs"]), max_size=8).map(
    lambda text: json.dumps({"text": text}, ensure_ascii=False)
) | st.sampled_from(["", " ", "\r", "\t "])
LINES = st.lists(LINE, max_size=12)


@quick
@given(st.lists(st.tuples(LINES, st.booleans()), min_size=1, max_size=3), st.integers(1, 120))
@example([(['{"text": "狸"}'] * 3, True)], 1)
def test_parts_of_lines_lose_and_repeat_no_row_wherever_they_are_cut(tmp_path_factory, contents, part_bytes):
    folder = tmp_path_factory.mktemp("rows")
    for i, (lines, ended) in enumerate(contents):
        (folder / f"{i}.jsonl").write_bytes("\n".join([*lines, *[""] * ended]).encode())
    check_parts(folder / "*.jsonl", part_bytes)


@pytest.mark.parametrize("part_bytes", [1, 300, 1000, 1 << 40])
def test_parts_of_parquet_are_row_groups(tmp_path, part_bytes):
    table = pyarrow.table({"text": [f"狸{i}" for i in range(30)]})
    for name, group in (("a", 4), ("b", 1), ("c", 100)):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=group)
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "d.parquet")
    parts = check_parts(tmp_path / "*", part_bytes)
    if part_bytes == 1:
        assert [len(part) for part in parts] == [4] * 7 + [2] + [1] * 30 + [30, 0]
    if part_bytes == 1 << 40:
        assert len(parts) == 1


@pytest.mark.parametrize("part_bytes", [1, 10_000, 100_000, 1 << 40])
def test_parts_of_array_record_are_ranges_of_records(tmp_path, part_bytes):
    for name, count in (("a", 300), ("b", 1), ("c", 0)):
        writer = ArrayRecordWriter(str(tmp_path / f"{name}.arrayrecord"), "group_size:1")
        for i in range(count):
            writer.write(json.dumps({"text": f"狸{i}"}).encode())
        writer.close()
    parts = check_parts(tmp_path / "*", part_bytes)
    if part_bytes <= 10_000:
        assert max(map(len, parts)) <= 300 / 10


def test_files_that_are_read_whole_share_parts_up_to_their_size(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * 100)
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(JSONL * 20, mtime=0))
    parts = sources.parts(f"{tmp_path}/*.txt", 350)
    assert [len(part.paths) for part in parts] == [3, 3, 3, 1] and [part.size for part in parts] == [300] * 3 + [100]
    assert [path for part in parts for path in part.paths] == sources.matching_files(f"{tmp_path}/*.txt")
    assert [len(part.paths) for part in sources.parts(f"{tmp_path}/*.gz", 1)] == [1] * 10
    assert check_parts(tmp_path / "*", 350)


@pytest.mark.parametrize(
    ("fields", "language"),
    [(sources.Fields(), ""), (sources.Fields(language="lang"), "ja"), (sources.Fields("meta.body", "meta.tag"), "en")],
)
def test_the_language_of_a_row_is_the_field_that_is_named(tmp_path, fields, language):
    row = {"text": "a", "lang": "ja", "meta": {"body": "b", "tag": "en"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + '\n{"text": "c", "lang": 5, "meta": {"body": "d", "tag": null}}\n')
    rows = list(sources.read_rows(f"{tmp_path}/a.jsonl", fields))
    assert [row.language for row in rows] == [language, ""]
    assert [row.fields["text"] for row in rows] == (["b", "d"] if fields.text == "meta.body" else ["a", "c"])


def test_a_folder_that_is_no_dataset_is_an_error_that_says_what_to_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    with pytest.raises(UserError, match=rf"{tmp_path} is a directory.*{tmp_path}/\*\.jsonl for example"):
        read(tmp_path)


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
