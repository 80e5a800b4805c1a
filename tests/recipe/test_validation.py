"""Loss on held-out text: against numpy, and in the metrics of a run."""

import json
import math

import jax
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, parallel
from tanuki_jax.cli.main import main
from tanuki_jax.data.layouts import HeldOutRows, Windows
from tanuki_jax.data.prepare import open_store
from tanuki_jax.data.store import Store, StoreWriter
from tanuki_jax.data.tokenizer import byte_of
from tanuki_jax.recipe.validation import make_validation
from tests.conftest import TEXTS
from tests.tiny import apply, init, small

SEQ_LEN = 24
MODELS = {"dense": small(vocab_size=512), "mixture": small(vocab_size=512, n_experts=4)}


@pytest.fixture(scope="module")
def held(tokenizer, tmp_path_factory):
    """name, texts, ... -> the held-out rows of a store of these texts."""

    def make(texts, tokens, reset=True, seq_len=SEQ_LEN):
        writer = StoreWriter(tmp_path_factory.mktemp("held") / "tokens", np.dtype(np.uint16))
        for text in texts:
            writer.add([*tokenizer.encode(text), tokenizer.eos])
        writer.close()
        return HeldOutRows(Windows(Store(writer.prefix), seq_len, reset, 512, tokens))

    return make


def validated(cfg, held_out, tokenizer, params, batch_size=8):
    mesh = parallel.make_mesh(config.Mesh())
    with jax.set_mesh(mesh):
        return make_validation(cfg, held_out, tokenizer, mesh, batch_size)(params)


def all_rows(held_out):
    return [held_out[i] for i in range(len(held_out))]


def slow_nll(cfg, params, rows):
    """Summed loss and number of the scored tokens, row by row, in numpy's double precision."""
    total, count = 0.0, 0
    for row in rows:
        batch = {name: row[name][None] for name in ("tokens", "segment_ids", "positions")}
        logits = np.asarray(apply(cfg, params, batch).hidden[0], np.float64) @ np.asarray(params["head"], np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        scored = row["loss_weights"] > 0
        total -= logprobs[np.arange(len(logits)), row["targets"]][scored].sum()
        count += int(scored.sum())
    return total, count


def spelt_bytes(tokenizer, rows):
    """UTF-8 bytes of the scored tokens, piece by piece; a special token has none."""
    size = 0
    for row in rows:
        for i in row["targets"][row["loss_weights"] > 0].tolist():
            piece = tokenizer.piece(i)
            size += 0 if i in tokenizer.special.values() else 1 if byte_of(piece) is not None else len(piece.encode())
    return size


# --- against numpy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_validation_is_the_mean_loss_of_all_held_out_tokens(held, tokenizer, name, reset):
    cfg = MODELS[name]
    params = init(cfg, jax.random.key(1))
    held_out = {"ja": held(TEXTS[:24:2], 11 * SEQ_LEN, reset), "en": held(TEXTS[1:30:2], 3 * SEQ_LEN, reset)}
    assert [len(rows) for rows in held_out.values()] == [11, 3]  # no multiple of the batch, and less than one
    found = validated(cfg, held_out, tokenizer, params)
    assert found.keys() == {f"validation/{source}/{key}" for source in held_out for key in ("loss", "bits_per_byte")}
    for source, rows in held_out.items():
        total, count = slow_nll(cfg, params, all_rows(rows))
        size = spelt_bytes(tokenizer, all_rows(rows))
        assert found[f"validation/{source}/loss"] == pytest.approx(total / count, rel=1e-4)
        assert found[f"validation/{source}/bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-4)


def test_validation_does_not_depend_on_the_batch_and_changes_no_row(held, tokenizer):
    cfg = MODELS["dense"]
    params, rows = init(cfg, jax.random.key(2)), held(TEXTS[:24], 11 * SEQ_LEN)
    before = json.dumps([{k: v.tolist() for k, v in row.items()} for row in all_rows(rows)])
    small_batch, large_batch = (validated(cfg, {"x": rows}, tokenizer, params, size) for size in (8, 32))
    assert small_batch == pytest.approx(large_batch, abs=2e-5)
    assert json.dumps([{k: v.tolist() for k, v in row.items()} for row in all_rows(rows)]) == before


def test_a_uniform_model_has_the_loss_of_a_guess_and_the_bits_of_its_bytes(held, tokenizer):
    cfg = MODELS["dense"]
    params = init(cfg, jax.random.key(0))
    params["head"] = params["head"] * 0
    rows = held(TEXTS[:12], 5 * SEQ_LEN)
    found = validated(cfg, {"x": rows}, tokenizer, params)
    count = sum(int((row["loss_weights"] > 0).sum()) for row in all_rows(rows))
    assert found["validation/x/loss"] == pytest.approx(math.log(512), abs=1e-4)
    assert found["validation/x/bits_per_byte"] == pytest.approx(9 * count / spelt_bytes(tokenizer, all_rows(rows)), abs=1e-4)


def test_characters_that_are_cut_by_a_row_count_their_own_bytes(held, tokenizer):
    cfg = MODELS["dense"]
    params = init(cfg, jax.random.key(0))
    params["head"] = params["head"] * 0
    rows = held(["🦝" * 100], 4 * 22, seq_len=22)
    found = validated(cfg, {"x": rows}, tokenizer, params)
    assert spelt_bytes(tokenizer, all_rows(rows)) == 4 * 22
    assert found["validation/x/bits_per_byte"] == pytest.approx(9.0, abs=1e-4)


# --- in the metrics of a run ------------------------------------------------------------------------------------------------

RECIPE = """
from ml_collections import ConfigDict
from tests import tiny_recipe
from tanuki_jax import config

def get_config():
    c = tiny_recipe.get_config()
    c.scoring.prompts = 0
    c.data = dict(ja={ja!r}, en={en!r})
    c.tokenizer.update(dict(path={tokenizer!r}, sources=()))
    c.validation.update(dict(tokens=100, every_steps=2))
    row = dict(mixture=dict(ja=(0.75,), en=(0.25,)), seq_len=32, batch_size=8, save_every=2, log_every=100)
    row["optimizer"] = dict(learning_rate=1e-2)
    c.stages = ConfigDict()
    c.stages.first = config.stage("pretrain", steps=5, **row)
    c.stages.second = config.stage("pretrain", steps=3, init_from="first", **row)
    return c
"""


@pytest.fixture(scope="module")
def workdir(tokenizer, tmp_path_factory):
    home = tmp_path_factory.mktemp("validated")
    for name, start in (("ja", 0), ("en", 1)):
        rows = [{"text": f"{i}{text}"} for i, text in enumerate(TEXTS[start::2])]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {name: str(home / f"{name}.jsonl") for name in ("ja", "en")}
    (home / "recipe.py").write_text(RECIPE.format(tokenizer=str(tokenizer.directory), **data))
    assert main(["run", f"--config={home / 'recipe.py'}", f"--workdir={home / 'run'}"]) == 0
    return home / "run"


def metrics(workdir, stage):
    return [json.loads(line) for line in (workdir / "stages" / stage / "metrics.jsonl").read_text().splitlines()]


VALIDATION = {f"validation/{source}/{key}" for source in ("ja", "en") for key in ("loss", "bits_per_byte")}


def test_steps_that_are_validated_are_logged_and_the_last_one_always_is(workdir):
    assert [row["step"] for row in metrics(workdir, "first")] == [2, 4, 5]
    assert [row["step"] for row in metrics(workdir, "second")] == [2, 3]
    assert all(row.keys() >= VALIDATION for stage in ("first", "second") for row in metrics(workdir, stage))


def test_the_counters_of_the_data_go_on_from_stage_to_stage(workdir):
    steps = {"first": 0, "second": 5}
    for stage, before in steps.items():
        for row in metrics(workdir, stage):
            tokens = {name: row[f"data/{name}/tokens"] for name in ("ja", "en")}
            assert sum(tokens.values()) == (before + row["step"]) * 8 * 32
            assert tokens["ja"] == pytest.approx(3 * tokens["en"], abs=4 * 32)
            assert all(row[f"data/{name}/epoch"] > 0 for name in tokens) and row["input_wait"] >= 0
    last, first = metrics(workdir, "second")[-1], metrics(workdir, "first")[0]
    assert last["data/ja/epoch"] / first["data/ja/epoch"] == pytest.approx(
        last["data/ja/tokens"] / first["data/ja/tokens"], rel=1e-2
    )


def test_the_held_out_loss_begins_near_a_guess_and_falls(workdir):
    for source in ("ja", "en"):
        losses = [row[f"validation/{source}/loss"] for stage in ("first", "second") for row in metrics(workdir, stage)]
        assert losses[-1] < losses[0] < math.log(768) + 0.5


def test_what_is_logged_is_the_loss_of_the_checkpoint(workdir, tokenizer):
    loaded = checkpoint.load(workdir / "stages" / "second")
    for source in ("ja", "en"):
        [store] = (workdir / "data").glob(f"store-{source}-*")
        held_out = HeldOutRows(Windows(open_store(store)[1], 32, True, 768, 100))
        total, count = slow_nll(loaded.cfg, loaded.params, all_rows(held_out))
        assert len(held_out) == 3
        assert metrics(workdir, "second")[-1][f"validation/{source}/loss"] == pytest.approx(total / count, rel=1e-3)
