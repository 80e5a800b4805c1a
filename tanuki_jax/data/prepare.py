"""Tokenizes files of text, dialogues, pairs or tokens into a token store: in parallel, resumable, in constant memory.

A corpus is cut into parts, each part is tokenized by the shard function (`shards.write_part`), and the manifest of the whole
is written at the end.  Until then all files lie in a hidden folder next to the output, from which the same command resumes.
"""

from __future__ import annotations

import concurrent.futures
import logging
import math
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from tanuki_jax import files
from tanuki_jax.data import chat, sources
from tanuki_jax.data.shards import Shard, Work, damaged_shard, finished_shards, prefixes, write_part
from tanuki_jax.data.store import Store
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tanuki_jax.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What may differ between two preparations of the same files."""

    fields: sources.Fields = sources.PLAIN
    skip_invalid: bool = False  # leave out bad rows, count and list them, instead of stopping at the first
    shard_characters: int = 100_000_000  # approximate text per shard; what is lost when the process is killed
    part_bytes: int = 1_000_000_000  # input that a worker reads at a time, where files can be cut


DEFAULT = Options()
CONVERSATIONS = ("dialogue", "pair")  # kinds of rows that are rendered with a chat template


class ShardEntry(TypedDict):
    """A shard in the manifest."""

    name: str
    documents: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a store holds.  kind: text, dialogue, pair (documents 2i and 2i+1 are chosen and rejected) or tokens."""

    kind: str
    rows: int
    documents: int
    tokens: int
    characters: int  # 0 where the input was tokens
    rejected: int  # invalid rows that were left out; rejected.jsonl lists them
    tokenizer: str  # fingerprint
    content: str  # fingerprint of all tokens
    shards: tuple[ShardEntry, ...]
    chat_version: int = 0  # chat.VERSION of dialogues and pairs

    def __str__(self) -> str:
        rate = f", {self.characters / max(self.tokens, 1):.3f} characters a token" if self.characters else ""
        rejected = f", {self.rejected:,} bad rows left out" if self.rejected else ""
        return f"{self.rows:,} {self.kind} rows, {self.tokens:,} tokens{rate}{rejected}"


@dataclass(frozen=True)
class Plan:
    """A corpus that is being prepared."""

    output: Path
    work: Work
    parts: tuple[sources.Part, ...]


def prepare(patterns: str, tokenizer: Tokenizer, output: Path, options: Options = DEFAULT, workers: int = 0) -> Manifest:
    """Tokenizes files into `output`: tokens-*.bin/.idx, for dialogues and pairs mask-*.bin/.idx too, and manifest.json.

    A text document ends with the end token.  Dialogues are rendered with the tokenizer's chat template; the mask is 1 on
    what the assistant says.  Megatron-LM's own .bin files are copied as they are, if the tokenizer has their ids.  All rows
    must be of one kind.  workers: processes, 0 = as many as are useful; the store is the same for any number.
    """
    check_workers(workers)
    output = Path(output)
    with lock.output(output), files.disk_errors(output, "data"):
        return _prepare(patterns, tokenizer, output, options, workers)


def check_workers(workers: int) -> None:
    """Refuses a negative number of processes or tasks."""
    if workers < 0:
        raise UserError(f"--workers: {workers} must be at least 0, which is as many as are of use")


def _prepare(patterns: str, tokenizer: Tokenizer, output: Path, options: Options, workers: int) -> Manifest:
    corpus = plan(patterns, tokenizer, output, options)
    if (corpus.work.directory / "manifest.json").is_file():
        return finish(corpus, tokenizer)
    processes = workers or _useful_workers(corpus)
    progress = Progress("tokenize", sum(part.size for part in corpus.parts), "MB", 1e6)
    try:
        if processes == 1:
            _write_here(corpus, tokenizer, progress)
        else:
            _write_in_processes(corpus, processes, progress)
    except UserError:
        if not finished_shards(corpus.work.directory):  # else a run with skip_invalid uses the finished ones
            shutil.rmtree(corpus.work.directory)
        raise
    return finish(corpus, tokenizer)


def plan(patterns: str, tokenizer: Tokenizer, output: Path, options: Options = DEFAULT) -> Plan:
    """Cuts a corpus into parts and makes the folder of its shards, or resumes the folder of an earlier run of the same work."""
    if options.shard_characters < 1:
        raise UserError(f"--shard_characters: {options.shard_characters} must be at least 1")
    kind = _kind(patterns, options)
    directory = output.parent / f".{output.name}.partial"
    work = Work(directory, tokenizer.directory, kind, options.fields, options.skip_invalid, options.shard_characters)
    identity = files.fingerprint(
        sources.identity(patterns),
        tokenizer.fingerprint,
        [kind, chat.VERSION if kind in CONVERSATIONS else 0, *options.fields, options.shard_characters, options.part_bytes],
    )
    identity_path = directory / "identity.json"
    if directory.is_dir() and not _same_work(identity_path, identity):
        shutil.rmtree(directory)  # other files, another tokenizer or other options
    damaged = damaged_shard(directory)
    if damaged:
        logger.warning("data: %s is damaged; %s is begun anew", damaged, output)
        shutil.rmtree(directory)
    if not options.skip_invalid and any(shard.rejected for shard in finished_shards(directory)):
        shutil.rmtree(directory)  # it left out invalid rows, which are errors in this run
    if not directory.is_dir():
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.filename}: {error.strerror}") from error
        files.write_json(identity_path, identity)
    return Plan(output, work, tuple(sources.parts(patterns, options.part_bytes)))


def _same_work(path: Path, identity: str) -> bool:
    try:
        return path.is_file() and files.read_json(path) == identity
    except UserError:
        return False


def finish(corpus: Plan, tokenizer: Tokenizer) -> Manifest:
    """Writes the manifest of a corpus whose parts are all done, and publishes the store under its name."""
    directory = corpus.work.directory
    if (directory / "manifest.json").is_file():  # killed in `_publish`
        return _publish(corpus)
    undone = [i for i in range(len(corpus.parts)) if not (directory / f"{i:05d}.done").is_file()]
    if undone:
        raise UserError(
            f"data: {len(undone)} of {len(corpus.parts)} parts of {corpus.output} are not done; run the command again"
        )
    shards = finished_shards(directory)
    manifest = _manifest(corpus.work, shards, tokenizer)
    if not manifest.tokens:
        shutil.rmtree(directory)
        raise UserError(f"data: {corpus.output}: no good rows; the corpus is empty ({manifest.rejected} bad ones)")
    if manifest.rejected:
        files.write_jsonl(directory / "rejected.jsonl", (reason for shard in shards for reason in shard.reasons))
    files.write_json(directory / "manifest.json", asdict(manifest))
    return _publish(corpus)


def _publish(corpus: Plan) -> Manifest:
    """Removes the files that only the work needs, its identity last, and moves the folder to the output."""
    lock.check()
    directory = corpus.work.directory
    for name in ("*.done", "?????-?????.json", ".*", "identity.json"):
        for path in directory.glob(name):
            path.unlink()
    if corpus.output.is_dir():
        shutil.rmtree(corpus.output)
    directory.replace(corpus.output)
    return read_manifest(corpus.output)


def _manifest(work: Work, shards: Sequence[Shard], tokenizer: Tokenizer) -> Manifest:
    nonempty = [shard for shard in shards if shard.documents]
    return Manifest(
        work.kind,
        sum(shard.rows for shard in shards),
        sum(shard.documents for shard in shards),
        sum(shard.tokens for shard in shards),
        0 if work.kind == "tokens" else sum(shard.characters for shard in shards),
        sum(shard.rejected for shard in shards),
        tokenizer.fingerprint,
        files.fingerprint([shard.sha256 for shard in nonempty]),
        shards=tuple(ShardEntry(name=s.name, documents=s.documents, tokens=s.tokens, sha256=s.sha256) for s in nonempty),
        chat_version=chat.VERSION if work.kind in CONVERSATIONS else 0,
    )


def _kind(patterns: str, options: Options) -> str:
    """The kind of the first valid row; where there is none, of the first row that has a kind."""
    first = ""
    for row in sources.read_rows(patterns, options.fields, sources.skip_silently if options.skip_invalid else None):
        try:
            kind = sources.kind_of(row)
            first = first or kind
            answered = kind != "dialogue" or any(message["role"] == "assistant" for message in row.fields["messages"])
            if kind == "tokens" or not options.skip_invalid or (text_of(row) and answered):
                return kind
        except UserError:
            if not options.skip_invalid:
                raise
    if first:
        return first
    raise UserError(f"data: {patterns} holds no rows; the corpus is empty")


# --- on this machine ----------------------------------------------------------------------------------------------------


def _useful_workers(corpus: Plan) -> int:
    """How many processes are useful: text is encoded by threads of the tokenizer, dialogues and pairs by Python."""
    cores = os.cpu_count() or 1
    return min(len(corpus.parts), math.ceil(cores / 4) if corpus.work.kind in ("text", "tokens") else cores)


def _write_here(corpus: Plan, tokenizer: Tokenizer, progress: Progress) -> None:
    before = 0
    for number, part in enumerate(corpus.parts):

        def show(read: int, before: int = before) -> None:
            progress.show(before + read)

        write_part(corpus.work, number, part, tokenizer, show)
        before += part.size
        progress.show(before)


def _write_in_processes(corpus: Plan, workers: int, progress: Progress) -> None:
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _use_threads, (threads,)) as pool:
        futures = {pool.submit(write_part, corpus.work, i, part): part for i, part in enumerate(corpus.parts)}
        read = 0
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                lock.check()
                read += futures[future].size
                progress.show(read)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _use_threads(threads: int) -> None:
    lock.end_with_parent()
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by the tokenizers library


# --- stores ----------------------------------------------------------------------------------------------------


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a store."""
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        raise UserError(f"token store: {directory} has no manifest.json; make it with `tanuki data prepare`")
    try:
        manifest = Manifest(**files.read_json(path))
        if not all(isinstance(shard, dict) and "name" in shard for shard in manifest.shards):
            raise TypeError("shards without names")
        return manifest
    except TypeError as error:
        raise UserError(f"token store: {path} is of another version ({error}); prepare it again") from error


def is_current_version(manifest: Manifest) -> bool:
    """Whether the conversations of a store are encoded as this version encodes them."""
    return manifest.kind not in CONVERSATIONS or manifest.chat_version == chat.VERSION


def open_store(directory: Path) -> tuple[Manifest, Store, Store | None]:
    """Manifest, tokens, and the mask where there is one.  PATH.bin is a store of Megatron-LM without a manifest."""
    directory = Path(directory)
    if directory.suffix == ".bin":
        store = Store(directory.with_suffix(""))
        content = files.fingerprint([store.size, store.documents], directory.with_suffix(".idx"))
        return Manifest("tokens", store.documents, store.documents, store.size, 0, 0, "", content, ()), store, None
    manifest = read_manifest(directory)
    names = [shard["name"] for shard in manifest.shards]
    store = Store(*prefixes(directory, names))
    if store.size != manifest.tokens:
        raise UserError(f"token store: {directory} holds {store.size} tokens, its manifest {manifest.tokens}; prepare it again")
    masked = manifest.kind in CONVERSATIONS
    return manifest, store, Store(*prefixes(directory, names, "mask")) if masked else None


def text_of(row: sources.Row) -> str:
    """The text of a row as a model would see it, without special tokens."""
    if sources.kind_of(row) == "text":
        return row.fields["text"]
    try:
        return chat.text_of(row.fields)
    except UserError as error:
        raise UserError(f"data: {row.where}: {error}") from error
