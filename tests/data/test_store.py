import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax.data.store import Store, StoreWriter, token_dtype
from tanuki_jax.errors import UserError

DOCUMENTS = [[5, 6, 7], [], [65_000], list(range(100))]
DTYPES = {1: "u1", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron-LM's codes


def write(prefix, documents, dtype="<u2"):
    writer = StoreWriter(prefix, np.dtype(dtype))
    for document in documents:
        writer.add(document)
    writer.close()
    return Store(prefix)


def read_by_the_format(prefix):
    """Megatron-LM's layout, read without our code: documents, and the bytes that are left over."""
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


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65_535), max_size=20), max_size=8), st.sampled_from(["<u2", "<i4", "<i8"]))
def test_documents_come_back_from_us_and_from_a_reader_of_the_format(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("store") / "tokens"
    store = write(prefix, documents, dtype)
    assert [store.document(i).tolist() for i in range(store.documents)] == documents
    assert store.tokens.tolist() == sum(documents, [])
    assert store.lengths.tolist() == [len(d) for d in documents]
    assert read_by_the_format(prefix) == (np.dtype(dtype), documents, (0, 0))


@pytest.mark.parametrize("code", DTYPES)
def test_reads_what_another_writer_of_the_format_wrote(tmp_path, code):
    documents, dtype = [[1, 2, 3], [4], [], [5, 6]], np.dtype(DTYPES[code])
    lengths = [len(d) for d in documents]
    offsets = [dtype.itemsize * sum(lengths[:i]) for i in range(4)]
    modes = b"\0" * 4  # Megatron-LM's multimodal writer adds a byte a sequence
    (tmp_path / "x.bin").write_bytes(np.array(sum(documents, []), dtype).tobytes())
    (tmp_path / "x.idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ4i4q5q", 1, code, 4, 5, *lengths, *offsets, *range(5)) + modes
    )
    store = Store(tmp_path / "x")
    assert store.dtype == dtype and [store.document(i).tolist() for i in range(4)] == documents


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
    "lengths": ("idx", lambda b: b[:34] + struct.pack("<i", 4) + b[38:]),
    "cut by a byte": ("idx", lambda b: b[:-1]),
    "tokens cut": ("bin", lambda b: b[:-1]),
    "tokens added": ("bin", lambda b: b + b"\0\0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, damage):
    suffix, change = DAMAGE[damage]
    write(tmp_path / "tokens", DOCUMENTS)
    path = tmp_path / f"tokens.{suffix}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=f"tokens.{suffix if damage != 'lengths' else 'bin'}"):
        Store(tmp_path / "tokens")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file_is_an_error_that_names_it(tmp_path, suffix):
    write(tmp_path / "tokens", DOCUMENTS)
    (tmp_path / f"tokens.{suffix}").unlink()
    with pytest.raises(UserError, match=f"tokens.{suffix} is missing"):
        Store(tmp_path / "tokens")
