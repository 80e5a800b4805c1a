"""Files: atomic writes, fingerprints, direct input and output, and locks on what is written."""

from tanuki_jax.files.atomic import (
    atomic_path,
    json_line,
    read_json,
    read_jsonl,
    remove_unfinished,
    write_json,
    write_jsonl,
    write_text,
)
from tanuki_jax.files.direct_io import PIECE, advise_willneed, direct_writer, prefetch
from tanuki_jax.files.disk import absolute, disk_errors, fingerprint, sync

__all__ = [
    "PIECE",
    "absolute",
    "advise_willneed",
    "atomic_path",
    "direct_writer",
    "disk_errors",
    "fingerprint",
    "json_line",
    "prefetch",
    "read_json",
    "read_jsonl",
    "remove_unfinished",
    "sync",
    "write_json",
    "write_jsonl",
    "write_text",
]
