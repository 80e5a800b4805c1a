"""What is not UTF-8 text is an error that says what it seems to be, in every format."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from tanuki_jax.data import encodings, sources
from tanuki_jax.errors import UserError

TEXT = "これは日本語の文章です。漢字も仮名もあります。"
LINE = json.dumps({"text": TEXT}, ensure_ascii=False)


def texts(path):
    return [row.fields["text"] for row in sources.read_rows(str(path))]


def write_zstd(path, data):
    with pyarrow.CompressedOutputStream(str(path), "zstd") as f:
        f.write(data)


WRITERS = {
    "a.jsonl": lambda path, data: path.write_bytes(data),
    "a.jsonl.gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    "a.jsonl.zst": write_zstd,
    "a.txt": lambda path, data: path.write_bytes(data),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_byte_order_mark_begins_no_text(tmp_path, name):
    lines = 1 if name == "a.txt" else 2
    content = "first" if name == "a.txt" else '{"text": "first"}\n{"text": "\ufeffsecond"}\n'
    WRITERS[name](tmp_path / name, f"\ufeff{content}".encode())
    assert texts(tmp_path / name) == ["first", "\ufeffsecond"][:lines]


ENCODED = {
    "utf-16": "UTF-16",
    "utf-32": "UTF-32",
    "utf-16-le": "UTF-16LE",
    "utf-16-be": "UTF-16BE",
    "cp932": "CP932",
    "euc_jp": "EUC-JP",
    "iso2022_jp": "ISO-2022-JP",
}


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_japanese_in_another_encoding_is_an_error_that_says_which(tmp_path, name, encoding):
    WRITERS[name](tmp_path / name, (TEXT if name == "a.txt" else LINE).encode(encoding))
    with pytest.raises(UserError, match=rf"{name}.*iconv -f ") as caught:
        texts(tmp_path / name)
    if name == "a.txt" or encoding not in ("utf-16-le", "utf-16-be"):
        assert f"iconv -f {ENCODED[encoding]} -t UTF-8" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16"])
def test_plain_text_in_utf_16_is_valid_utf_8_and_an_error(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("hello there".encode(encoding))
    with pytest.raises(UserError, match=rf"a\.txt.*iconv -f UTF-16{encoding[7:].upper()} "):
        texts(tmp_path / "a.txt")


def write_rows(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(path), table.schema) as f:
            f.write_table(table)
    elif path.suffix == ".arrayrecord":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(json.dumps(row).encode())
        writer.close()
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("bad", ["a\0b", "\x1b$B4A;z\x1b(B", "\x1b[31mred"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow", "a.arrayrecord"])
def test_nul_and_escape_are_reported_in_texts_and_in_messages_of_every_format(tmp_path, name, bad):
    path = tmp_path / name
    conversations = [[{"role": "user", "content": text}, {"role": "assistant", "content": "b"}] for text in ("a", bad, "c")]
    for rows in ([{"text": text} for text in ("a", bad, "c")], [{"messages": messages} for messages in conversations]):
        write_rows(path, rows)
        reported: list[tuple[str, str]] = []
        part = sources.Part((str(path),), 0, sources.WHOLE, 1)
        found = list(sources.read_part(part, on_bad_row=lambda *told, into=reported: into.append(told)))
        assert [row is not None for row in found] == [True, False, True]
        [(where, reason)] = reported
        assert name in where and ("NUL" in reason or "ESC" in reason)


def test_what_is_wrong_with_a_string_is_said_or_nothing():
    assert encodings.problem("狸\n\t🦝\u200d") == encodings.problem("") == ""
    assert "NUL character at 1" in encodings.problem("a\0" + "b" * 10)


def write_bad_parquet(path, nested):
    """A column of strings whose second is no UTF-8: pyarrow writes it, and cannot make a Python string of it."""
    column = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [None, pyarrow.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 6, 0, 0, 0])), pyarrow.py_buffer(b"ok\xff\xfego")],
    )
    if nested:
        roles = pyarrow.array(["user"] * 3)
        turns = pyarrow.StructArray.from_arrays([roles, column], ["role", "content"])
        column = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2, 3], pyarrow.int32()), turns)
    table = pyarrow.table({"messages" if nested else "text": column})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as f:
            f.write_table(table)


@pytest.mark.parametrize("nested", [False, True], ids=["text", "messages"])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_string_column_that_is_no_utf_8_is_one_bad_row(tmp_path, name, nested):
    write_bad_parquet(tmp_path / name, nested)
    with pytest.raises(UserError, match=rf"{name}, row 1 is not valid UTF-8"):
        list(sources.read_rows(str(tmp_path / name)))
    assert len(list(sources.read_rows(str(tmp_path / name), on_bad_row=sources.skip_silently))) == 2


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_column_that_is_there_twice_is_an_error_that_names_it(tmp_path, name):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_stream(str(tmp_path / name), table.schema) as f:
            f.write_table(table)
    with pytest.raises(UserError, match=rf"{name} has two columns 'text'"):
        texts(tmp_path / name)


def test_both_of_arrows_formats_are_read(tmp_path):
    table = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as f:
        f.write_table(table)
    assert texts(tmp_path / "a.arrow") == ["a", "b"]


@pytest.mark.parametrize("line", ['{"text": "a", "text": "b"}', '{"text": "a", "meta": {"n": 1, "n": 2}}'])
def test_a_key_that_stands_twice_is_an_error_that_names_it(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2 has the key '(text|n)' twice"):
        texts(tmp_path / "a.jsonl")
