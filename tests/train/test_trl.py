"""Our steps of SFT and DPO against what TRL's trainers logged on the same batches from the same weights (make_trl.py)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import config
from tanuki_jax.data import chat, layouts, packing
from tanuki_jax.data.conversation import read_fields
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.train import losses
from tanuki_jax.train.optimizer import make_optimizer, make_schedule
from tanuki_jax.train.preference import pair_scores
from tanuki_jax.train.step import init_state, make_train_step, make_update
from tests.interop.llama import flat, nested
from tests.tiny import small
from tests.train import make_trl
from tests.train.make_trl import CASES, HERE, ROWS

CFG = small(**make_trl.SHAPE)
LENGTH, STEPS = 128, 20
EACH = [[unit] for unit in range(ROWS)]  # a row for each document or pair
OTHERS = [name for name in CASES if name.startswith("dpo_")]
PREFERENCES = sorted({kind for name in OTHERS for kind in CASES[name].settings["loss_type"]} | {"sigmoid"})
# Most metrics need no absolute tolerance.  A reward is beta times the difference of two sums of up to 100 in float32, each
# right to 1e-5; a mean over the vocabulary of logits of size 1 is near 0.
ATOL = {"rewards": 1e-5, "logits": 1e-5}


# --- batches ----------------------------------------------------------------------------------------------------------


class Documents(list):
    """Documents as a token store gives them."""

    document = list.__getitem__


@functools.cache
def stored(name):
    with np.load(HERE / f"{name}.npz") as file:
        return dict(file)


def documents(name, number):
    """The documents of TRL's batch of this number: (ids, whether each is trained)."""
    found = []
    for tokens, trained, positions in zip(*(stored(name)[n][number] for n in ("tokens", "trained", "positions")), strict=True):
        starts = np.flatnonzero(positions == 0)
        for a, b in zip(starts, [*starts[1:], (positions >= 0).sum()], strict=True):
            np.testing.assert_array_equal(positions[a:b], np.arange(b - a))
            found.append((tokens[a:b], trained[a:b]))
    return found


def batch(docs, rows, length=LENGTH, reference=None):
    """Our batch with these documents, or pairs where there is a reference [pairs, 2], in each row."""
    packed = packing.Packing(np.cumsum([0, *map(len, rows)]), np.array([u for row in rows for u in row], int), 0)
    stores = [Documents(column) for column in zip(*docs, strict=True)]
    if reference is None:
        made = layouts.PackedDialogues(*stores, packed, length)
    else:
        made = layouts.PackedPairs(*stores, packed, length, max(map(len, rows)), reference)
    examples = [made[r] for r in range(len(rows))]
    return {name: jnp.asarray(np.stack([e[name] for e in examples])) for name in examples[0]}


def params(noise=0.0):
    return jax.tree.map(jnp.array, nested(flat(CFG, make_trl.weights(noise))))


@functools.cache
def pairs(name):
    """Of each step the documents, chosen and rejected of one pair after another, and our reference's log-probabilities."""
    reference = params(CASES[name].reference)
    score = jax.jit(lambda params, batch: pair_scores(CFG, params, batch)[0].logprobs)
    found = []
    for step in range(CASES[name].steps):
        docs = documents(name, step)  # the chosen answers, and then the rejected ones
        docs = [docs[p + side * ROWS] for p in range(ROWS) for side in (0, 1)]
        unscored = batch(docs, EACH, reference=np.zeros((ROWS, 2), np.float32))
        found.append((docs, np.asarray(score(reference, unscored))[:, 0]))
    return found


# --- steps ------------------------------------------------------------------------------------------------------------


def any_preference(params, batch, balance, key):
    """One program for all preference losses, as compiling takes the time: their weights are part of the batch."""
    given = dict(zip(PREFERENCES, batch["preference"], strict=True))
    return losses.preference(CFG, config.Loss(beta=0.1, preference=given, label_smoothing=0.1))(params, batch, balance, key)


def preferring(name):
    """The weights of a case's preference losses."""
    settings = CASES[name].settings
    kinds = settings.get("loss_type", ["sigmoid"])
    given = dict(zip(kinds, settings.get("loss_weights", [1.0] * len(kinds)), strict=True))
    return {"preference": jnp.float32([given.get(kind, 0.0) for kind in PREFERENCES])}


@functools.cache
def program(kind, gradient_accumulation_steps):
    """(first state, train step)"""
    beta1, beta2 = make_trl.BETAS
    adam = config.Optimizer(
        learning_rate=make_trl.RATE,
        schedule=make_trl.SCHEDULE["sft" if kind == "sft" else "dpo"],
        beta1=beta1,
        beta2=beta2,
        eps=make_trl.EPS,
        weight_decay=make_trl.DECAY,
    )
    loss = any_preference if kind == "any" else losses.make_loss(kind, CFG, config.Loss(beta=0.1))
    optimizer = make_optimizer(adam)
    step = make_train_step(loss, make_update(optimizer, make_schedule(adam, STEPS), make_trl.CLIP), gradient_accumulation_steps)
    return jax.jit(lambda: init_state(params(), optimizer, jax.random.key(0))), step


def train(kind, batches, gradient_accumulation_steps=1):
    """Metrics of our steps, [steps] each."""
    first, step = program(kind, gradient_accumulation_steps)
    state, history = first(), []
    for made in batches:
        state, metrics = step(state, made)
        history.append(metrics)
    return {name: np.array([metrics[name] for metrics in history]) for name in history[0]}


def logged(name):
    """TRL's metrics, [steps] each."""
    return dict(zip(stored(name)["names"].tolist(), stored(name)["values"].T, strict=True))


def assert_same(found, wanted):
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=ATOL.get(name.split("/")[0], 0), err_msg=name)


# --- SFT --------------------------------------------------------------------------------------------------------------


def test_sft():
    found = train("sft", [batch(documents("sft", step), EACH) for step in range(STEPS)])
    assert len(logged("sft")) == 5 and np.ptp(logged("sft")["loss"]) > 1
    assert_same(found, logged("sft"))


def best_fit(docs):
    """Documents in ROWS rows, by our own packing."""
    starts, units, dropped = packing.best_fit([len(ids) for ids, _ in docs], LENGTH)
    assert not dropped and len(starts) <= ROWS + 1
    return [units[a:b] for a, b in zip(starts, [*starts[1:], *[len(units)] * (ROWS + 1 - len(starts))], strict=False)][:ROWS]


def test_packed_sft():
    """TRL joins its packed rows to one; how documents are packed changes nothing."""
    docs = [documents("sft_packed", step) for step in range(STEPS)]
    assert min(map(len, docs)) >= 2 * ROWS
    batches = [batch(d, best_fit(d)) for d in docs]
    assert_same(train("sft", batches), logged("sft_packed"))
    crossing = {**batches[0], "segment_ids": jnp.minimum(batches[0]["segment_ids"], 1)}  # documents that see each other
    assert abs(train("sft", [crossing])["loss"][0] / logged("sft_packed")["loss"][0] - 1) > 1e-2


def test_accumulated_sft():
    """TRL, too, divides by the labelled tokens of all gradient_accumulation_steps, in the loss."""
    docs = [documents("sft_accumulated", 2 * step) + documents("sft_accumulated", 2 * step + 1) for step in range(STEPS)]
    rows = [[part * ROWS + row] for row in range(ROWS) for part in (0, 1)]  # our row r is of microbatch r mod 2
    found = train("sft", [batch(d, rows) for d in docs], gradient_accumulation_steps=2)
    wanted = logged("sft_accumulated")
    counts = stored("sft_accumulated")["trained"].sum(axis=(1, 2)).reshape(STEPS, 2)
    assert (counts[:, 0] != counts[:, 1]).any()
    for name in (
        "entropy",
        "mean_token_accuracy",
    ):  # TRL logs the mean of the gradient_accumulation_steps' means, we the mean over tokens
        parts = np.stack([wanted.pop(f"{name}/{part}") for part in (0, 1)], axis=1)
        np.testing.assert_allclose(wanted[name], parts.mean(axis=1))
        wanted[name] = (parts * counts).sum(axis=1) / counts.sum(axis=1)
    assert_same(found, wanted)


# --- DPO --------------------------------------------------------------------------------------------------------------


def without_ties(metrics):
    """Where the policy is still its reference each margin is 0 up to rounding, and which answer wins is chance."""
    return {**metrics, "rewards/accuracies": metrics["rewards/accuracies"][1:]}


def dpo_batches(name, **changed):
    return [batch(docs, EACH, reference=reference) | preferring(name) | changed for docs, reference in pairs(name)]


def test_dpo():
    found, wanted = train("any", dpo_batches("dpo")), logged("dpo")
    assert len(wanted) == 13 and np.ptp(wanted["rewards/margins"]) > 1 and 0 < wanted["rewards/accuracies"][1:].min() < 1
    np.testing.assert_allclose([found["loss"][0], wanted["loss"][0]], np.log(2), rtol=1e-6)
    assert_same(without_ties(found), without_ties(wanted))


def test_dpo_packed_padded_and_accumulated():
    rows = [[2, 0], [3], [], [1]]
    found = train("dpo", [batch(docs, rows, 288, reference) for docs, reference in pairs("dpo")], gradient_accumulation_steps=2)
    assert_same(without_ties(found), without_ties(logged("dpo")))


@pytest.mark.parametrize("name", OTHERS)
def test_other_preference_losses(name):
    if "sft" in CASES[name].settings["loss_type"]:  # see make_trl.py
        assert np.ptp(stored(name)["trained"][:, :ROWS].sum(axis=2)) == 0
    assert_same(train("any", dpo_batches(name)), logged(name))


def test_swapping_chosen_and_rejected_flips_the_margin():
    made = dpo_batches("dpo_ipo")[0] | preferring("dpo")
    swapped = made | {name: made[name][..., ::-1] for name in ("pair_segments", "ref_logprobs")}
    a, b = (train("any", [each]) for each in (made, swapped))
    np.testing.assert_array_equal(a["rewards/margins"], -b["rewards/margins"])
    np.testing.assert_array_equal(a["logps/chosen"], b["logps/rejected"])


def test_what_a_prompt_says_next_is_not_learnt():
    made = dpo_batches("dpo_ipo")[0]
    other = made | {"targets": jnp.where(made["loss_weights"] > 0, made["targets"], (made["targets"] + 7) % CFG.vocab_size)}
    a, b = (train("any", [each, made]) for each in (made, other))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- which tokens are trained -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = make_trl.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert "{% generation %}" in config["chat_template"]
    path.write_text(json.dumps({**config, "chat_template": chat.TEMPLATE}), encoding="utf-8")  # ours needs no marks
    return Tokenizer(directory)


def by_ids(docs):
    """Ids -> which of them are trained."""
    return {tuple(map(int, ids)): tuple(map(int, mask)) for ids, mask in docs}


def recorded(name):
    return by_ids(doc for number in range(len(stored(name)["tokens"])) for doc in documents(name, number))


def test_dialogues_are_encoded_as_in_trl(tokenizer):
    rows = make_trl.rows("dialogues", make_trl.count(CASES["sft"]))
    ours = by_ids(chat.encode_dialogue(tokenizer, row["messages"]) for row in rows)
    assert ours == recorded("sft") and len({sum(mask) for mask in ours.values()}) > 5


@pytest.mark.parametrize("name", ["sft_packed", "sft_accumulated"])
@pytest.mark.parametrize("turns", [1, 3])
def test_answers_are_encoded_as_in_trl(tokenizer, name, turns):
    """Prompts of one turn, and those with an earlier answer."""
    rows = [row for row in make_trl.rows("answers", make_trl.count(CASES[name])) if len(row["prompt"]) == turns]
    ours, trl = by_ids(chat.encode_dialogue(tokenizer, read_fields(row)["messages"]) for row in rows), recorded(name)
    common = ours.keys() & trl.keys()
    assert len(common) > 0.7 * len(ours)  # 20 steps do not reach every packed row
    assert {ids: ours[ids] for ids in common} == {ids: trl[ids] for ids in common}


@pytest.mark.parametrize("name", ["dpo", "dpo_ipo", "dpo_sigmoid_sft"])
def test_pairs_are_encoded_as_in_trl(tokenizer, name):
    rows = make_trl.rows(CASES[name].rows, make_trl.count(CASES[name]))
    ours = [tuple(by_ids(chat.encode_pair(tokenizer, row)).items()) for row in rows]
    docs = [documents(name, step) for step in range(CASES[name].steps)]
    trl = [tuple(by_ids((part[p], part[p + ROWS])).items()) for part in docs for p in range(ROWS)]
    assert sorted(ours) == sorted(trl)


def test_rows_are_packed_as_full_as_in_trl(tokenizer):
    case = CASES["sft_packed"]
    rows = make_trl.rows("answers", make_trl.count(case))
    lengths = np.array([len(chat.encode_dialogue(tokenizer, read_fields(row)["messages"])[0]) for row in rows])
    starts, units, _ = packing.best_fit(lengths, case.settings["max_length"])
    assert sorted(np.add.reduceat(lengths[units], starts[:-1])) == sorted(stored("sft_packed")["fill"])


# --- live -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_trl_that_is_installed_logs_the_same(name):
    pytest.importorskip("trl")
    made = make_trl.train(CASES[name])
    for part in ("tokens", "trained", "positions"):
        np.testing.assert_array_equal(made[part], stored(name)[part])
    assert_same(dict(zip(made["names"].tolist(), made["values"].T, strict=True)), logged(name))
