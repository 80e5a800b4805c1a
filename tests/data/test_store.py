import hashlib
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tanuki_jax.data import store as store_module
from tanuki_jax.data.store import Store, StoreWriter, token_dtype
from tanuki_jax.errors import UserError

DOCUMENTS = [[5, 6, 7], [], [65_000], list(range(100))]
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron-LM's codes of integers
FLOATS = {6: "<f8", 7: "<f4"}
SEQUENCES = st.lists(st.lists(st.lists(st.integers(0, 100), max_size=4), max_size=3), max_size=5)  # of documents
quick = settings(max_examples=30, deadline=None)


def flat(lists):
    return [value for inner in lists for value in inner]


def write(prefix, documents, dtype="<u2"):
    writer = StoreWriter(prefix, np.dtype(dtype))
    for document in documents:
        writer.add(document)
    writer.close()
    return prefix


def write_by_the_format(prefix, documents, code, modes=b""):
    """Megatron-LM's layout, written without our code: a document is a list of sequences."""
    dtype, sequences = np.dtype({**DTYPES, **FLOATS}[code]), flat(documents)
    lengths = [len(sequence) for sequence in sequences]
    pointers = [dtype.itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    first = [sum(map(len, documents[:i])) for i in range(len(documents) + 1)]
    prefix.with_suffix(".bin").write_bytes(np.array(flat(sequences), dtype).tobytes())
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(first))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(first)}q", *first)
        + modes
    )
    return prefix


def read_by_the_format(prefix):
    """The same layout, read without our code: documents, and the bytes that are left over."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, starts = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1 and starts == sequences + 1
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    offsets = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    assert struct.unpack_from(f"<{starts}q", index, 34 + 12 * sequences) == tuple(range(starts))
    data, dtype = prefix.with_suffix(".bin").read_bytes(), np.dtype(DTYPES[code])
    documents = [np.frombuffer(data, dtype, n, at).tolist() for n, at in zip(lengths, offsets, strict=True)]
    left = len(index) - 34 - 12 * sequences - 8 * starts, len(data) - sum(lengths) * dtype.itemsize
    return dtype, documents, left


def check(store, documents):
    """A store is these documents, one after another, however it is read."""
    stream, ends = flat(documents), np.cumsum([0, *map(len, documents)]).tolist()
    assert (store.size, store.documents) == (len(stream), len(documents))
    assert [store.document(i).tolist() for i in range(len(documents))] == documents
    assert store.lengths.tolist() == [len(document) for document in documents]
    assert store.offsets.tolist() == ends
    assert store.offsets.dtype == store.lengths.dtype == np.int64
    for start in range(len(stream) + 1):
        for stop in {start, min(start + 3, len(stream)), len(stream)}:
            assert store.read(start, stop).tolist() == stream[start:stop]
            if start < len(stream):
                begins = store.boundaries(start, stop)
                assert begins.dtype == np.int64 and begins.tolist() == sorted({e for e in ends if start < e < stop})


@quick
@given(st.lists(st.lists(st.integers(0, 65_535), max_size=20), max_size=8), st.sampled_from(["<u2", "<i4", "<i8"]))
def test_documents_come_back_from_us_and_from_a_reader_of_the_format(tmp_path_factory, documents, dtype):
    prefix = write(tmp_path_factory.mktemp("store") / "tokens", documents, dtype)
    check(Store(prefix), documents)
    assert read_by_the_format(prefix) == (np.dtype(dtype), documents, (0, 0))


@pytest.mark.parametrize("code", DTYPES)
def test_every_type_of_integer_is_written_as_the_format_says(tmp_path, code):
    least, most = np.iinfo(DTYPES[code]).min, np.iinfo(DTYPES[code]).max
    prefix = write(tmp_path / "tokens", [[least, 0], [], [most]], DTYPES[code])
    assert read_by_the_format(prefix) == (np.dtype(DTYPES[code]), [[least, 0], [], [most]], (0, 0))
    check(Store(prefix), [[least, 0], [], [most]])


@pytest.mark.parametrize("modes", [b"", b"\0" * 6], ids=["text", "multimodal"])
@pytest.mark.parametrize("code", DTYPES)
def test_reads_what_another_writer_of_the_format_wrote(tmp_path, code, modes):
    documents = [[[1, 2], [3]], [[4]], [], [[], [5, 6]], [[7]]]
    store = Store(write_by_the_format(tmp_path / "x", documents, code, modes))
    assert store.dtype == np.dtype(DTYPES[code]) and store.read(0, 2).dtype == store.dtype
    check(store, [flat(document) for document in documents])


@pytest.mark.parametrize("code", FLOATS)
def test_a_store_of_floats_is_refused_by_the_name_of_its_file(tmp_path, code):
    prefix = write_by_the_format(tmp_path / "x", [[[1.5]]], code)
    with pytest.raises(UserError, match=rf"x\.bin holds {np.dtype(FLOATS[code]).name} numbers, not token ids"):
        Store(prefix)


@pytest.mark.parametrize("checked", [1_000_000, 2], ids=["an index that is checked", "a larger one"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=SEQUENCES)
@example(documents=[[[1], [2]], []])  # as many sequences as documents
@example(documents=[[[1]], [[2], [3]], [], [[4]], [[5]], [[6]]])
def test_documents_of_several_sequences_and_of_none_are_whole(tmp_path_factory, monkeypatch, checked, documents):
    monkeypatch.setattr(store_module, "CHECK_ROWS", checked)
    prefix = write_by_the_format(tmp_path_factory.mktemp("store") / "x", documents, 8)
    check(Store(prefix), [flat(document) for document in documents])


@quick
@given(st.lists(SEQUENCES, min_size=1, max_size=4))
def test_shards_are_one_stream_and_one_list_of_documents(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("store")
    prefixes = [write_by_the_format(folder / f"x{k}", documents, 8) for k, documents in enumerate(shards)]
    check(Store(*prefixes), [flat(document) for document in flat(shards)])


def test_a_store_without_shards_is_an_error():
    with pytest.raises(UserError, match="no shards"):
        Store()


def test_a_pickled_store_is_small_and_reads_the_same(tmp_path):
    documents = [list(range(i, i + 500)) for i in range(200)]
    store = Store(*(write(tmp_path / str(k), documents[100 * k : 100 * k + 100]) for k in range(2)))

    def reads(store):
        return store.read(10, store.size).tolist(), store.boundaries(0, store.size).tolist(), store.document(150).tolist()

    expected = reads(store)  # every map is open now
    pickled = pickle.dumps(store)
    assert len(pickled) < 2_000 and reads(pickle.loads(pickled)) == expected
    assert expected == (flat(documents)[10:], list(range(500, 100_000, 500)), documents[150])


def test_a_store_of_terabytes_is_read_where_it_is_asked(tmp_path):
    length, count = 2_000_000_000, 650  # 2.6 TB of uint16, none of which takes room on the disk
    with (tmp_path / "x.bin").open("wb") as f:
        try:
            f.truncate(2 * length * count)
        except OSError:  # a file system of smaller files
            count = 4
            f.truncate(2 * length * count)
    size = length * count
    with (tmp_path / "x.bin").open("r+b") as f:
        for at, value in ((0, 11), (size // 2, 12), (size - 1, 13)):
            f.seek(2 * at)
            f.write(struct.pack("<H", value))
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    arrays = np.full(count, length, "<i4"), np.arange(count) * length * 2, np.arange(count + 1)
    (tmp_path / "x.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    store = pickle.loads(pickle.dumps(Store(tmp_path / "x", tmp_path / "x")))
    assert (store.size, store.documents) == (2 * size, 2 * count)
    for base in (0, size):
        for at, value in ((0, 11), (size // 2, 12), (size - 1, 13)):
            assert store.read(base + at, base + at + 1).tolist() == [value]
        zeros = hashlib.sha256(store.read(base + size // 2 + 1, base + size // 2 + 1_000_001).tobytes()).hexdigest()
        assert zeros == hashlib.sha256(bytes(2_000_000)).hexdigest()
    assert store.read(size - 2, size + 2).tolist() == [0, 13, 11, 0]
    assert store.boundaries(size - length - 1, size + length + 1).tolist() == [size - length, size, size + length]
    last = store.document(2 * count - 1)
    assert (len(last), int(last[0]), int(last[-1])) == (length, 0, 13)


def test_reading_somewhere_copies_no_index(tmp_path):
    count = 200_000
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    arrays = np.ones(count, "<i4"), np.arange(count) * 2, np.arange(count + 1)
    (tmp_path / "x.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    np.arange(count, dtype="<u2").tofile(tmp_path / "x.bin")
    store = Store(tmp_path / "x", tmp_path / "x")
    store.boundaries(0, 9), store.document(0)  # the maps are open now
    tracemalloc.start()
    begins, document = store.boundaries(count - 3, count + 3).tolist(), store.document(count + 7).tolist()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (begins, document) == ([count - 2, count - 1, count, count + 1, count + 2], [7])
    assert most < count  # bytes; the index has twenty a document


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(512, "u2"), (65_000, "u2"), (65_499, "u2"), (65_500, "i4"), (151_000, "i4")]
)
def test_ids_take_two_bytes_up_to_the_bound_of_megatron(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_an_id_that_does_not_fit_is_refused_and_not_wrapped(tmp_path):
    with pytest.raises(OverflowError):
        write(tmp_path / "tokens", [[65_536]])


DAMAGE = {
    "magic": ("idx", lambda b: b"NOTINDEX!" + b[9:]),
    "empty": ("idx", lambda b: b""),
    "header cut": ("idx", lambda b: b[:20]),
    "version": ("idx", lambda b: b[:9] + struct.pack("<Q", 2) + b[17:]),
    "dtype code": ("idx", lambda b: b[:17] + b"\x63" + b[18:]),
    "count": ("idx", lambda b: b[:18] + struct.pack("<Q", 1 << 40) + b[26:]),
    "no documents": ("idx", lambda b: b[:26] + struct.pack("<Q", 0) + b[34:]),
    "lengths": ("idx", lambda b: b[:34] + struct.pack("<i", 4) + b[38:]),
    "lengths that add up": ("idx", lambda b: b[:34] + struct.pack("<2i", 2, 1) + b[42:]),
    "pointers": ("idx", lambda b: b[:50] + struct.pack("<q", 2) + b[58:]),
    "documents": ("idx", lambda b: b[:-8] + struct.pack("<q", 9)),
    "cut by a byte": ("idx", lambda b: b[:-1]),
    "bytes added": ("idx", lambda b: b + b"\0\0"),
    "tokens cut": ("bin", lambda b: b[:-1]),
    "tokens cut by one": ("bin", lambda b: b[:-2]),
    "no tokens": ("bin", lambda b: b""),
    "tokens added": ("bin", lambda b: b + b"\0\0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, damage):
    suffix, change = DAMAGE[damage]
    write(tmp_path / "tokens", DOCUMENTS)
    write(tmp_path / "whole", DOCUMENTS)
    path = tmp_path / f"tokens.{suffix}"
    path.write_bytes(change(path.read_bytes()))
    for prefixes in (["tokens"], ["whole", "tokens"]):
        with pytest.raises(UserError, match=r"tokens\.(idx|bin)" if suffix == "idx" else r"tokens\.bin"):
            Store(*(tmp_path / prefix for prefix in prefixes))


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file_is_an_error_that_names_it(tmp_path, suffix):
    write(tmp_path / "tokens", DOCUMENTS)
    (tmp_path / f"tokens.{suffix}").unlink()
    with pytest.raises(UserError, match=f"tokens.{suffix} is missing"):
        Store(tmp_path / "tokens")


def test_shards_of_another_type_than_the_first_are_an_error(tmp_path):
    write(tmp_path / "a", [[1, 2]])
    write(tmp_path / "b", [[70_000]], "<i4")
    with pytest.raises(UserError, match=r"b\.bin holds int32.*a\.bin uint16"):
        Store(tmp_path / "a", tmp_path / "b")
    write_by_the_format(tmp_path / "c", [[[1.5]]], 7)
    with pytest.raises(UserError, match=r"c\.bin holds float32"):
        Store(tmp_path / "a", tmp_path / "c")
