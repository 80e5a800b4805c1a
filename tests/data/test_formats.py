import gzip
import json
import struct

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_generated_pb2

from tanuki_jax.data import paths, sources
from tanuki_jax.errors import UserError

TEXTS = ["狸\n山", "moon", " \u2028 ", "か\u3099" * 50, 'a "quoted"\tline\r\n', "🦝", *(f"row {i}" for i in range(300))]
ROWS = [{"text": text, "id": i, "meta": {"body": f"body {i}", "lang": "ja" if i % 2 else "en"}} for i, text in enumerate(TEXTS)]


def lines_of(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def example(row):
    """A tf.train.Example with the text, and features that no one reads."""
    message = tf_example_generated_pb2.Example()
    message.features.feature["text"].bytes_list.value.append(row["text"].encode())
    message.features.feature["id"].int64_list.value.append(row["id"])
    message.features.feature["tags"].bytes_list.value.extend([b"a", b"b"])
    return message.SerializeToString()


def write_jsonl(path, rows):
    path.write_bytes(lines_of(rows))


def write_gzip(path, rows):
    path.write_bytes(gzip.compress(lines_of(rows)))


def write_zstd(path, rows):
    with pyarrow.CompressedOutputStream(str(path), "zstd") as f:
        f.write(lines_of(rows))


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)


def write_arrow(path, rows):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(str(path), table.schema) as f:
        f.write_table(table, max_chunksize=100)


def write_array_record(path, rows, encode=lambda row: json.dumps(row).encode()):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(encode(row))
    writer.close()


def write_examples(path, rows):
    write_array_record(path, rows, example)


FORMATS = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gzip,
    "a.jsonl.zst": write_zstd,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
    "a.arrayrecord": write_array_record,
    "a.array_record": write_examples,
}
NESTED = [name for name in FORMATS if name != "a.array_record"]
READ_BY_FSSPEC = [name for name in FORMATS if "array" not in name]
CHECKED = [name for name in FORMATS if name != "a.jsonl"]  # formats that say where they end


def texts(patterns, fields=sources.PLAIN):
    return [row.fields["text"] for row in sources.read_rows(str(patterns), fields)]


@pytest.fixture
def memory():
    """A folder of fsspec's in-memory file system."""
    system = fsspec.filesystem("memory")
    yield "memory://corpus"
    system.rm("/corpus", recursive=True)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_rows_that_were_written(tmp_path, name):
    FORMATS[name](tmp_path / name, ROWS)
    rows = list(sources.read_rows(str(tmp_path / name)))
    assert [row.fields["text"] for row in rows] == TEXTS
    assert {sources.kind_of(row) for row in rows} == {"text"}
    assert len({row.where for row in rows}) == len(rows) and all(str(tmp_path / name) in row.where for row in rows)
    read = [row.bytes_read for row in rows]
    assert read == sorted(read) and 0 < read[-1] <= (tmp_path / name).stat().st_size == paths.bytes_of(str(tmp_path / name))


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_without_rows_is_no_error(tmp_path, name):
    if name in ("a.parquet", "a.arrow"):
        table = pyarrow.Table.from_pylist(ROWS).slice(0, 0)
        if name == "a.parquet":
            pyarrow.parquet.write_table(table, tmp_path / name)
        else:
            pyarrow.ipc.new_stream(str(tmp_path / name), table.schema).close()
    else:
        FORMATS[name](tmp_path / name, [])
    assert texts(tmp_path / name) == []


@pytest.mark.parametrize("name", NESTED)
def test_names_with_dots_are_nested_fields_in_every_format(tmp_path, name):
    FORMATS[name](tmp_path / name, ROWS)
    rows = list(sources.read_rows(str(tmp_path / name), sources.Fields("meta.body", "meta.lang")))
    assert [(row.fields["text"], row.language) for row in rows] == [(row["meta"]["body"], row["meta"]["lang"]) for row in ROWS]
    assert {row.language for row in sources.read_rows(str(tmp_path / name), sources.Fields(language="meta.none"))} == {""}


@pytest.mark.parametrize("name", FORMATS)
def test_a_field_that_is_not_there_is_an_error_that_names_it_and_the_row(tmp_path, name):
    FORMATS[name](tmp_path / name, ROWS)
    with pytest.raises(UserError, match=rf"{name}.* has no text in 'meta.title' \(fields: .*\)"):
        texts(tmp_path / name, sources.Fields("meta.title"))


def test_bytes_are_text_where_a_column_holds_them(tmp_path):
    table = pyarrow.table({"text": [text.encode() for text in TEXTS]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == TEXTS
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"a", "狸".encode("cp932")]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1 is not valid UTF-8 at byte 0"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "狸"}]}] * 3,
        [{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}] * 3,
    ],
    ids=["dialogue", "pair"],
)
@pytest.mark.parametrize("name", NESTED)
def test_dialogues_and_pairs_come_from_every_format_that_nests(tmp_path, name, rows):
    FORMATS[name](tmp_path / name, rows)
    assert [row.fields for row in sources.read_rows(str(tmp_path / name))] == rows


@pytest.mark.parametrize("name", ["a.arrayrecord", "a.array_record"])
def test_an_example_of_any_length_is_one(tmp_path, name):
    """One whose features take 123 bytes begins with a newline and a brace, as JSON may."""
    rows = [{"text": "x" * n, "id": n} for n in range(60, 160)]
    assert any(example(row)[:2] == b"\n{" for row in rows)
    write_array_record(tmp_path / name, rows, example)
    assert texts(tmp_path / name) == [row["text"] for row in rows]
    write_array_record(tmp_path / name, rows, lambda row: b"\n" + json.dumps(row).encode())
    assert texts(tmp_path / name) == [row["text"] for row in rows]


# --- folders ------------------------------------------------------------------------------------------------------------------


def save_to_disk(folder, rows, count=2):
    """A folder as Hugging Face datasets writes it: Arrow streams and state.json, which says their order."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{count:05d}.arrow" for i in range(count)]
    for i, name in enumerate(names):
        write_arrow(folder / name, rows[len(rows) * i // count : len(rows) * (i + 1) // count])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_folder_that_hugging_face_datasets_saved_is_its_rows_in_order(tmp_path):
    save_to_disk(tmp_path / "corpus", ROWS, 12)
    write_arrow(tmp_path / "corpus" / "cache-1.arrow", ROWS[:1])  # a cache of map(), which is none of the dataset
    assert texts(tmp_path / "corpus") == texts(f"{tmp_path}/corp*") == TEXTS


@pytest.mark.parametrize(
    ("splits", "read"), [(["train", "test"], "train"), (["test", "train"], "train"), (["dev", "test"], "dev")]
)
def test_of_several_splits_train_is_read_or_else_the_first(tmp_path, splits, read):
    for split in splits:
        save_to_disk(tmp_path / "corpus" / split, [{"text": f"{split} {i}"} for i in range(5)])
    (tmp_path / "corpus" / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    assert texts(tmp_path / "corpus") == [f"{read} {i}" for i in range(5)]
    assert texts(tmp_path / "corpus" / splits[1])[0] == f"{splits[1]} 0"


def test_a_clone_of_a_dataset_repository_is_its_parquet_files_in_order(tmp_path):
    (tmp_path / "corpus" / "data").mkdir(parents=True)
    (tmp_path / "corpus" / "README.md").write_text("a corpus")
    for i in range(3):
        write_parquet(tmp_path / "corpus" / "data" / f"train-{i}.parquet", ROWS[i * 10 : i * 10 + 10])
    assert texts(tmp_path / "corpus") == TEXTS[:30]


def write_tfds(folder, splits):
    """What TFDS writes with file_format=array_record, written by its description."""
    folder.mkdir(parents=True)
    for split, shards in splits.items():
        for k, rows in enumerate(shards):
            write_examples(folder / f"corpus-{split}.array_record-{k:05d}-of-{len(shards):05d}", rows)
    text = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
    features = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict"}
    (folder / "features.json").write_text(json.dumps({**features, "featuresDict": {"features": {"text": text}}}))
    entries = [
        {
            "name": split,
            "shardLengths": [str(len(rows)) for rows in shards],
            "numBytes": "1",
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for split, shards in splits.items()
    ]
    (folder / "dataset_info.json").write_text(
        json.dumps({"name": "corpus", "version": "1.0.0", "fileFormat": "array_record", "splits": entries})
    )


@pytest.mark.parametrize(
    ("splits", "count"), [({"train": [ROWS[:4], ROWS[4:9]], "test": [ROWS[9:10]]}, 9), ({"a": [ROWS[:3]], "b": [ROWS[3:5]]}, 5)]
)
def test_a_tfds_folder_is_its_train_split_or_all_of_them(tmp_path, splits, count):
    write_tfds(tmp_path / "corpus" / "1.0.0", splits)
    assert texts(tmp_path / "corpus" / "1.0.0") == TEXTS[:count]


DAMAGED_FOLDERS = {
    "no dataset": {"notes.md": "a"},
    "nothing": {},
    "a tfds folder without its info": {"features.json": "{}"},
    "a list of splits that is no JSON": {"dataset_dict.json": "{"},
    "no splits": {"dataset_dict.json": '{"splits": []}'},
    "a list of files that is no JSON": {"state.json": "{"},
    "a file that is gone": {"state.json": '{"_data_files": [{"filename": "gone.arrow"}]}'},
}


@pytest.mark.parametrize("case", DAMAGED_FOLDERS)
def test_a_folder_that_is_no_whole_dataset_is_an_error_that_names_it(tmp_path, case):
    (tmp_path / "corpus").mkdir()
    for name, text in DAMAGED_FOLDERS[case].items():
        (tmp_path / "corpus" / name).write_text(text)
    with pytest.raises(UserError, match=str(tmp_path / "corpus")):
        texts(tmp_path / "corpus")


# --- Megatron-LM's stores ---------------------------------------------------------------------------------------------------


def test_a_megatron_store_gives_its_documents_as_tokens(tmp_path):
    documents = [[1, 2, 3], [], [65_000]]
    (tmp_path / "a.b.bin").write_bytes(struct.pack("<4H", 1, 2, 3, 65_000))
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)
    (tmp_path / "a.b.idx").write_bytes(header + struct.pack("<3i3q4q", 3, 0, 1, 0, 6, 6, 0, 1, 2, 3))
    rows = list(sources.read_rows(f"{tmp_path}/*.bin"))
    assert [row.fields["tokens"].tolist() for row in rows] == documents
    assert [sources.kind_of(row) for row in rows] == ["tokens"] * 3
    assert [(row.where, row.bytes_read) for row in rows] == [
        (f"{tmp_path}/a.b.bin, document {i}", n) for i, n in enumerate((6, 6, 8))
    ]


def test_a_megatron_store_without_its_index_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0\0")
    with pytest.raises(UserError, match=r"a\.idx is missing"):
        texts(tmp_path / "a.bin")


# --- other file systems -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ_BY_FSSPEC)
def test_every_format_is_read_from_a_url(tmp_path, memory, name):
    FORMATS[name](tmp_path / name, ROWS)
    for i, rows in enumerate((ROWS, ROWS[:9])):
        FORMATS[name](tmp_path / name, rows)
        fsspec.filesystem("memory").pipe(f"/corpus/{i}-{name}", (tmp_path / name).read_bytes())
    assert texts(f"{memory}/*-{name}") == texts(memory) == TEXTS + TEXTS[:9]
    assert texts(f"{memory}/0-{name}") == TEXTS
    for part_bytes in (300, 3000, 1 << 30):
        parts = sources.parts(f"{memory}/*", part_bytes)
        assert [row.fields["text"] for part in parts for row in sources.read_part(part)] == TEXTS + TEXTS[:9]
    sizes = [fsspec.filesystem("memory").size(f"/corpus/{i}-{name}") for i in range(2)]
    assert sum(map(paths.bytes_of, sources.matching_files(memory))) == sum(sizes)


def test_a_text_file_is_read_from_a_url(memory):
    fsspec.filesystem("memory").pipe("/corpus/a.txt", "狸\r\n山".encode())
    assert texts(f"{memory}/*.txt") == ["狸\r\n山"]


@pytest.mark.parametrize("splits", [["test", "train"], []], ids=["splits", "one"])
def test_a_folder_that_hugging_face_datasets_saved_is_the_same_at_a_url(tmp_path, memory, splits):
    folder = tmp_path / "corpus"
    save_to_disk(folder / "train" if splits else folder, ROWS[:20], 12)
    if splits:
        save_to_disk(folder / "test", ROWS[20:25])
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    write_arrow(folder / "train" / "cache-1.arrow" if splits else folder / "cache-1.arrow", ROWS[:1])
    for path in folder.rglob("*.*"):
        fsspec.filesystem("memory").pipe(f"/corpus/{path.relative_to(folder)}", path.read_bytes())
    assert texts(memory) == texts(folder) == TEXTS[:20]


@pytest.mark.parametrize("name", ["a.arrayrecord", "a.bin"])
def test_a_format_that_is_not_read_from_urls_is_an_error_and_not_an_empty_corpus(tmp_path, memory, name):
    write_array_record(tmp_path / name, ROWS)
    fsspec.filesystem("memory").pipe(f"/corpus/{name}", (tmp_path / name).read_bytes())
    try:
        found = texts(f"{memory}/*")
    except UserError as error:
        assert name.split(".")[0] in str(error)
    else:
        assert found == TEXTS


def test_the_identity_of_a_file_at_a_url_changes_with_it(memory):
    system = fsspec.filesystem("memory")
    system.pipe("/corpus/a.jsonl", lines_of(ROWS))
    before = sources.identity(memory)
    assert sources.identity(memory) == before
    system.pipe("/corpus/a.jsonl", lines_of(ROWS[:5]))
    assert sources.identity(memory) != before


@pytest.mark.parametrize(
    ("url", "message"),
    [("nosuch://bucket/a.jsonl", "cannot be opened.*nosuch"), ("memory://corpus/none/*.jsonl", "no such file.*none")],
)
def test_a_url_that_cannot_be_read_is_an_error_that_names_it(url, message):
    with pytest.raises(UserError, match=message):
        texts(url)


# --- damage -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 3, 10, 0.3, 0.5, 0.9, -9, -1])
@pytest.mark.parametrize("name", CHECKED)
def test_a_file_cut_short_anywhere_is_an_error_that_names_it(tmp_path, name, cut):
    FORMATS[name](tmp_path / "whole", ROWS)
    data = (tmp_path / "whole").read_bytes()
    end = int(cut * len(data)) if isinstance(cut, float) else cut
    (tmp_path / name).write_bytes(data[: end - 4 if name == "a.arrow" and end < 0 else end])  # an end mark may be left out
    with pytest.raises(UserError, match=rf"{name} is not a whole .* file|{name} is not a whole Arrow stream"):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", CHECKED)
def test_an_empty_file_of_a_format_that_has_an_end_is_cut_short_too(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=name):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", CHECKED)
def test_a_file_of_another_format_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is text\n" * 10_000)
    with pytest.raises(UserError, match=name):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.arrayrecord", "a.array_record"])
def test_wrong_bytes_in_a_file_with_checksums_are_an_error_that_names_it(tmp_path, name):
    FORMATS[name](tmp_path / name, ROWS)
    data = bytearray((tmp_path / name).read_bytes())
    at = data.index(b"row 1") if b"row 1" in data else len(data) // (8 if "array" in name else 2)
    data[at : at + 200] = bytes(byte ^ 0x5A for byte in data[at : at + 200])
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.arrayrecord", "a.array_record"])
def test_a_record_that_is_neither_json_nor_an_example_is_an_error_that_names_it(tmp_path, name):
    write_array_record(tmp_path / name, [b'{"text": "a"}', b"\xff\xff\xff", b'{"text": "b"'], bytes)
    bad = []
    rows = list(
        sources.read_part(sources.Part((str(tmp_path / name),), 0, sources.WHOLE, 1), on_bad_row=lambda *told: bad.append(told))
    )
    assert [row and row.fields["text"] for row in rows] == ["a", None, None]
    assert [where for where, _ in bad] == [f"{tmp_path / name}, record {i}" for i in (1, 2)]
    assert "neither a JSON object nor a tf.train.Example" in bad[0][1] and "is not JSON" in bad[1][1]
    with pytest.raises(UserError, match=rf"{name}, record 1 is neither"):
        texts(tmp_path / name)
