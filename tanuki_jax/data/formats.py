"""Records from files of every format that a corpus comes in; each format is a row of READERS.

A reader takes a path and a range of it and yields records in order.  Ranges are in the unit of `size_of`: bytes of a .jsonl
file, row groups of Parquet, records of ArrayRecord; other files are read whole.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, TypeAlias

from tanuki_jax.data import encodings, paths
from tanuki_jax.data.store import Store
from tanuki_jax.errors import UserError

if TYPE_CHECKING:  # these are imported where they are needed
    import pyarrow
    from array_record.python import array_record_module

Value: TypeAlias = bytes | dict[str, object] | UserError  # JSON, fields, or why the record cannot be read


class Record(NamedTuple):
    """A record, its place (for messages), and how many bytes of its file were read up to it."""

    where: str
    value: Value
    bytes_read: int


# --- readers ------------------------------------------------------------------------------------------------------------------


def _text(path: str, start: int, stop: int, names: Container[str]) -> Iterator[Record]:
    with paths.open_file(path) as f:
        data = f.read()
    try:
        value: Value = {"text": encodings.decode(encodings.strip_byte_order_mark(data, path), path)}
    except UserError as error:
        value = error
    yield Record(path, value, len(data))


def _jsonl(path: str, start: int, stop: int, names: Container[str]) -> Iterator[Record]:
    """The lines that begin in bytes [start, stop)."""
    with paths.open_file(path) as f:
        if start:
            f.seek(start - 1)
            f.readline()
        at = f.tell()
        number = 0
        while at < stop:
            line = f.readline()
            if not line:
                return
            number, end = number + 1, at + len(line)
            line = line if at else encodings.strip_byte_order_mark(line, path)
            if line.strip():
                yield Record(f"{path}, byte {at}" if start else f"{path}:{number}", line, end - start)
            at = end


def _gzip(path: str, start: int, stop: int, names: Container[str]) -> Iterator[Record]:
    with paths.open_file(path) as raw:
        _check_not_empty(path)
        try:
            with gzip.GzipFile(fileobj=raw) as f:
                yield from _lines(path, f, raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"data: {path} is not a whole gzip file ({error}); fetch it again") from error


def _zstd(path: str, start: int, stop: int, names: Container[str]) -> Iterator[Record]:
    import pyarrow

    with paths.open_file(path) as raw:
        _check_not_empty(path)
        try:
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
            yield from _lines(path, io.BufferedReader(stream, 1 << 20), raw)
        except OSError as error:
            raise UserError(f"data: {path} is not a whole zstd file ({error}); fetch it again") from error


def _check_not_empty(path: str) -> None:
    if not paths.bytes_of(path):
        raise UserError(f"data: {path} has no bytes, not even those of an empty compressed file; fetch it again")


def _lines(path: str, lines: Iterable[bytes], raw: IO[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        line = line if number > 1 else encodings.strip_byte_order_mark(line, path)
        if line.strip():
            yield Record(f"{path}:{number}", line, raw.tell())


def _parquet(path: str, start: int, stop: int, names: Container[str]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    with paths.open_file(path) as f:
        try:
            table = pyarrow.parquet.ParquetFile(f)
            _check_columns(table.schema_arrow.names, path)
            columns = [name for name in table.schema_arrow.names if name in names] or None
            row = 0
            size = paths.bytes_of(path)
            for group in range(start, min(stop, table.num_row_groups)):
                for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                    place = f"{path}, row " + "{}" + (f" of row groups {start} on" if start else "")
                    for where, value in _rows(batch, place, row):
                        yield Record(where, value, size * (group + 1 - start) // max(1, table.num_row_groups))
                        row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"data: {path} is not a whole Parquet file ({error}); fetch it again") from error


def _check_columns(names: Sequence[str], path: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data: {path} has two columns {name!r}; keep one of them")


def _rows(batch: pyarrow.RecordBatch, where: str, first: int) -> Iterator[tuple[str, Value]]:
    """Place and value of each row of an Arrow batch; an error instead of a row that is not UTF-8."""
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        values = [_value(batch.slice(i, 1), where.replace("{}", str(first + i))) for i in range(batch.num_rows)]
    for i, value in enumerate(values, first):
        yield where.replace("{}", str(i)), value


def _value(row: pyarrow.RecordBatch, where: str) -> Value:
    try:
        value: dict[str, object] = row.to_pylist()[0]
        return value
    except UnicodeDecodeError as error:
        try:
            encodings.decode(error.object, where)
        except UserError as detailed:
            return detailed
        return UserError(f"data: {where} is not valid UTF-8")


def _arrow(path: str, start: int, stop: int, names: Container[str]) -> Iterator[Record]:
    import pyarrow

    with paths.open_file(path) as f:
        try:
            if f.read(6) == b"ARROW1":  # the format with an index at its end
                whole = pyarrow.ipc.open_file(f)
                columns, batches = whole.schema.names, map(whole.get_batch, range(whole.num_record_batches))
            else:
                f.seek(0)
                batches = pyarrow.ipc.open_stream(f)
                columns = batches.schema.names
            _check_columns(columns, path)
            row = 0
            for batch in batches:
                for where, value in _rows(batch, f"{path}, row " + "{}", row):
                    yield Record(where, value, f.tell())
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"data: {path} is not a whole Arrow stream ({error}); save the dataset again") from error


def _array_record(path: str, start: int, stop: int, names: Container[str]) -> Iterator[Record]:
    """Records that hold JSON objects, or tf.train.Example as those of MaxText and TFDS do."""
    reader = _array_reader(path)
    size = paths.bytes_of(path)
    total = max(1, reader.num_records())
    stop = min(stop, total if reader.num_records() else 0)
    for first in range(start, stop, 256):
        try:
            batch = reader.read(list(range(first, min(first + 256, stop))))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"data: {path} is damaged near record {first} ({error}); fetch it again") from error
        for i, data in enumerate(batch, first):
            value = data if data[:1] == b"{" else _example(data, f"{path}, record {i}")
            yield Record(f"{path}, record {i}", value, size * (i + 1 - start) // total)


def _array_reader(path: str) -> array_record_module.ArrayRecordReader:
    from array_record.python import array_record_module

    if paths.is_url(path):
        raise UserError(f"data: {path}: ArrayRecord files are read from local paths only; copy it here")
    reader = array_record_module.ArrayRecordReader(path)
    if not reader.ok():
        raise UserError(f"data: {path} is not a whole ArrayRecord file; fetch it again")
    return reader


def _example(data: bytes, where: str) -> Value:
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_generated_pb2

    try:
        features = tf_example_generated_pb2.Example.FromString(data).features.feature
    except DecodeError:
        features = {}
    if not features and data.lstrip()[:1] == b"{":  # an Example of 123 bytes begins like JSON after a newline
        return data
    if not features:
        return UserError(f"data: {where} is neither a JSON object nor a tf.train.Example")
    lists = {name: list(getattr(f, f.WhichOneof("kind") or "bytes_list").value) for name, f in features.items()}
    return {name: values if name == "tokens" or len(values) > 1 else values[0] for name, values in lists.items() if values}


def _tfds(path: str, start: int, stop: int, names: Container[str]) -> Iterator[Record]:
    """A folder that TFDS wrote with file_format=array_record: its split `train`, or all splits where there is none."""
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder_from_directory(path)
        splits = ["train"] if "train" in builder.info.splits else list(builder.info.splits)
        for split in splits:
            source = builder.as_data_source(split)
            for i in range(len(source)):
                yield Record(f"{path} {split}, record {i}", source[i], paths.bytes_of(path) * (i + 1) // len(source))
    except (NotImplementedError, ValueError, OSError) as error:
        raise UserError(f"data: {path} is not a TFDS dataset in ArrayRecord files: {error}") from error


def _tokens(path: str, start: int, stop: int, names: Container[str]) -> Iterator[Record]:
    store = Store(Path(path).with_suffix(""))
    for i in range(store.documents):
        tokens = store.document(i)
        yield Record(f"{path}, document {i}", {"tokens": tokens}, int(store.offsets[i + 1]) * store.dtype.itemsize)


Reader: TypeAlias = Callable[[str, int, int, Container[str]], Iterator[Record]]
READERS: Mapping[str, Reader] = {
    ".txt": _text,
    ".jsonl": _jsonl,
    ".jsonl.gz": _gzip,
    ".jsonl.zst": _zstd,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".arrayrecord": _array_record,
    ".array_record": _array_record,
    ".bin": _tokens,
    "/tfds": _tfds,  # a folder
}
SUFFIXES = tuple(suffix for suffix in READERS if suffix.startswith("."))


def format_of(path: str) -> str:
    """The key of READERS for a file or folder; empty where there is none."""
    if is_tfds(path):
        return "/tfds"
    return next((suffix for suffix in SUFFIXES if path.endswith(suffix)), "")


def size_of(path: str) -> int:
    """The number of units into which a file can be cut; 1 for formats that are read whole."""
    kind = format_of(path)
    if kind == ".jsonl":
        return paths.bytes_of(path)
    if kind in (".arrayrecord", ".array_record"):
        return int(_array_reader(path).num_records())
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        with paths.open_file(path) as f:
            try:
                return int(pyarrow.parquet.ParquetFile(f).num_row_groups)
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise UserError(f"data: {path} is not a whole Parquet file ({error}); fetch it again") from error
    return 1


def is_tfds(path: str) -> bool:
    """Whether a path is a folder that TFDS wrote."""
    return not paths.is_url(path) and (Path(path) / "features.json").is_file()
