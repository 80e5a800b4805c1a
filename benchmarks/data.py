"""The data path measured: preparation, memory, kills, a cluster, the loader, a huge store; beside their peers.

python benchmarks/data.py --tokenizer=DIR --input='corpus/*.jsonl.gz' --workdir=runs/data [--parts=prepare,loader,...]
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from watched import watched

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SEQ_LEN, BATCH = 4096, 64
GRAIN_ROWS = 20_000


def main() -> None:
    """Runs the parts asked for and prints a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--input", required=True, help="files with text, a few ten MB of it")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--parts", default="prepare,memory,kill,cluster,loader,huge")
    parser.add_argument("--copies", default="1,10,100", help="how often the corpus is repeated to see memory")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--cluster_python", default="", help="python of an environment with tanuki-jax[cluster]; empty = none")
    parser.add_argument("--maxtext", default="", help="python of an environment with MaxText 0.2.5; empty = none")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    print(f"# The data path, {time.strftime('%Y-%m-%d')}\n\n{platform.machine()}, {os.cpu_count()} cores\n", flush=True)
    parts = {"prepare": prepare, "memory": memory, "kill": kill, "cluster": cluster, "loader": loader, "huge": huge}
    for name in options.parts.split(","):
        print(f"## {name}\n", flush=True)
        parts[name](options)
        print(flush=True)


# --- preparation --------------------------------------------------------------------------------------------------------------


def plain(options: argparse.Namespace, copies: int) -> Path:
    """The corpus `copies` times over as one .jsonl file."""
    from tanuki_jax.data import sources

    path = options.workdir / f"corpus-{copies}.jsonl"
    if not path.is_file():
        rows = [json.dumps({"text": row.fields["text"]}, ensure_ascii=False) for row in sources.read_rows(options.input)]
        with path.open("w", encoding="utf-8") as f:
            for _ in range(copies):
                f.writelines(f"{row}\n" for row in rows)
    return path


def command(options: argparse.Namespace, source: str, output: Path, *flags: str) -> list[str]:
    """tanuki data prepare in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    base = [sys.executable, "-m", "tanuki_jax.cli", "data", "prepare", f"--tokenizer={options.tokenizer}"]
    return [*base, f"--input={source}", f"--output={output}", *flags]


def digest(store: Path) -> str:
    """SHA-256 over all files of a store."""
    total = hashlib.sha256()
    for path in sorted(store.iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def prepare(options: argparse.Namespace) -> None:
    """Tokens a second of preparation beside the tokenizers library's own batch encoding of the same documents."""
    import tokenizers

    from tanuki_jax.data import prepare as room
    from tanuki_jax.data import sources
    from tanuki_jax.data.tokenizer import Tokenizer

    source = plain(options, 1)
    texts = [row.fields["text"] for row in sources.read_rows(str(source))]
    raw = tokenizers.Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    ours = Tokenizer(options.tokenizer)
    print("| run | tokenizers, encode_batch_fast of whole documents, tokens/s | tanuki data prepare, tokens/s | ratio |")
    print("|---|---|---|---|")
    for run in range(3):
        began = time.monotonic()
        count = 0
        for start in range(0, len(texts), 100):
            count += sum(len(e) for e in raw.encode_batch_fast(texts[start : start + 100], add_special_tokens=False))
        theirs = count / (time.monotonic() - began)
        output = options.workdir / "store-here"
        shutil.rmtree(output, ignore_errors=True)
        began = time.monotonic()
        manifest = room.prepare(str(source), ours, output, workers=1)
        mine = manifest.tokens / (time.monotonic() - began)
        print(f"| {run + 1} | {theirs:,.0f} | {mine:,.0f} | {mine / theirs:.2f} |", flush=True)


def memory(options: argparse.Namespace) -> None:
    """Peak memory of the whole command against the size of its input."""
    print("| input, MB | seconds | peak memory of all processes, GiB |\n|---|---|---|")
    for copies in map(int, options.copies.split(",")):
        source = plain(options, copies)
        seconds, most, _ = watched(command(options, str(source), options.workdir / f"store-{copies}"))
        print(f"| {source.stat().st_size / 1e6:,.0f} | {seconds:.0f} | {most:.2f} |", flush=True)
        shutil.rmtree(options.workdir / f"store-{copies}")
        if copies > 1:
            source.unlink()


def kill(options: argparse.Namespace) -> None:
    """Kills the command at random moments until it is through; the store must have the bytes of an undisturbed one."""
    source, flags = str(plain(options, 1)), ("--shard_characters=1000000",)
    whole, broken = options.workdir / "store-whole", options.workdir / "store-killed"
    seconds, _, _ = watched(command(options, source, whole, *flags))
    arguments = command(options, source, broken, *flags)
    shutil.rmtree(broken.with_name(f".{broken.name}.partial"), ignore_errors=True)
    moments = random.Random(0)
    killed = 0
    for _ in range(options.kills):
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.3, 0.7) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    if not broken.is_dir():
        watched(arguments)
    print(f"killed {killed} times: {digest(broken)}, undisturbed: {digest(whole)}, same: {digest(broken) == digest(whole)}")


def cluster(options: argparse.Namespace) -> None:
    """The same store from datatrove's Ray executor with two workers on a local cluster."""
    if not options.cluster_python:
        print("no environment with tanuki-jax[cluster] was given")
        return
    source, flags = options.input, ("--shard_characters=1000000",)
    here, there = options.workdir / "store-local", options.workdir / "store-ray"
    watched(command(options, source, here, *flags, "--workers=2"))
    arguments = command(options, source, there, *flags, "--workers=2", "--executor=ray")
    seconds, _, _ = watched([options.cluster_python, *arguments[1:]])
    print(f"local: {digest(here)}, Ray: {digest(there)} ({seconds:.0f} s), same: {digest(here) == digest(there)}")


# --- loader -------------------------------------------------------------------------------------------------------------------


def loader(options: argparse.Namespace) -> None:
    """Tokens a second of one process from the page cache."""
    prefix = options.workdir / "random"
    if not prefix.with_suffix(".idx").is_file():
        _random_store(prefix, 120_000_000)
    size = 400
    print("| loader | tokens/s |\n|---|---|")
    print(f"| plain loop over a memory map, shuffled rows, stacked | {_rate(_memmap_loop(prefix, size)):,.0f} |", flush=True)
    for name, reset, sources in (
        ("one source", False, 1),
        ("two sources mixed", False, 2),
        ("twelve, weights down to 1e-6", False, 12),
        ("two, attention reset", True, 2),
    ):
        print(f"| tanuki_jax, {name} | {_rate(_ours(prefix, size, reset, sources)):,.0f} |", flush=True)
    records = options.workdir / "rows.array_record"
    if not records.is_file():
        _array_records(prefix, records)
    if not options.maxtext:
        print("| MaxText's Grain path | no environment was given |")
        return
    for name, rate in maxtext_rates(options, prefix, records):
        print(f"| {name} | {rate:,.0f} |", flush=True)


def _random_store(prefix: Path, tokens: int) -> None:
    from tanuki_jax.data.store import StoreWriter

    rng, writer = np.random.default_rng(0), StoreWriter(prefix, np.dtype(np.uint16))
    while tokens > 0:
        n = int(rng.integers(100, 2000))
        writer.add(rng.integers(13, 65_000, n, dtype=np.uint16))
        tokens -= n
    writer.close()


def _rate(batches: Iterator[dict[str, np.ndarray]]) -> float:
    next(batches)
    began, count = time.monotonic(), 0
    for batch in batches:
        count += next(iter(batch.values())).size
    return count / (time.monotonic() - began)


def _memmap_loop(prefix: Path, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """What one writes by hand: random rows of a memory map, targets shifted by one."""
    tokens = np.memmap(f"{prefix}.bin", np.uint16, "r")
    order = np.random.default_rng(0).permutation((len(tokens) - 1) // SEQ_LEN)
    for step in range(steps):
        rows = order[np.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        window = np.stack([tokens[r * SEQ_LEN : r * SEQ_LEN + SEQ_LEN + 1] for r in rows]).astype(np.int32)
        yield {"tokens": window[:, :-1], "targets": window[:, 1:]}


def _ours(prefix: Path, steps: int, reset: bool, sources: int) -> Iterator[dict[str, np.ndarray]]:
    from tanuki_jax.data import loader as room
    from tanuki_jax.data.layouts import Windows
    from tanuki_jax.data.mixture import StagedMixture
    from tanuki_jax.data.store import Store

    rows = Windows(Store(prefix), SEQ_LEN, reset, 65_024)
    weights = [0.7, 0.3] if sources == 2 else [10 ** (-6 * k / 11) for k in range(sources)] if sources > 2 else [1.0]
    mixture = StagedMixture([weights], [0], steps * BATCH)
    mixed = room.mixed_rows([room.Source(rows, seed) for seed in range(sources)], mixture)
    return room.host_batches(mixed, BATCH, range(BATCH), 0, steps)


def _array_records(prefix: Path, path: Path) -> None:
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_generated_pb2

    tokens = np.memmap(f"{prefix}.bin", np.uint16, "r")
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for row in range(GRAIN_ROWS):
        example = tf_example_generated_pb2.Example()
        example.features.feature["text"].int64_list.value.extend(tokens[row * SEQ_LEN : (row + 1) * SEQ_LEN].tolist())
        writer.write(example.SerializeToString())
    writer.close()


def maxtext_rates(options: argparse.Namespace, prefix: Path, records: Path) -> Iterator[tuple[str, float]]:
    """MaxText's own pipeline (grain_data_processing.py) in its own environment, on its two file types of tokens."""
    names = {"mmap": "Megatron .bin and .idx", "arrayrecord": "ArrayRecord of tf.Example"}
    for kind, path in (("mmap", prefix), ("arrayrecord", records)):
        arguments = [kind, str(path), str(SEQ_LEN), str(BATCH), "60", str(options.tokenizer), str(options.workdir / "maxtext")]
        done = subprocess.run([options.maxtext, "-c", MAXTEXT, *arguments], capture_output=True, text=True)
        rates = [line for line in done.stdout.splitlines() if line.startswith("rate ")]
        assert rates, done.stderr[-2000:]
        yield f"MaxText 0.2.5's Grain path, {names[kind]}", float(rates[-1].split()[1])


MAXTEXT = """
import os, pathlib, sys, time
os.environ["JAX_PLATFORMS"] = "cpu"
kind, files, S, B, steps, tokenizer, output = sys.argv[1:]
import maxtext
from maxtext.configs import pyconfig
from maxtext.input_pipeline import grain_data_processing as room
S, B, steps = int(S), int(B), int(steps)
options = dict(
    run_name="x", base_output_directory=output, dataset_type="grain", grain_train_files=files, grain_file_type=kind,
    per_device_batch_size=B, max_target_length=S, tokenize_train_data=False, train_data_columns="['text']", packing=False,
    mmap_eod_id=2, grain_worker_count=0, steps=steps, enable_checkpointing=False, log_config=False, vocab_size=65024,
    tokenizer_type="huggingface", tokenizer_path=tokenizer, add_bos=False, add_eos=False, skip_jax_distributed_system=True,
)
base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
config = pyconfig.initialize(["x", str(base), *(f"{k}={v}" for k, v in options.items())])
rows = room.get_datasets(
    files, kind, shuffle=True, shuffle_seed=0, shuffle_buffer_size=config.grain_shuffle_buffer_size, num_epoch=1,
    dataloading_host_index=0, dataloading_host_count=1, grain_worker_count=0, grain_num_threads=config.grain_num_threads,
    grain_prefetch_buffer_size=config.grain_prefetch_buffer_size, grain_data_source_max_workers=4,
    dataset_config=room._build_dataset_config(config, seed=0),
)
batches = iter(room.pretrain_preprocessing_pipeline(rows, config, ["text"], False, 0, config.grain_per_worker_buffer_size))
next(batches)
began, count = time.monotonic(), 0
for _, batch in zip(range(steps - 1), batches):
    count += batch["inputs"].size
print("rate", count / (time.monotonic() - began))
"""


def huge(options: argparse.Namespace) -> None:
    """A store of 1.3 trillion tokens (sparse files): time to open, time of a batch anywhere, memory; in its own process."""
    folder = options.workdir / "huge"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    per_shard, shards, documents = 65_000_000_000, 20, 1_000_000
    for k in range(shards):
        _sparse_shard(folder / f"shard-{k:02d}", per_shard, documents)
    done = subprocess.run([sys.executable, "-c", HUGE, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True)
    print(done.stdout.strip())
    shutil.rmtree(folder)


def _sparse_shard(prefix: Path, tokens: int, documents: int) -> None:
    with prefix.with_suffix(".bin").open("wb") as f:
        f.truncate(2 * tokens)
    lengths = np.full(documents, tokens // documents, np.int32)
    lengths[-1] += tokens - int(lengths.sum(dtype=np.int64))
    with prefix.with_suffix(".idx").open("wb") as f:
        f.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
        f.write(lengths.tobytes())
        f.write(((np.cumsum(lengths, dtype=np.int64) - lengths) * 2).tobytes())
        f.write(np.arange(documents + 1, dtype=np.int64).tobytes())


HUGE = """
import sys, time, resource, pathlib
began = time.monotonic()
from tanuki_jax.data import loader, layouts, packing
from tanuki_jax.data.mixture import StagedMixture
from tanuki_jax.data.store import Store
store = Store(*sorted({p.with_suffix("") for p in pathlib.Path(sys.argv[1]).glob("*.bin")}))
rows = layouts.Windows(store, 4096, True, 65_024)
steps = len(rows) // 64
mixed = loader.mixed_rows([loader.Source(rows, 1)], StagedMixture([[1.0]], [0], steps * 64))
next(loader.host_batches(mixed, 64, range(64), 0, 1))
print(f"{store.size:,} tokens, {store.documents:,} documents, {len(rows):,} rows, {steps:,} steps")
print(f"start to first batch, imports included: {time.monotonic() - began:.2f} s")
times = []
for step in (1, 1000, 10**6, steps // 3, steps - 1):
    began = time.monotonic()
    loader.stack([mixed[step * 64 + i] for i in range(64)])
    times.append(1000 * (time.monotonic() - began))
print("batches of 64 anywhere, ms: " + ", ".join(f"{t:.1f}" for t in times))
print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
"""

if __name__ == "__main__":
    main()
