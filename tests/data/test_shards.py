import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from tanuki_jax.data import prepare, shards, sources
from tanuki_jax.data.store import StoreWriter
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError

DIALOGUE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
COUNT = 7
ROWS = {
    "text": [{"text": f"{i} 狸が山に住む。"} for i in range(COUNT)],
    "pair": [{"prompt": "q", "chosen": f"{i}", "rejected": "b"} for i in range(COUNT)],
}


class Killed(BaseException):
    """Nothing catches it, so that a run ends where it is raised as if it were killed."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_ROWS", 2)


@pytest.fixture
def kill(monkeypatch):
    """Makes a run end at its n-th step: before a row is read or encoded, a document added, a file named or removed."""
    steps = {"left": None}

    def before(owner, name):
        whole = getattr(owner, name)

        def counted(*args, **kwargs):
            if steps["left"] is not None:
                steps["left"] -= 1
                if steps["left"] < 0:
                    raise Killed
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in (
        (sources, "_row"),
        (Tokenizer, "encode_batch"),
        (StoreWriter, "add"),
        (StoreWriter, "close"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
    ):
        before(owner, name)

    def at(step):
        steps["left"] = step

    return at


def lines_of(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def corpus(folder, kind="text", with_invalid=False):
    """Files that make several parts of several shards each, with invalid rows and a damaged file or without."""
    folder.mkdir(exist_ok=True)
    rows = ROWS[kind]
    (folder / "a.jsonl").write_text(lines_of(rows[:5] + ["moon"] * with_invalid + rows[5:6]))
    (folder / "b.jsonl").write_text(lines_of(["moon", {"title": "a"}] * with_invalid + rows[6:]))
    if with_invalid:
        (folder / "c.jsonl.gz").write_bytes(b"no gzip")
        (folder / "d.jsonl").write_text(lines_of(rows[:2]))
    return f"{folder}/*"


def options(skip_invalid=False, shard_characters=1, part_bytes=200):
    return prepare.Options(skip_invalid=skip_invalid, shard_characters=shard_characters, part_bytes=part_bytes)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(folder):
    store = prepare.open_store(folder)[1]
    return [store.document(i).tolist() for i in range(store.documents)]


def killed(kill, step, *args):
    """Whether a run that ends at this step was not done before."""
    kill(step)
    try:
        prepare.prepare(*args, workers=1)
    except Killed:
        return True
    finally:
        kill(None)
    return False


def test_shards_are_about_as_large_as_asked_and_together_the_same_tokens(tokenizer, tmp_path):
    text = corpus(tmp_path / "in")
    by_size = {}
    for size in (1, 20, 50, 1 << 30):
        manifest = prepare.prepare(text, tokenizer, tmp_path / "store", options(shard_characters=size), workers=1)
        by_size[size] = documents(tmp_path / "store")
        counts = [shard["documents"] for shard in manifest.shards]
        assert [shard["name"][:5] for shard in manifest.shards] == sorted(shard["name"][:5] for shard in manifest.shards)
        assert sum(counts) == COUNT and max(counts) <= max(2, size // 5)  # a shard is at least a chunk
    assert list(by_size.values()) == [[[*tokenizer.encode(row["text"]), tokenizer.eos] for row in ROWS["text"]]] * 4


@pytest.mark.parametrize(("kind", "with_invalid"), [("text", True), pytest.param("pair", False, marks=pytest.mark.slow)])
def test_killed_at_any_step_and_run_again_the_store_has_the_same_bytes(tokenizer, tmp_path, kill, kind, with_invalid):
    text, folder = corpus(tmp_path / "in", kind, with_invalid), tmp_path / "out"
    run_options = options(skip_invalid=with_invalid, part_bytes=300)
    prepare.prepare(text, tokenizer, tmp_path / "whole", run_options, workers=1)
    expected = contents(tmp_path / "whole")
    assert len(expected) > 10
    wrong = []
    for step in itertools.count():
        if folder.exists():
            shutil.rmtree(folder)
        if not killed(kill, step, text, tokenizer, folder / "store", run_options):
            break
        prepare.prepare(text, tokenizer, folder / "store", run_options, workers=1)
        if contents(folder / "store") != expected or [path.name for path in folder.iterdir()] != ["store"]:
            wrong.append(step)
    assert step > 40 and not wrong


def test_killed_again_and_again_it_comes_to_an_end_with_the_same_bytes(tokenizer, tmp_path, kill):
    text = corpus(tmp_path / "in", with_invalid=True)
    prepare.prepare(text, tokenizer, tmp_path / "whole", options(True), workers=1)
    runs = 1
    while killed(kill, 25, text, tokenizer, tmp_path / "store", options(True)):
        runs += 1
    assert 3 < runs < 40 and contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_the_store_is_the_same_for_one_worker_and_two(tokenizer, tmp_path, monkeypatch):
    monkeypatch.undo()  # processes have the chunks of the package
    for i in range(2):
        rows = [{"text": f"{n}"} if n % 100 else "moon" for n in range(1000 + 5000 * i)]
        (tmp_path / f"{i}.jsonl").write_text(lines_of(rows))
    for workers in (1, 2):
        run_options = options(True, part_bytes=110_000)
        prepare.prepare(f"{tmp_path}/*.jsonl", tokenizer, tmp_path / str(workers), run_options, workers)
    store = contents(tmp_path / "1")
    assert store == contents(tmp_path / "2")
    assert {"tokens-00000-00000.bin", "tokens-00001-00001.bin", "rejected.jsonl"} <= set(store)


def test_an_error_in_a_process_names_the_row_and_a_run_that_skips_it_goes_on(tokenizer, tmp_path):
    text = corpus(tmp_path / "in")
    with (tmp_path / "in" / "b.jsonl").open("a") as f:
        f.write("moon\n")
    with pytest.raises(UserError, match=r"b\.jsonl.* is not JSON"):
        prepare.prepare(text, tokenizer, tmp_path / "store", options(), workers=2)
    assert not (tmp_path / "store").exists()
    assert prepare.prepare(text, tokenizer, tmp_path / "store", options(True), workers=1).rejected == 1
    assert len(documents(tmp_path / "store")) == COUNT


@pytest.fixture
def begun(tokenizer, tmp_path, kill):
    """A corpus of which some shards are finished, and when those were written."""
    text = corpus(tmp_path / "in")
    steps = itertools.count(10)
    while len(list(tmp_path.glob(".store.partial/?????-?????.json"))) < 2:
        assert killed(kill, next(steps), text, tokenizer, tmp_path / "store", options())
    return text, written(tmp_path / ".store.partial")


def written(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("tokens-*.bin")}


def test_finished_shards_are_not_written_again(tokenizer, tmp_path, begun):
    text, before = begun
    prepare.prepare(text, tokenizer, tmp_path / "store", options(), workers=1)
    after = written(tmp_path / "store")
    unchanged = [name for name, state in before.items() if after[name] == state]
    assert len(unchanged) >= 2 and len(after) > len(before)
    assert documents(tmp_path / "store") == [[*tokenizer.encode(row["text"]), tokenizer.eos] for row in ROWS["text"]]


def another_tokenizer(tokenizer, folder):
    folder.mkdir()
    for path in tokenizer.directory.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("指示", "質問"), encoding="utf-8")
    return Tokenizer(folder)


@pytest.mark.parametrize("change", ["input", "another file", "tokenizer", "shard_characters", "part_bytes"])
def test_what_was_begun_with_other_files_or_options_is_begun_anew(tokenizer, tmp_path, begun, change):
    text, before = begun
    changed = {"shard_characters": options(shard_characters=2), "part_bytes": options(part_bytes=190)}.get(change, options())
    if change == "input":
        (tmp_path / "in" / "a.jsonl").write_text(lines_of([{"text": "moon"}] * 4))
    if change == "another file":
        (tmp_path / "in" / "c.jsonl").write_text(lines_of([{"text": "moon"}]))
    if change == "tokenizer":
        tokenizer = another_tokenizer(tokenizer, tmp_path / "tokenizer")
    manifest = prepare.prepare(text, tokenizer, tmp_path / "store", changed, workers=1)
    assert not set(written(tmp_path / "store").items()) & set(before.items())
    rows = [row.fields["text"] for row in sources.read_rows(text)]
    assert documents(tmp_path / "store") == [[*tokenizer.encode(row), tokenizer.eos] for row in rows]
    assert manifest.tokenizer == tokenizer.fingerprint


def test_a_store_of_tokens_whose_index_changed_is_begun_anew(tokenizer, tmp_path, kill):
    def write(lengths):
        writer = StoreWriter(tmp_path / "rows", "<u2")
        for length in lengths:
            writer.add([1] * length)
        writer.close()

    write([6] * 5)
    state = (tmp_path / "rows.bin").stat()
    run = (str(tmp_path / "rows.bin"), tokenizer, tmp_path / "store", options())
    for step in range(5, 40):
        if not killed(kill, step, *run) or list(tmp_path.glob(".store.partial/*-00000.json")):
            break
    write([3] * 10)  # the same tokens, cut otherwise
    os.utime(tmp_path / "rows.bin", ns=(state.st_atime_ns, state.st_mtime_ns))
    prepare.prepare(*run, workers=1)
    assert [len(document) for document in documents(tmp_path / "store")] == [3] * 10


def test_an_error_after_finished_shards_keeps_them_for_a_run_that_skips_bad_rows(tokenizer, tmp_path):
    text = corpus(tmp_path / "in")
    (tmp_path / "in" / "c.jsonl").write_text(lines_of(["moon", *ROWS["text"][:2]]))
    for _ in range(2):
        with pytest.raises(UserError, match=r"c\.jsonl:1 is not JSON"):
            prepare.prepare(text, tokenizer, tmp_path / "store", options(), workers=1)
    before = written(tmp_path / ".store.partial")
    manifest = prepare.prepare(text, tokenizer, tmp_path / "store", options(True), workers=1)
    assert len(before) > 2 and before.items() <= written(tmp_path / "store").items()
    assert (manifest.rows, manifest.rejected) == (COUNT + 2, 1)


def test_a_run_that_does_not_skip_bad_rows_says_so_even_where_one_that_did_was_killed(tokenizer, tmp_path, kill):
    text = corpus(tmp_path / "in")
    (tmp_path / "in" / "0.jsonl").write_text(lines_of([*ROWS["text"][:1], "moon", *ROWS["text"] * 2]))
    steps = itertools.count(10)
    while not list(tmp_path.glob(".store.partial/00000-00000.json")):
        assert killed(kill, next(steps), text, tokenizer, tmp_path / "store", options(True))
    with pytest.raises(UserError, match=r"0\.jsonl"):
        prepare.prepare(text, tokenizer, tmp_path / "store", options(), workers=1)


def test_a_part_that_is_done_is_not_read_again(tokenizer, tmp_path, monkeypatch):
    plan = prepare.plan(corpus(tmp_path / "in"), tokenizer, tmp_path / "store", options())
    for number, part in enumerate(plan.parts):
        shards.write_part(plan.work, number, part)
    monkeypatch.setattr(sources, "read_part", None)
    for number, part in enumerate(plan.parts):
        shards.write_part(plan.work, number, part)
    assert prepare.finish(plan, tokenizer).rows == COUNT


def test_a_part_says_how_many_of_its_bytes_are_read(tokenizer, tmp_path):
    plan = prepare.plan(corpus(tmp_path / "in"), tokenizer, tmp_path / "store", options(part_bytes=1 << 30))
    shown = []
    shards.write_part(plan.work, 0, plan.parts[0], tokenizer, shown.append)
    size = sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    assert shown == sorted(shown) and len(shown) > 2 and shown[-1] == plan.parts[0].size == size
