"""Records from files of every format that a corpus comes in; each format is a row of READERS.

A reader takes a path and a range of it and gives records in order: a mapping, bytes to be parsed as JSON, or an array of
tokens.  Ranges are in the unit of `size_of`: bytes of a .jsonl file, row groups of Parquet, records of ArrayRecord; other
files are read whole.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tanuki_jax.data.store import Store
from tanuki_jax.errors import UserError


class Record(NamedTuple):
    """One record, where it stands (for messages), and the share of its file's bytes read up to it."""

    where: str
    value: Any
    bytes_read: int


# --- files: local paths, or URLs of any file system that fsspec knows -----------------------------------------------------


def is_url(path: str) -> bool:
    """Whether a path names a file system, as gs://bucket/file does."""
    return "://" in path


def _remote(path: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"data: {path} cannot be opened: {error} (for gs:// pip install 'tanuki-jax[gcs]')") from error


def find(pattern: str) -> list[str]:
    """The paths that a glob matches, sorted."""
    if not is_url(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    system, path = _remote(pattern)
    return sorted(system.unstrip_protocol(found) for found in system.glob(path))


def is_directory(path: str) -> bool:
    """Whether a path is a folder."""
    if not is_url(path):
        return Path(path).is_dir()
    system, inner = _remote(path)
    return bool(system.isdir(inner))


def bytes_of(path: str) -> int:
    """Size of a file, or of all files of a folder."""
    if is_url(path):
        system, inner = _remote(path)
        return int(system.du(inner))
    if path.endswith(".bin") or Path(path).is_file():
        return Path(path).stat().st_size
    return sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file())


def identity_of(path: str) -> list[Any]:
    """What changes when a file does: its name, size and time of change, or a remote file's own key."""
    if path.endswith(".bin") and not is_url(path):
        return [*_stats([Path(path), Path(path).with_suffix(".idx")])]
    if is_url(path):
        system, inner = _remote(path)
        return [path, system.ukey(inner)]
    return _stats(sorted(p for p in Path(path).rglob("*") if p.is_file()) if Path(path).is_dir() else [Path(path)])


def _stats(paths: Iterable[Path]) -> list[Any]:
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in paths if p.exists()]


def _open(path: str) -> Any:
    if not is_url(path):
        return Path(path).open("rb")
    system, inner = _remote(path)
    return system.open(inner, "rb")


# --- readers ------------------------------------------------------------------------------------------------------------------


def _text(path: str, start: int, stop: int, wanted: Container[str]) -> Iterator[Record]:
    with _open(path) as f:
        data = f.read()
    try:
        text: Any = data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = UserError(f"data: {path} is not valid UTF-8 at byte {error.start}; convert it, for example with iconv")
    yield Record(path, text if isinstance(text, UserError) else {"text": text}, len(data))


def _jsonl(path: str, start: int, stop: int, wanted: Container[str]) -> Iterator[Record]:
    """The lines that begin in bytes [start, stop)."""
    with _open(path) as f:
        if start:
            f.seek(start - 1)
            f.readline()
        at = f.tell()
        number = 0
        while at < stop:
            line = f.readline()
            if not line:
                return
            number += 1
            if line.strip():
                yield Record(f"{path}, byte {at}" if start else f"{path}:{number}", line, at + len(line) - start)
            at += len(line)


def _gzip(path: str, start: int, stop: int, wanted: Container[str]) -> Iterator[Record]:
    with _open(path) as raw:
        _check_not_empty(path)
        try:
            with gzip.GzipFile(fileobj=raw) as f:
                yield from _lines(path, f, raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"data: {path} is not a whole gzip file ({error}); fetch it again") from error


def _zstd(path: str, start: int, stop: int, wanted: Container[str]) -> Iterator[Record]:
    import pyarrow

    with _open(path) as raw:
        _check_not_empty(path)
        try:
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
            yield from _lines(path, io.BufferedReader(stream, 1 << 20), raw)
        except OSError as error:
            raise UserError(f"data: {path} is not a whole zstd file ({error}); fetch it again") from error


def _check_not_empty(path: str) -> None:
    if not bytes_of(path):
        raise UserError(f"data: {path} has no bytes, not even those of an empty compressed file; fetch it again")


def _lines(path: str, lines: Any, raw: Any) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Record(f"{path}:{number}", line, raw.tell())


def _parquet(path: str, start: int, stop: int, wanted: Container[str]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    with _open(path) as f:
        try:
            table = pyarrow.parquet.ParquetFile(f)
            columns = [name for name in table.schema_arrow.names if name in wanted] or None
            row = 0
            size = bytes_of(path)
            for group in range(start, min(stop, table.num_row_groups)):
                for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                    for value in batch.to_pylist():
                        name = f"{path}, row {row}" if not start else f"{path}, row {row} of row groups {start} on"
                        yield Record(name, value, size * (group + 1 - start) // max(1, table.num_row_groups))
                        row += 1
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"data: {path} is not a whole Parquet file ({error}); fetch it again") from error


def _arrow(path: str, start: int, stop: int, wanted: Container[str]) -> Iterator[Record]:
    import pyarrow

    with _open(path) as f:
        try:
            stream = pyarrow.ipc.open_stream(f)
            row = 0
            for batch in stream:
                for value in batch.to_pylist():
                    yield Record(f"{path}, row {row}", value, f.tell())
                    row += 1
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"data: {path} is not a whole Arrow stream ({error}); save the dataset again") from error


def _array_record(path: str, start: int, stop: int, wanted: Container[str]) -> Iterator[Record]:
    """Records hold JSON objects, or tf.train.Example as MaxText's and TFDS's do."""
    reader = _array_reader(path)
    size = bytes_of(path)
    total = max(1, reader.num_records())
    stop = min(stop, total if reader.num_records() else 0)
    for first in range(start, stop, 256):
        try:
            batch = reader.read(list(range(first, min(first + 256, stop))))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"data: {path} is damaged near record {first} ({error}); fetch it again") from error
        for i, data in enumerate(batch, first):
            value = data if data.lstrip()[:1] == b"{" else _example(data, f"{path}, record {i}")
            yield Record(f"{path}, record {i}", value, size * (i + 1 - start) // total)


def _array_reader(path: str) -> Any:
    from array_record.python import array_record_module

    if is_url(path):
        raise UserError(f"data: {path}: ArrayRecord files are read from local paths only; copy it here")
    reader = array_record_module.ArrayRecordReader(path)
    if not reader.ok():
        raise UserError(f"data: {path} is not a whole ArrayRecord file; fetch it again")
    return reader


def _example(data: bytes, where: str) -> Any:
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_generated_pb2

    try:
        features = tf_example_generated_pb2.Example.FromString(data).features.feature
    except DecodeError:
        return UserError(f"data: {where} is neither a JSON object nor a tf.train.Example")
    return {name: f.bytes_list.value[0] for name, f in features.items() if len(f.bytes_list.value) == 1}


def _tfds(path: str, start: int, stop: int, wanted: Container[str]) -> Iterator[Record]:
    """A folder that TFDS wrote with file_format=array_record; its `train` split, or all of them where there is none."""
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder_from_directory(path)
        splits = ["train"] if "train" in builder.info.splits else list(builder.info.splits)
        for split in splits:
            source = builder.as_data_source(split)
            for i in range(len(source)):
                yield Record(f"{path} {split}, record {i}", source[i], bytes_of(path) * (i + 1) // len(source))
    except (NotImplementedError, ValueError, OSError) as error:
        raise UserError(f"data: {path} is not a TFDS dataset in ArrayRecord files: {error}") from error


def _tokens(path: str, start: int, stop: int, wanted: Container[str]) -> Iterator[Record]:
    store = Store(Path(path).with_suffix(""))
    for i in range(store.documents):
        tokens = store.document(i)
        yield Record(f"{path}, document {i}", {"tokens": tokens}, int(store.offsets[i + 1]) * store.dtype.itemsize)


Reader = Callable[[str, int, int, Container[str]], Iterator[Record]]
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
    if _is_tfds(path):
        return "/tfds"
    return next((suffix for suffix in SUFFIXES if path.endswith(suffix)), "")


def size_of(path: str) -> int:
    """How many units a file can be cut into; 1 for formats that are read whole."""
    kind = format_of(path)
    if kind == ".jsonl":
        return bytes_of(path)
    if kind in (".arrayrecord", ".array_record"):
        return int(_array_reader(path).num_records())
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        with _open(path) as f:
            try:
                return int(pyarrow.parquet.ParquetFile(f).num_row_groups)
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise UserError(f"data: {path} is not a whole Parquet file ({error}); fetch it again") from error
    return 1


def expand(path: str) -> list[str]:
    """The files of a dataset folder: one that Hugging Face datasets or TFDS wrote; a file is itself."""
    if not is_directory(path) or _is_tfds(path):
        return [path]
    folder = path.rstrip("/")
    try:
        if _exists(f"{folder}/dataset_dict.json"):
            splits = _read_json(f"{folder}/dataset_dict.json")["splits"]
            folder = f"{folder}/{'train' if 'train' in splits else splits[0]}"
        if _exists(f"{folder}/state.json"):
            found = [f"{folder}/{entry['filename']}" for entry in _read_json(f"{folder}/state.json")["_data_files"]]
            for missing in (file for file in found if not _exists(file)):
                raise UserError(f"data: {missing} is missing from the dataset in {path}; save it again")
            return found
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"data: {folder} is not a whole dataset of Hugging Face's ({error!r}); save it again") from error
    if is_url(path):
        return [found for suffix in SUFFIXES for found in find(f"{folder}/**/*{suffix}")]
    if any(Path(folder).glob("*.parquet")) or (Path(folder) / "data").is_dir():  # a clone of a dataset's repository
        return sorted(str(p) for p in Path(folder).rglob("*.parquet"))
    return [path]


def _exists(path: str) -> bool:
    if not is_url(path):
        return Path(path).is_file()
    system, inner = _remote(path)
    return bool(system.isfile(inner))


def _read_json(path: str) -> Any:
    with _open(path) as f:
        return json.loads(f.read().decode("utf-8"))


def _is_tfds(path: str) -> bool:
    return not is_url(path) and (Path(path) / "features.json").is_file()
