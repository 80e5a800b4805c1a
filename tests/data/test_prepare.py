import contextlib
import errno
import gzip
import hashlib
import json
import resource
import shutil
from dataclasses import asdict, replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tanuki_jax import files
from tanuki_jax.data import chat, prepare, shards, sources
from tanuki_jax.data.store import Store, StoreWriter
from tanuki_jax.errors import UserError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TEXTS = [{"text": "狸が山に住む。"}, {"text": " 。"}, {"text": "moon\n"}]
DIALOGUES = [{"messages": [user("a"), assistant("b")] * n} for n in (1, 2, 3)]
PAIRS = [
    {"prompt": p, "chosen": "良い", "rejected": [assistant("悪い")]} for p in ("q", [user("r"), assistant("s"), user("t")])
]
KINDS = {"text": TEXTS, "dialogue": DIALOGUES, "pair": PAIRS}
SKIP = prepare.Options(skip_invalid=True)


def lines_of(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture
def prepare_rows(tokenizer, tmp_path):
    def make(rows, options=prepare.DEFAULT):
        path = tmp_path / "rows.jsonl"
        path.write_text(lines_of(rows), encoding="utf-8")
        manifest = prepare.prepare(str(path), tokenizer, tmp_path / "store", options, workers=1)
        return manifest, *prepare.open_store(tmp_path / "store")[1:]

    return make


@pytest.fixture
def megatron(tmp_path):
    """A store as Megatron-LM's tools leave it, and the path that one names."""

    def make(documents, dtype=np.uint16, name="tokens"):
        writer = StoreWriter(tmp_path / name, np.dtype(dtype))
        for document in documents:
            writer.add(document)
        writer.close()
        return str(tmp_path / f"{name}.bin")

    return make


def documents(store):
    return [store.document(i).tolist() for i in range(store.documents)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_text_document_is_its_tokens_and_the_end_token(prepare_rows, tokenizer):
    manifest, tokens, mask = prepare_rows(TEXTS)
    assert documents(tokens) == [[*tokenizer.encode(row["text"]), tokenizer.eos] for row in TEXTS]
    assert manifest.kind == "text" and mask is None and tokens.dtype == np.uint16


def test_a_dialogue_has_a_mask_of_the_same_shape(prepare_rows, tokenizer):
    manifest, tokens, mask = prepare_rows(DIALOGUES)
    expected = [chat.encode_dialogue(tokenizer, row["messages"]) for row in DIALOGUES]
    assert list(zip(documents(tokens), documents(mask), strict=True)) == expected
    assert manifest.kind == "dialogue" and mask.dtype == np.uint8


def test_pairs_are_interleaved_chosen_first(prepare_rows, tokenizer):
    manifest, tokens, mask = prepare_rows(PAIRS)
    expected = [side for row in PAIRS for side in chat.encode_pair(tokenizer, row)]
    assert list(zip(documents(tokens), documents(mask), strict=True)) == expected
    assert (manifest.kind, manifest.rows, manifest.documents) == ("pair", 2, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_characters", [1, 1 << 30])
def test_the_manifest_counts_what_is_in_the_store(prepare_rows, tokenizer, tmp_path, monkeypatch, kind, shard_characters):
    monkeypatch.setattr(shards, "CHUNK_ROWS", 1)
    rows, folder = KINDS[kind], tmp_path / "store"
    manifest, tokens, _ = prepare_rows(rows, prepare.Options(shard_characters=shard_characters))
    assert json.loads((folder / "manifest.json").read_text()) == json.loads(json.dumps(asdict(manifest)))
    assert prepare.read_manifest(folder) == replace(manifest, shards=list(manifest.shards))
    assert (manifest.rows, manifest.documents, manifest.tokens) == (len(rows), tokens.documents, tokens.size)
    assert (manifest.kind, manifest.rejected, manifest.tokenizer) == (kind, 0, tokenizer.fingerprint)
    assert len(manifest.shards) == (len(rows) if shard_characters == 1 else 1)
    for number, shard in enumerate(manifest.shards):
        name = f"00000-{number:05d}"
        alone = Store(folder / f"tokens-{name}")  # as Megatron-LM would open it
        hashed = hashlib.sha256((folder / f"tokens-{name}.bin").read_bytes()).hexdigest()
        assert shard == {"name": name, "documents": alone.documents, "tokens": alone.size, "sha256": hashed}
    assert manifest.content == files.fingerprint([shard["sha256"] for shard in manifest.shards])
    assert manifest.characters == sum(len(prepare.text_of(sources.Row("", row))) for row in rows)
    stems = ["tokens"] if kind == "text" else ["mask", "tokens"]
    names = [f"{stem}-{shard['name']}{suffix}" for stem in stems for shard in manifest.shards for suffix in (".bin", ".idx")]
    assert sorted(contents(folder)) == sorted(["manifest.json", *names])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "store"]


@pytest.mark.parametrize("setting", ["CHUNK", "CHUNK_ROWS"])
def test_rows_beyond_a_chunk_are_all_there_in_order(prepare_rows, tokenizer, monkeypatch, setting):
    monkeypatch.setattr(shards, setting, 4)
    manifest, tokens, _ = prepare_rows([{"text": str(i)} for i in range(11)])
    assert [tokenizer.decode(ids[:-1]) for ids in documents(tokens)] == [str(i) for i in range(11)] and manifest.rows == 11


@pytest.mark.parametrize("part_bytes", [50, 500, 1 << 30])
def test_every_format_and_any_size_of_parts_gives_the_same_tokens(tokenizer, tmp_path, part_bytes):
    rows = [{"meta": {"body": f"{i} 狸が山に住む。\nmoon"}} for i in range(40)]
    (tmp_path / "a.jsonl").write_text(lines_of(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(rows).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=9)
    options = prepare.Options(sources.Fields("meta.body"), part_bytes=part_bytes)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        manifest = prepare.prepare(str(tmp_path / name), tokenizer, tmp_path / f"{name}-store", options, workers=1)
        store = prepare.open_store(tmp_path / f"{name}-store")[1]
        assert documents(store) == [[*tokenizer.encode(row["meta"]["body"]), tokenizer.eos] for row in rows]
        if part_bytes == 50:
            assert len(manifest.shards) == {"a.jsonl": 40, "b.jsonl.gz": 1, "c.parquet": 5}[name]


def test_a_document_of_megabytes_on_one_line_or_on_many_comes_back(prepare_rows, tokenizer):
    texts = ["狸が山に住む。" * 150_000, "The moon, 3 miles away.\n" * 6_000, "moon"]  # longer than what is encoded together
    _, tokens, _ = prepare_rows([{"text": text} for text in texts])
    assert [tokenizer.decode(ids[:-1]) for ids in documents(tokens)] == texts


# --- tokens as input --------------------------------------------------------------------------------------------------------


def test_tokens_of_megatron_are_taken_as_they_are(tokenizer, megatron, tmp_path):
    documents_given = [[1, 2, 3], [tokenizer.vocab_size - 1], [0, 5]]
    manifest = prepare.prepare(megatron(documents_given, np.int64), tokenizer, tmp_path / "store", workers=1)
    store = prepare.open_store(tmp_path / "store")[1]
    assert documents(store) == documents_given and store.dtype == np.uint16
    assert (manifest.kind, manifest.rows, manifest.characters) == ("tokens", 3, 0)
    assert (tmp_path / "store" / "tokens-00000-00000.bin").read_bytes() == np.array(sum(documents_given, []), "<u2").tobytes()


@pytest.mark.parametrize(("bad", "dtype"), [(None, np.uint16), (70_000, np.int32), (-1, np.int32), ((1 << 32) + 5, np.int64)])
def test_an_id_that_the_tokenizer_does_not_have_is_an_error_or_a_rejected_document(tokenizer, megatron, tmp_path, bad, dtype):
    bad = tokenizer.vocab_size if bad is None else bad
    path = megatron([[1, 2], [3, bad, 4], [5]], dtype)
    with pytest.raises(UserError, match=rf"tokens\.bin, document 1.*id {bad}, the tokenizer has {tokenizer.vocab_size}"):
        prepare.prepare(path, tokenizer, tmp_path / "store", workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokens.bin", "tokens.idx"]
    manifest = prepare.prepare(path, tokenizer, tmp_path / "store", SKIP, workers=1)
    assert documents(prepare.open_store(tmp_path / "store")[1]) == [[1, 2], [5]] and manifest.rejected == 1


def test_an_empty_document_of_tokens_is_an_error_or_a_rejected_one(tokenizer, megatron, tmp_path):
    path = megatron([[1], [], [2]])
    with pytest.raises(UserError, match=r"document 1.*empty document"):
        prepare.prepare(path, tokenizer, tmp_path / "store", workers=1)
    assert prepare.prepare(path, tokenizer, tmp_path / "store", SKIP, workers=1).rejected == 1


RAGGED = [[[1], [2, 3]], [[1, 2], [3, 4]], [1.5, 2], [1 << 80], [None], ["a"], [True], {"a": 1}, "狸", [-1], [70_000]]


@pytest.mark.parametrize("tokens", RAGGED, ids=str)
def test_what_is_no_list_of_ids_is_one_line_or_a_rejected_row(prepare_rows, tmp_path, tokens):
    with pytest.raises(UserError, match=r"rows\.jsonl:2: (tokens must be a list of ids|holds id)") as caught:
        prepare_rows([{"tokens": [1, 2]}, {"tokens": tokens}])
    assert "\n" not in str(caught.value)
    assert prepare_rows([{"tokens": [1, 2]}, {"tokens": tokens}], SKIP)[0].rejected == 1


@pytest.mark.parametrize("row", [{"tokens": [1, 2, 3]}, {"tokens": 3}, {"text": None, "tokens": 3}])
def test_tokens_in_a_line_are_taken_or_refused_by_the_name_of_the_line(prepare_rows, tmp_path, row):
    try:
        _, tokens, _ = prepare_rows([row])
    except UserError as error:
        assert "rows.jsonl:1" in str(error)
        assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    else:
        assert documents(tokens) == [row["tokens"]]


def test_a_store_of_megatron_is_opened_without_a_manifest(megatron, tmp_path):
    path = megatron([[1, 2, 3], [4]])
    manifest, store, mask = prepare.open_store(path)
    assert documents(store) == [[1, 2, 3], [4]] and mask is None
    assert (manifest.kind, manifest.documents, manifest.tokens, manifest.tokenizer) == ("tokens", 2, 4, "")
    again = prepare.open_store(megatron([[1, 2, 3], [4]], name="again"))[0]
    other = prepare.open_store(megatron([[1, 2], [3, 4]], name="other"))[0]
    assert manifest.content == again.content != other.content


# --- bad rows ---------------------------------------------------------------------------------------------------------------

VALID = {"text": "a"}
INVALID = {
    "kinds mixed": ([VALID, DIALOGUES[0]], ":2.*one source per kind"),
    "no known field": ([VALID, {"title": "a"}], ":2.*neither text"),
    "no JSON": ([VALID, "moon"], ":2 is not JSON"),
    "an empty document": ([VALID, {"text": ""}], ":2.*empty document.*--skip_invalid"),
    "white space only": ([VALID, {"text": "\u3000\n \n"}], ":2.*empty document"),
    "an empty document first": ([{"text": ""}, VALID], ":1.*empty document"),
    "no assistant turn": ([DIALOGUES[0], {"messages": [user("a")]}], ":2.*without an assistant turn"),
    "no messages": ([DIALOGUES[0], {"messages": []}], ":2.*conversation is empty"),
    "unknown role": (
        [DIALOGUES[0], {"messages": [{"role": "bot", "content": "a"}]}],
        ":2.*message 0 .role .bot.. does not come out",
    ),
    "prompt neither text nor messages": ([PAIRS[0], {"prompt": 5, "chosen": "a", "rejected": "b"}], ":2"),
    "an answer that is no message": ([PAIRS[0], {"prompt": "a", "chosen": [5], "rejected": "b"}], ":2.*message 0 must be"),
    "lone surrogate in a text": ([VALID, {"text": "\ud800"}], ":2.*surrogate"),
    "lone surrogate in a dialogue": ([DIALOGUES[0], {"messages": [user("\ud800"), assistant("a")]}], ":2.*surrogate"),
    "no rows": ([], ".*corpus is empty"),
}


@pytest.mark.parametrize("case", INVALID)
def test_a_bad_row_is_an_error_that_names_its_line_and_nothing_is_left(prepare_rows, tmp_path, case):
    rows, message = INVALID[case]
    with pytest.raises(UserError, match=f"rows.jsonl{message}"):
        prepare_rows(rows)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("case", [case for case in INVALID if case != "no rows"])
def test_with_skip_invalid_it_is_left_out_counted_and_listed(prepare_rows, tmp_path, case):
    rows, message = INVALID[case]
    number = 0 if case.endswith("first") else 1
    good = [row for i, row in enumerate(rows) if i != number]
    prepare_rows(good)
    expected = contents(tmp_path / "store")
    manifest, _, _ = prepare_rows(rows, SKIP)
    found = contents(tmp_path / "store")
    listed = [json.loads(line) for line in found.pop("rejected.jsonl").decode().splitlines()]
    assert [row["where"] for row in listed] == [f"{tmp_path}/rows.jsonl:{number + 1}"] and set(listed[0]) == {"where", "reason"}
    assert listed[0]["reason"] and not listed[0]["reason"].startswith(("data", str(tmp_path), ":", " "))
    assert manifest.rejected == 1 and "1 bad rows left out" in str(manifest)
    before, after = (json.loads(named.pop("manifest.json")) for named in (expected, found))
    assert found == expected and after == {**before, "rejected": 1}


@pytest.mark.parametrize("bad", [{"title": "a"}, "moon", {"text": ""}, {"text": None}, "[]"])
def test_with_skip_invalid_the_first_rows_may_be_bad_too(prepare_rows, tokenizer, bad):
    manifest, tokens, _ = prepare_rows([bad, bad, *TEXTS], SKIP)
    assert documents(tokens) == [[*tokenizer.encode(row["text"]), tokenizer.eos] for row in TEXTS] and manifest.rejected == 2


@pytest.mark.parametrize("kind", KINDS)
def test_bad_rows_anywhere_change_nothing_of_the_good_ones(prepare_rows, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(shards, "CHUNK_ROWS", 3)
    rows = KINDS[kind] * 4
    bad = ["moon", {"title": "a"}, {"messages": [user("a")]}, {"prompt": 5, "chosen": "a", "rejected": "b"}, {"text": ""}]
    mixed = [row for i, good in enumerate(rows) for row in [good, *[bad[i % len(bad)]] * (i % 3)]]
    clean, tokens, mask = prepare_rows(rows, prepare.Options(shard_characters=1))
    expected = documents(tokens), mask and documents(mask)
    manifest, tokens, mask = prepare_rows(mixed, prepare.Options(shard_characters=1, skip_invalid=True))
    assert (documents(tokens), mask and documents(mask)) == expected
    assert manifest.rejected == len(mixed) - len(rows) and manifest.rows == clean.rows
    assert manifest.characters == clean.characters
    listed = [json.loads(line)["where"] for line in (tmp_path / "store" / "rejected.jsonl").read_text().splitlines()]
    assert sorted(listed) == sorted(f"{tmp_path}/rows.jsonl:{n}" for n, row in enumerate(mixed, 1) if row in bad)


def test_of_very_many_bad_rows_all_are_counted_and_some_are_listed(prepare_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "REASONS", 5)
    monkeypatch.setattr(shards, "CHUNK_ROWS", 4)
    manifest, _, _ = prepare_rows([VALID, *["moon"] * 30, VALID], SKIP)
    assert (manifest.rows, manifest.rejected) == (2, 30)
    assert len((tmp_path / "store" / "rejected.jsonl").read_text().splitlines()) == 5


def test_nothing_but_bad_rows_is_an_error_that_counts_them_and_leaves_nothing(prepare_rows, tmp_path):
    with pytest.raises(UserError, match=r"no good rows.*2 bad ones"):
        prepare_rows([{"text": ""}] * 2, SKIP)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("part_bytes", [100, 1 << 30], ids=["cut", "whole"])
@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl.gz", "b.txt"])
def test_a_damaged_file_is_an_error_that_leaves_nothing_or_one_bad_row(tokenizer, tmp_path, name, part_bytes):
    (tmp_path / "a.jsonl").write_text(lines_of(TEXTS))
    (tmp_path / name).write_bytes(b"\xff" * 1000)
    run = (f"{tmp_path}/a.jsonl,{tmp_path}/{name}", tokenizer, tmp_path / "store")
    with pytest.raises(UserError, match=name):
        prepare.prepare(*run, prepare.Options(part_bytes=part_bytes), workers=1)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name not in (".store.partial", "store")) == ["a.jsonl", name]
    if part_bytes > 100:  # else the first file's shard is finished, and kept
        assert not (tmp_path / ".store.partial").exists()
    manifest = prepare.prepare(*run, prepare.Options(part_bytes=part_bytes, skip_invalid=True), workers=1)
    assert (manifest.rows, manifest.rejected) == (3, 1)
    assert name in (tmp_path / "store" / "rejected.jsonl").read_text()


def test_an_error_leaves_the_store_that_was_there(prepare_rows, tmp_path):
    prepare_rows(TEXTS)
    before = contents(tmp_path / "store")
    with pytest.raises(UserError):
        prepare_rows([VALID, {"title": "a"}])
    assert contents(tmp_path / "store") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "store"]


def test_preparing_again_replaces_the_store_whole(prepare_rows, tmp_path):
    prepare_rows([*DIALOGUES, {"text": ""}], SKIP)
    _, tokens, _ = prepare_rows(TEXTS)
    assert len(documents(tokens)) == 3
    assert sorted(contents(tmp_path / "store")) == ["manifest.json", "tokens-00000-00000.bin", "tokens-00000-00000.idx"]


def test_a_corpus_of_empty_text_files_is_an_error(tokenizer, tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="empty"):
        prepare.prepare(str(tmp_path / "a.txt"), tokenizer, tmp_path / "store", workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(prepare_rows, tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines_of(TEXTS))
    with pytest.raises(UserError, match=r"cannot write .*rows\.jsonl/store"):
        prepare.prepare(str(tmp_path / "rows.jsonl"), tokenizer, tmp_path / "rows.jsonl" / "store", workers=1)


@pytest.mark.parametrize(
    ("options", "workers", "message"),
    [
        (prepare.DEFAULT, -1, "--workers: -1 must be at least 0"),
        (prepare.Options(shard_characters=0), 1, "--shard_characters: 0 must be at least 1"),
        (prepare.Options(shard_characters=-5), 1, "--shard_characters: -5 must be at least 1"),
    ],
)
def test_numbers_that_cannot_be_are_one_line(tokenizer, tmp_path, options, workers, message):
    (tmp_path / "rows.jsonl").write_text(lines_of(TEXTS))
    with pytest.raises(UserError, match=message):
        prepare.prepare(str(tmp_path / "rows.jsonl"), tokenizer, tmp_path / "store", options, workers)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


# --- disks that are full, and what they leave --------------------------------------------------------------------------------


@contextlib.contextmanager
def no_larger_than(size):
    """Files of this process and its children may have `size` bytes, as with `ulimit -f`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tokenizer, tmp_path, workers):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(lines_of([{"text": f"{i} 狸が山に住む。" * 9} for i in range(400)]))
    run = (f"{tmp_path}/*.jsonl", tokenizer, tmp_path / "store", prepare.Options(part_bytes=70_000), workers)
    with no_larger_than(4096), pytest.raises(UserError, match=rf"the disk of {tmp_path}/store is full, or a file larger"):
        prepare.prepare(*run)
    assert not (tmp_path / "store").exists()
    assert prepare.prepare(*run).rows == 800
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "store"]


def test_a_disk_that_fills_at_the_first_byte_is_one_line(tokenizer, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "rows.jsonl").write_text(lines_of(TEXTS))
    run = (str(tmp_path / "rows.jsonl"), tokenizer, tmp_path / "store")
    for place in ("tanuki_jax.data.store.StoreWriter.add", "tanuki_jax.files.write_json", "pathlib.Path.mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(UserError, match="disk|No space left"):
                prepare.prepare(*run, workers=1)
    assert prepare.prepare(*run, workers=1).rows == 3


@pytest.mark.parametrize("victim", ["identity.json", "00000-00000.json", "tokens-00000-00000.bin", "tokens-00000-00000.idx"])
def test_work_that_a_power_cut_damaged_is_begun_anew(tokenizer, tmp_path, monkeypatch, caplog, victim):
    monkeypatch.setattr(shards, "CHUNK_ROWS", 1)
    (tmp_path / "rows.jsonl").write_text(lines_of([{"text": f"{i} 狸"} for i in range(6)]))
    run = (str(tmp_path / "rows.jsonl"), tokenizer, tmp_path / "store", prepare.Options(shard_characters=1))
    expected = prepare.prepare(*run, workers=1)
    shutil.rmtree(tmp_path / "store")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        prepare.prepare(*run, workers=1)
    path = tmp_path / ".store.partial" / victim
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert prepare.prepare(*run, workers=1).content == expected.content
    told = caplog.text
    assert victim == "identity.json" or ("00000-00000.json is damaged" in told and "begun anew" in told)


# --- opening ----------------------------------------------------------------------------------------------------------------


def test_a_directory_without_a_manifest_is_an_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="no manifest.json; make it with `tanuki data prepare`"):
        prepare.open_store(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest | {"shards": manifest["shards"][:1]}, "holds 2 tokens, its manifest 6"),
        (lambda manifest: manifest | {"shards": []}, "no shards"),
        (lambda manifest: {"kind": "text", "rows": 1}, "of another version.*prepare it again"),
        (lambda manifest: manifest | {"colour": "red"}, "of another version.*prepare it again"),
    ],
)
def test_a_manifest_that_does_not_fit_is_an_error(prepare_rows, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(shards, "CHUNK_ROWS", 1)
    prepare_rows([VALID] * 3, prepare.Options(shard_characters=1))
    path = tmp_path / "store" / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message):
        prepare.open_store(tmp_path / "store")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_shard_that_is_gone_is_an_error_that_names_it(prepare_rows, tmp_path, suffix):
    prepare_rows(DIALOGUES)
    (tmp_path / "store" / f"mask-00000-00000{suffix}").unlink()
    with pytest.raises(UserError, match=f"mask-00000-00000{suffix} is missing"):
        prepare.open_store(tmp_path / "store")
