"""Which rows a stage reads, in which order, and where the next stage goes on."""

import collections
import functools
import json
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from tanuki_jax import config
from tanuki_jax.data import packing
from tanuki_jax.data.inspect import inspect
from tanuki_jax.data.prepare import open_store, prepare
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import dataset
from tanuki_jax.recipe.artifacts import Artifacts
from tanuki_jax.recipe.dataset import make_dataset, tokens_consumed_before
from tests import tiny_recipe

TEXT = dict(ja=(0.75,), en=(0.25,))
SIZES = dict(ja=60, en=30)  # documents
WORDS = dict(ja="狸が月を見ていました。", en=" The moon watched the tanuki.")


def documents(name):
    """Text whose rows of tokens are all different, as each sentence has its number."""
    return [{"text": "".join(f"{1000 + 5 * i + k}{WORDS[name]}" for k in range(5))} for i in range(SIZES[name])]


def said(content):
    return [{"role": "user", "content": "月?"}, {"role": "assistant", "content": content}]


DIALOGUES = [{"messages": said(f"{i}" + "狸" * (i % 40))} for i in range(1, 90)]
PREFERENCES = [{"prompt": f"{i}+{i}?", "chosen": "正" * (i % 17 + 1), "rejected": "誤" * (i % 11 + 1)} for i in range(60)]


@pytest.fixture(scope="module")
def new_inputs(tokenizer, tmp_path_factory):
    def make(**sources):
        home = tmp_path_factory.mktemp("stores")
        for name, rows in sources.items():
            (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            prepare(str(home / f"{name}.jsonl"), tokenizer, home / name)
        return Artifacts(tokenizer, {name: home / name for name in sources})

    return make


@pytest.fixture(scope="module")
def inputs(new_inputs):
    return new_inputs(
        ja=documents("ja"), en=documents("en"), dialogues=DIALOGUES, pairs=PREFERENCES[:40], others=PREFERENCES[40:]
    )


def recipe(stages, **changes):
    """A recipe whose stages are given as dicts; each starts from the one before."""
    c = tiny_recipe.get_config()
    c.data = dict.fromkeys(("ja", "en", "dialogues", "pairs", "others"), "unused.jsonl")
    c.tokenizer.sources, c.stages, before = (), ConfigDict(), ""
    for name, values in stages.items():
        row = dict(kind="pretrain", mixture=TEXT, seq_len=32, batch_size=4, steps=5, init_from=before)
        c.stages[name] = config.stage(**{**row, **values})
        before = name
    for key, value in changes.items():
        group, _, field = key.partition("__")
        if field:
            c[group][field] = value
        else:
            c[group] = value
    return config.resolve(c)


def opened(made, name, inputs, tmp_path):
    return make_dataset(made, name, inputs, tmp_path)


def drawn(data):
    """How many rows of each source a stage reads."""
    return collections.Counter(data.names[data.mixture[i][0]] for i in range(data.steps * data.rows_per_step))


def texts(data):
    """The tokens of every row of a stage, in order."""
    return [tuple(data.rows[i]["tokens"].tolist()) for i in range(data.steps * data.rows_per_step)]


# --- where a stage goes on ----------------------------------------------------------------------------------------------


def test_a_stage_goes_on_where_its_ancestors_stopped_past_an_upcycle():
    made = config.resolve(tiny_recipe.get_config())
    each = 4 * 8 // 2 * 64  # steps, rows a step, the half of them, tokens a row
    assert tokens_consumed_before(made, "pretrain") == {}
    assert (
        tokens_consumed_before(made, "upcycle") == tokens_consumed_before(made, "continued") == {"ja": each, "synthetic": each}
    )
    assert tokens_consumed_before(made, "sft") == tokens_consumed_before(made, "dpo") == {"ja": 2 * each, "synthetic": 2 * each}


def test_what_ancestors_used_is_what_their_rows_say(inputs, tmp_path):
    phases = dict(mixture=dict(ja=(1.0, 0.0, 0.3), en=(0.0, 1.0, 0.7)), phase_start_tokens=(0, 100, 700))
    made = recipe(
        dict(
            first=dict(steps=11, **phases),
            second=dict(kind="upcycle", mixture={}, steps=0),
            third=dict(steps=0, tokens=2000, mixture=dict(en=(1.0,), ja=(0.0,))),
            fourth=dict(steps=3, **{**phases, "phase_start_tokens": (0, 100, 300)}),
        )
    )
    expected = collections.Counter()
    for name in made.stages:
        assert tokens_consumed_before(made, name) == expected
        if made.stages[name].kind == "pretrain":
            data = opened(made, name, inputs, tmp_path)
            before = data.counters(0)
            assert {n: before[f"data/{n}/tokens"] for n in data.names} == {n: expected.get(n, 0) for n in data.names}
            for source, rows in drawn(data).items():
                expected[source] += 32 * rows


def test_a_branch_knows_nothing_of_its_sister():
    made = config.resolve(_branched())
    assert tokens_consumed_before(made, "left") == tokens_consumed_before(made, "right") == {"ja": 5 * 4 * 32}


def _branched():
    c = tiny_recipe.get_config()
    c.data, c.tokenizer.sources, c.stages = dict(ja="unused.jsonl"), (), ConfigDict()
    row = dict(mixture=dict(ja=(1.0,)), seq_len=32, batch_size=4)
    c.stages.root = config.stage("pretrain", steps=5, **row)
    c.stages.left = config.stage("pretrain", steps=7, init_from="root", **row)
    c.stages.right = config.stage("pretrain", steps=9, init_from="root", **row)
    return c


@pytest.mark.parametrize(
    "lengths",
    [
        (32, 32, 32),
        (16, 32, 32),
        (64, 32, 16),
        (24, 32, 48),
        (16, 32, 16),
    ],
    ids=str,
)
def test_stages_of_one_chain_share_no_text_within_an_epoch(inputs, tmp_path, lengths):
    stages = {f"s{k}": dict(seq_len=n, batch_size=1, steps=5, mixture=dict(ja=(1.0,))) for k, n in enumerate(lengths)}
    made = recipe(stages)
    seen = []
    for name in stages:
        data = opened(made, name, inputs, tmp_path)
        assert data.counters(data.steps)["data/ja/epoch"] < 1
        seen += [places(inputs, tokens) for tokens in texts(data)]
    assert len(set().union(*seen)) == sum(map(len, seen)) == 5 * sum(lengths)


@functools.cache
def _stream(store):
    manifest, tokens, _ = open_store(store)
    return tokens.read(0, manifest.tokens).astype(np.int32)


def places(inputs, tokens):
    """Where the tokens of a row stand in the stream of the source."""
    stream = _stream(inputs.stores["ja"])
    windows = np.lib.stride_tricks.sliding_window_view(stream, len(tokens))
    [start] = np.flatnonzero((windows == tokens).all(axis=1))
    return set(range(start, start + len(tokens)))


def test_every_row_is_read_once_in_an_epoch_over_all_stages(inputs, tmp_path):
    row = dict(mixture=dict(ja=(1.0,)), batch_size=1, steps=60)
    made = recipe(dict(first=row, second=dict(kind="upcycle", mixture={}, steps=0), third=row, fourth=row))
    seen = [text for name in ("first", "third", "fourth") for text in texts(opened(made, name, inputs, tmp_path))]
    size = len(opened(made, "first", inputs, tmp_path).sources[0])
    assert 120 < size < 180 and len(set(seen[:size])) == size
    assert len(set(seen[size:])) == len(seen) - size and set(seen[size:]) <= set(seen[:size])


# --- counters -----------------------------------------------------------------------------------------------------------


def test_counters_are_what_a_slow_count_of_the_rows_gives(inputs, tmp_path):
    phases = dict(mixture=dict(ja=(0.9, 0.2), en=(0.1, 0.8)), phase_start_tokens=(0, 1000))
    made = recipe(dict(first=dict(steps=30, **phases), second=dict(steps=60, **phases)))
    sizes = None
    used = collections.Counter()
    for name in made.stages:
        data = opened(made, name, inputs, tmp_path)
        sizes = {n: len(rows) for n, rows in zip(data.names, data.sources, strict=True)}
        for step in range(data.steps + 1):
            expected = {}
            for source, size in sizes.items():
                expected[f"data/{source}/tokens"] = 32 * used[source]
                expected[f"data/{source}/epoch"] = round(used[source] / size, 4)
            assert data.counters(step) == expected
            if step < data.steps:
                used.update(data.names[data.mixture[i][0]] for i in range(4 * step, 4 * step + 4))
    assert max(used[source] / size for source, size in sizes.items()) > 2  # several epochs
    json.dumps(data.counters(data.steps))


# --- the fingerprint ----------------------------------------------------------------------------------------------------

BASE = dict(only=dict())
CHANGED = {
    "seed": recipe(BASE, seed=1),
    "weights": recipe(dict(only=dict(mixture=dict(ja=(0.5,), en=(0.5,))))),
    "phases": recipe(dict(only=dict(mixture=dict(ja=(0.75, 0.25), en=(0.25, 0.75)), phase_start_tokens=(0, 320)))),
    "sources": recipe(dict(only=dict(mixture=dict(ja=(1.0,))))),
    "held out": recipe(BASE, validation__tokens=64),
    "row length": recipe(dict(only=dict(seq_len=16))),
    "batch size": recipe(dict(only=dict(batch_size=8))),
    "attention": recipe(dict(only=dict(reset_attention=False))),
}
UNCHANGED = {
    "computation": recipe(BASE, compute__remat="full", mesh__fsdp=4),
    "steps": recipe(dict(only=dict(steps=50))),
    "logging": recipe(dict(only=dict(save_every=7, log_every=3, gradient_accumulation_steps=2))),
    "another scoring": recipe(BASE, validation__every_steps=7),
}


@pytest.mark.parametrize("case", [*CHANGED, *UNCHANGED])
def test_the_fingerprint_changes_with_what_rows_a_step_has_and_with_nothing_else(inputs, tmp_path, case):
    before = opened(recipe(BASE), "only", inputs, tmp_path).fingerprint
    after = opened({**CHANGED, **UNCHANGED}[case], "only", inputs, tmp_path).fingerprint
    assert (after != before) == (case in CHANGED)


def test_the_fingerprint_changes_with_the_data_but_not_with_where_it_lies(new_inputs, inputs, tmp_path):
    rows = {name: documents(name) for name in SIZES}
    same, other = new_inputs(**rows), new_inputs(**{**rows, "en": [*rows["en"][:-1], {"text": "moon"}]})
    prints = [opened(recipe(BASE), "only", source, tmp_path).fingerprint for source in (inputs, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_the_fingerprint_of_a_later_stage_knows_where_the_earlier_one_stopped(inputs, tmp_path):
    prints = {opened(recipe(dict(a=dict(steps=n), b={})), "b", inputs, tmp_path).fingerprint for n in (5, 6)}
    assert len(prints) == 2


# --- what is held out ---------------------------------------------------------------------------------------------------


def test_held_out_rows_are_the_end_of_each_source_and_never_trained_on(inputs, tmp_path):
    made = recipe(dict(only=dict(batch_size=8, steps=40)), validation__tokens=200)
    data = opened(made, "only", inputs, tmp_path)
    trained = set(texts(data))
    assert min(data.counters(data.steps)[f"data/{name}/epoch"] for name in TEXT) > 1  # every row was trained on
    for name, rows in zip(data.names, data.sources, strict=True):
        manifest, tokens, _ = open_store(inputs.stores[name])
        held = [data.held_out[name][i] for i in range(len(data.held_out[name]))]
        assert len(held) == 200 // 32 and not trained & {tuple(row["tokens"].tolist()) for row in held}
        assert not trained & {tuple(row["targets"].tolist()) for row in held}
        stream = tokens.read(0, manifest.tokens)
        end = len(rows) * 32
        assert end + len(held) * 32 + 1 <= manifest.tokens < end + 200 + 32 + 2
        np.testing.assert_array_equal(np.concatenate([row["targets"] for row in held]), stream[end + 1 :][: len(held) * 32])


def test_without_validation_and_in_fine_tuning_nothing_is_held_out(inputs, tmp_path):
    assert opened(recipe(BASE), "only", inputs, tmp_path).held_out == {}
    made = recipe(dict(a={}, b=dict(kind="sft", mixture=dict(dialogues=(1.0,)), seq_len=64)), validation__tokens=64)
    assert opened(made, "b", inputs, tmp_path).held_out == {}
    assert opened(made, "a", inputs, tmp_path).held_out.keys() == TEXT.keys()


# --- dialogues and pairs ------------------------------------------------------------------------------------------------


def tuned(kind, mixture, **values):
    return recipe(dict(a={}, b=dict(kind=kind, mixture={n: (1.0,) for n in mixture}, **values)))


def printed(capsys, source):
    """Numbers that are told of a packed source: units, rows, padding, and how many were longer than a row."""
    [line] = [line for line in capsys.readouterr().err.splitlines() if f" of {source} in " in line]
    found = re.fullmatch(
        r"stage b: ([\d,]+) (dialogues|pairs) of \w+ in ([\d,]+) rows, ([\d.]+)% padding"
        r"(?:; ([\d,]+) longer than \d+ tokens (cut|left out))?",
        line,
    )
    assert found, line
    units, noun, rows, padding, longer, fate = found.groups()
    return int(units), noun, int(rows), float(padding), int(longer or 0), fate


def test_padding_and_cut_dialogues_are_told(inputs, tmp_path, capsys):
    data = opened(tuned("sft", ["dialogues"], seq_len=48), "b", inputs, tmp_path)
    lengths = open_store(inputs.stores["dialogues"])[1].lengths
    [rows] = data.sources
    padding = np.mean([row["segment_ids"] == 0 for row in map(rows.__getitem__, range(len(rows)))])
    cut = int((lengths > 48).sum())
    assert 0 < cut < len(lengths)
    units, noun, number, told, longer, fate = printed(capsys, "dialogues")
    assert (units, noun, number, longer, fate) == (len(DIALOGUES), "dialogues", len(rows), cut, "cut")
    assert told == pytest.approx(100 * padding, abs=0.051)


def test_dialogues_of_which_only_the_prompt_would_be_kept_are_left_out_and_told(new_inputs, tmp_path, capsys):
    long = [{"role": "user", "content": "月" * 90}, {"role": "assistant", "content": "狸"}]
    data = opened(
        tuned("sft", ["dialogues"], seq_len=48), "b", new_inputs(dialogues=[*DIALOGUES, dict(messages=long)]), tmp_path
    )
    assert "; 1 with no answer in their first 48 tokens left out" in capsys.readouterr().err
    [rows] = data.sources
    for row in map(rows.__getitem__, range(len(rows))):
        labelled = set(row["segment_ids"][row["loss_weights"] > 0])
        assert labelled == set(row["segment_ids"]) - {0}


def test_padding_and_pairs_left_out_are_told(inputs, tmp_path, capsys):
    data = opened(tuned("dpo", ["pairs"], seq_len=100), "b", inputs, tmp_path)
    lengths = open_store(inputs.stores["pairs"])[1].lengths
    both = lengths[::2] + lengths[1::2]
    [rows] = data.sources
    kept = sorted(int(p) for i in range(len(rows)) for p in rows.pairs(i))
    assert 0 < len(kept) < len(both) and kept == np.flatnonzero(both <= 100).tolist()
    units, noun, number, told, longer, fate = printed(capsys, "pairs")
    assert (units, noun, number, longer, fate) == (len(kept), "pairs", len(rows), len(both) - len(kept), "left out")
    assert told == pytest.approx(100 * (1 - both[kept].sum() / (len(rows) * 100)), abs=0.051)


def test_nothing_is_told_of_cuts_where_everything_fits(inputs, tmp_path, capsys):
    opened(tuned("sft", ["dialogues"], seq_len=512), "b", inputs, tmp_path)
    assert printed(capsys, "dialogues")[4:] == (0, None)


def test_dialogues_are_packed_once(inputs, tmp_path, monkeypatch):
    made = tuned("sft", ["dialogues"], seq_len=96)
    first = opened(made, "b", inputs, tmp_path)
    monkeypatch.setattr(packing, "best_fit", lambda *_: pytest.fail("packed again"))
    again = opened(made, "b", inputs, tmp_path)
    assert texts(again) == texts(first) and again.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:100], lambda data: b"x" * len(data), "other"], ids=range(4)
)
def test_a_damaged_pack_index_is_made_anew_and_told(inputs, tmp_path, caplog, damage):
    made = tuned("sft", ["dialogues"], seq_len=96)
    first = opened(made, "b", inputs, tmp_path)
    [path] = tmp_path.glob("pack-*.npz")
    if damage == "other":  # an index of other data
        np.savez(path, starts=np.array([0, 1]), units=np.array([10**6]), dropped=0)
    else:
        path.write_bytes(damage(path.read_bytes()))
    assert texts(opened(made, "b", inputs, tmp_path)) == texts(first)
    [line] = [line for line in caplog.messages if "damaged" in line]
    caplog.clear()
    assert str(path) in line and "made anew" in line
    opened(made, "b", inputs, tmp_path)
    assert "damaged" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "source", "seq_len"), [("sft", "dialogues", 48), ("dpo", "pairs", 100), ("pretrain", "ja", 32)]
)
def test_inspect_shows_the_rows_of_a_stage_and_says_the_same_of_them(inputs, tmp_path, capsys, kind, source, seq_len):
    made = recipe(dict(a={}, b=dict(kind=kind, mixture={source: (1.0,)}, seq_len=seq_len)))
    data = opened(made, "b", inputs, tmp_path)
    [told] = [line.removeprefix("stage b: ") for line in capsys.readouterr().err.splitlines() if line.startswith("stage b: ")]
    found = inspect(inputs.stores[source], inputs.tokenizer, 5, seq_len)
    assert found["packed"] == told and told in found["text"].splitlines()
    [rows] = data.sources
    assert found["packed_rows"] == len(rows)
    for i, shown in enumerate(found["shown"]):
        used = int((rows[i]["segment_ids"] > 0).sum())
        assert shown["tokens"] == used
        assert "".join(part["text"] for part in shown["parts"]) == inputs.tokenizer.decode(rows[i]["tokens"][:used].tolist())


# --- runs -------------------------------------------------------------------------------------------------------------------


def chain(lengths):
    return recipe({f"s{k}": dict(seq_len=n, mixture=dict(ja=(1.0,))) for k, n in enumerate(lengths)})


def test_no_source_loses_rows_to_runs_whatever_the_lengths_of_rows():
    rng = np.random.default_rng(0)
    for _ in range(40):
        lengths = sorted({int(n) for n in rng.choice([512, 1000, 1024, 2048, 3000, 4096, 8192, 500], rng.integers(1, 4))})
        made, size = chain(lengths), int(rng.integers(1, 3000))
        for n in lengths:
            run = dataset._shuffle_block(made, "ja", n, size)
            assert size % run <= size / 100  # these end each epoch unshuffled; none is left out (test_loader.py)


@pytest.mark.slow
def test_two_hundred_sets_of_lengths_lose_nothing():
    rng = np.random.default_rng(1)
    for _ in range(200):
        lengths = sorted(set(rng.integers(2, 9000, rng.integers(1, 5)).tolist()))
        made, size = chain(lengths), int(10 ** rng.uniform(0, 6))
        for n in lengths:
            assert size % dataset._shuffle_block(made, "ja", n, size) <= size / 100


def test_an_order_of_another_version_is_another_fingerprint(inputs, tmp_path, monkeypatch):
    alone = recipe(dict(only=dict(mixture=dict(ja=(1.0,)))))
    before = [opened(made, "only", inputs, tmp_path).fingerprint for made in (recipe(BASE), alone)]
    monkeypatch.setattr(dataset, "ORDER", 99)
    after = [opened(made, "only", inputs, tmp_path).fingerprint for made in (recipe(BASE), alone)]
    assert before[0] != after[0] and before[1] == after[1]  # one source has one order


def test_an_epoch_of_fine_tuning_reads_every_dialogue_once(inputs, tmp_path):
    data = opened(tuned("sft", ["dialogues"], seq_len=96, batch_size=1, steps=0, epochs=2.0), "b", inputs, tmp_path)
    size = len(data.sources[0])
    assert data.steps == 2 * size and set(collections.Counter(texts(data)[:size]).values()) == {1}
    assert sorted(texts(data)[:size]) == sorted(texts(data)[size:]) and texts(data)[:size] != texts(data)[size:]
    assert data.counters(data.steps) == {"data/dialogues/tokens": 96 * 2 * size, "data/dialogues/epoch": 2.0}


def test_sources_of_pairs_share_a_shape_and_each_has_its_part_of_the_reference(inputs, tmp_path):
    made = tuned("dpo", ["pairs", "others"], seq_len=256, batch_size=4)
    reference = np.arange(120, dtype=np.float32).reshape(60, 2)
    data = make_dataset(made, "b", inputs, tmp_path).with_reference(reference)
    assert sorted(data.names) == ["others", "pairs"] and len({rows.max_pairs for rows in data.sources}) == 1
    first = 0  # pair of the reference with which the source begins
    for name, rows in zip(data.names, data.sources, strict=True):
        for i in range(len(rows)):
            pairs, row = rows.pairs(i), rows[i]
            np.testing.assert_array_equal(row["ref_logprobs"][: len(pairs)], reference[first + pairs])
            assert not row["ref_logprobs"][len(pairs) :].any() and row["pair_segments"].shape == (rows.max_pairs, 2)
        first += {"pairs": 40, "others": 20}[name]


# --- what cannot be read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        (dict(a=dict(seq_len=4096)), {}, "stage a: source 'en' has too little text for one row of 4096 tokens; add data"),
        (BASE, dict(validation__tokens=10**6), "too little text for one row of 32 tokens beside validation.tokens; add data"),
        (
            dict(a=dict(mixture=dict(pairs=(1.0,)))),
            {},
            "source 'pairs' holds pair rows; a pretrain stage needs text or dialogue",
        ),
        (dict(a={}, b=dict(kind="sft", mixture=dict(ja=(1.0,)))), {}, "holds text rows; a sft stage needs dialogue rows"),
        (dict(a={}, b=dict(kind="dpo", mixture=dict(dialogues=(1.0,)))), {}, "a dpo stage needs pair rows"),
        (dict(a={}, b=dict(kind="dpo", mixture=dict(pairs=(1.0,)), seq_len=16)), {}, "no pair of source 'pairs' fits"),
    ],
)
def test_a_source_that_cannot_serve_is_an_error_that_says_why(inputs, tmp_path, stages, changes, message):
    made = recipe(stages, **changes)
    with pytest.raises(UserError, match=re.escape(message)):
        opened(made, list(stages)[-1], inputs, tmp_path)


def test_a_source_without_weight_is_not_opened(inputs, tmp_path):
    made = recipe(dict(a=dict(mixture=dict(ja=(1.0,), en=(0.0,)))))
    alone = Artifacts(inputs.tokenizer, {"ja": inputs.stores["ja"]})
    assert opened(made, "a", alone, tmp_path).names == ("ja",)
