import hashlib
import json
from dataclasses import asdict

import numpy as np
import pytest

from tanuki_jax.data import chat, prepare
from tanuki_jax.errors import UserError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TEXTS = [{"text": "狸が山に住む。"}, {"text": ""}, {"text": "moon\n"}]
DIALOGUES = [{"messages": [user("a"), assistant("b")] * n} for n in (1, 2, 3)]
PAIRS = [
    {"prompt": p, "chosen": "良い", "rejected": [assistant("悪い")]} for p in ("q", [user("r"), assistant("s"), user("t")])
]


@pytest.fixture
def made(tokenizer, tmp_path):
    def make(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return prepare.prepare(str(path), tokenizer, tmp_path / "store"), *prepare.open_store(tmp_path / "store")[1:]

    return make


def documents(store):
    return [store.document(i).tolist() for i in range(store.documents)]


def test_a_text_document_is_its_tokens_and_the_end_token(made, tokenizer):
    manifest, tokens, mask = made(TEXTS)
    assert documents(tokens) == [[*tokenizer.encode(row["text"]), tokenizer.eos] for row in TEXTS]
    assert manifest.kind == "text" and mask is None and tokens.dtype == np.uint16


def test_a_dialogue_has_a_mask_of_the_same_shape(made, tokenizer):
    manifest, tokens, mask = made(DIALOGUES)
    expected = [chat.encode_dialogue(tokenizer, row["messages"]) for row in DIALOGUES]
    assert list(zip(documents(tokens), documents(mask), strict=True)) == expected
    assert manifest.kind == "dialogue" and mask.dtype == np.uint8


def test_pairs_are_interleaved_chosen_first(made, tokenizer):
    manifest, tokens, mask = made(PAIRS)
    expected = [side for row in PAIRS for side in chat.encode_pair(tokenizer, row)]
    assert list(zip(documents(tokens), documents(mask), strict=True)) == expected
    assert (manifest.kind, manifest.rows, manifest.documents) == ("pair", 2, 4)


@pytest.mark.parametrize("rows", [TEXTS, DIALOGUES, PAIRS], ids=["text", "dialogue", "pair"])
def test_the_manifest_counts_what_is_in_the_store(made, tokenizer, tmp_path, rows):
    manifest, tokens, _ = made(rows)
    assert json.loads((tmp_path / "store" / "manifest.json").read_text()) == asdict(manifest)
    assert (manifest.rows, manifest.documents, manifest.tokens) == (len(rows), tokens.documents, tokens.size)
    assert manifest.content == hashlib.sha256((tmp_path / "store" / "tokens.bin").read_bytes()).hexdigest()
    assert manifest.tokenizer == tokenizer.fingerprint
    if rows is TEXTS:
        assert manifest.characters == sum(len(row["text"]) for row in rows)


def test_rows_beyond_a_chunk_are_all_there_in_order(made, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 4)
    manifest, tokens, _ = made([{"text": str(i)} for i in range(11)])
    assert [tokenizer.decode(ids[:-1]) for ids in documents(tokens)] == [str(i) for i in range(11)] and manifest.rows == 11


GOOD = {"text": "a"}
BAD = {
    "kinds mixed": ([GOOD, DIALOGUES[0]], ":2.*one source per kind"),
    "no known field": ([GOOD, {"title": "a"}], ":2.*neither text"),
    "no assistant turn": ([DIALOGUES[0], {"messages": [user("a")]}], ":2.*without an assistant turn"),
    "no messages": ([DIALOGUES[0], {"messages": []}], ":2.*conversation is empty"),
    "unknown role": ([DIALOGUES[0], {"messages": [{"role": "bot", "content": "a"}]}], ":2.*message 0 must be"),
    "prompt neither text nor messages": ([PAIRS[0], {"prompt": 5, "chosen": "a", "rejected": "b"}], ":2"),
    "lone surrogate in a text": ([GOOD, {"text": "\ud800"}], ":2.*surrogate"),
    "lone surrogate in a dialogue": ([DIALOGUES[0], {"messages": [user("\ud800"), assistant("a")]}], ":2.*surrogate"),
    "no rows": ([], ".*corpus is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_an_error_that_names_its_line_and_nothing_is_left(made, tmp_path, case):
    rows, message = BAD[case]
    with pytest.raises(UserError, match=f"rows.jsonl{message}"):
        made(rows)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_error_leaves_the_store_that_was_there(made, tmp_path):
    made(TEXTS)
    before = {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()}
    with pytest.raises(UserError):
        made([GOOD, {"title": "a"}])
    assert {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "store"]


def test_preparing_again_replaces_the_store_whole(made, tmp_path):
    made(DIALOGUES)
    _, tokens, _ = made(TEXTS)
    assert len(documents(tokens)) == 3
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["manifest.json", "tokens.bin", "tokens.idx"]


def test_a_corpus_of_empty_text_files_is_an_error(tokenizer, tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="empty"):
        prepare.prepare(str(tmp_path / "a.txt"), tokenizer, tmp_path / "store")


def test_a_directory_without_a_manifest_is_an_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="no manifest.json; make it with `tanuki data prepare`"):
        prepare.open_store(tmp_path)
