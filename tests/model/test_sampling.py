import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import model
from tanuki_jax.model import Sampling, sampling
from tests.tiny import random_params, small

V = 40
RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.standard_normal((6, V))).astype(np.float32)
OFF = dict(repetition_penalty=1.0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
keep_likeliest = jax.jit(sampling.keep_likeliest)
choose = jax.jit(sampling.choose)


def choices(*rows):
    """Options of each row, those that are not named being off."""
    return sampling.stack([Sampling(**row) for row in rows])


def kept_by_hand(logits, top_k, top_p, min_p):
    """Which tokens are left, one after the other by falling logit, as transformers' warpers count them."""
    order = np.argsort(-logits.astype(np.float64), kind="stable")
    if top_k:
        order = order[:top_k]
    chances = np.exp(logits[order].astype(np.float64) - logits[order[0]])
    chances /= chances.sum()
    total, left = 0.0, []
    for token, chance in zip(order, chances, strict=True):
        if left and (total >= top_p or chance < min_p * chances[0]):
            break
        left.append(int(token))
        total += chance
    return sorted(left)


@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=1),
        dict(top_k=7),
        dict(top_k=V + 5),
        dict(top_p=0.5),
        dict(top_p=0.999),
        dict(top_p=1e-6),
        dict(min_p=0.05),
        dict(min_p=1.0),
        dict(top_k=9, top_p=0.7),
        dict(top_k=20, top_p=0.95, min_p=0.02),
        {},
    ],
    ids=str,
)
def test_what_is_left_is_what_is_counted_by_hand(options):
    """Of rows with other options beside it, too; logits of both signs, large and small."""
    logits = (
        LOGITS * np.array([1, 0.1, 10, 1, -1, 1], np.float32)[:, None] + np.array([0, 5, -50, -9, 0, 0], np.float32)[:, None]
    )
    rows = [options, {}, options, dict(top_k=3), options, dict(top_p=0.2)]
    found = np.isfinite(keep_likeliest(jnp.asarray(logits), choices(*rows)))
    for row, (own, kept) in enumerate(zip(rows, found, strict=True)):
        expected = kept_by_hand(logits[row], *((OFF | own)[name] for name in ("top_k", "top_p", "min_p")))
        assert np.flatnonzero(kept).tolist() == expected, (row, own)


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_what_is_left_is_what_transformers_leaves(top_p):
    """Penalty, temperature and all cuts in its order and with its numbers."""
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers")
    options = dict(repetition_penalty=1.7, temperature=0.6, top_k=12, top_p=top_p, min_p=0.03)
    held = RNG.integers(0, V, (len(LOGITS), 9))
    theirs = generation.LogitsProcessorList(
        [
            generation.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]),
            generation.TemperatureLogitsWarper(options["temperature"]),
            generation.TopKLogitsWarper(options["top_k"]),
            generation.TopPLogitsWarper(top_p),
            generation.MinPLogitsWarper(options["min_p"]),
        ]
    )(torch.tensor(held), torch.tensor(LOGITS)).softmax(-1)
    draws, rows = 500, len(LOGITS)
    seen = np.zeros((rows, V), bool)
    np.put_along_axis(seen, held, True, axis=1)
    keys = jax.vmap(jax.random.key)(jnp.arange(rows * draws))
    logits, seen = (jnp.repeat(jnp.asarray(a), draws, axis=0) for a in (LOGITS, seen))
    drawn = choose(logits, choices(*[options] * rows * draws), seen, keys, jnp.zeros(rows * draws, jnp.int32))
    for row, chances in zip(np.asarray(drawn).reshape(rows, draws), theirs.numpy(), strict=True):
        assert np.abs(np.bincount(row, minlength=V) / draws - chances).max() < 0.1 and (chances[row] > 0).all()


def test_the_set_that_reaches_top_p_is_the_smallest():
    """Chances of a half, a quarter and two eighths: sums that floats hold exactly."""
    logits = jnp.log(jnp.asarray([[0.125, 0.5, 0.125, 0.25]] * 5, jnp.float32))
    found = keep_likeliest(logits, choices(*(dict(top_p=p) for p in (0.4, 0.51, 0.74, 0.76, 1.0))))
    assert np.isfinite(found).sum(axis=1).tolist() == [1, 2, 2, 4, 4]  # equal ones stay together


def test_a_penalty_counts_for_tokens_of_the_row_only_and_by_their_sign():
    logits = np.array([[3.0, 2.5, -1.0, -1.2], [3.0, 2.5, -1.0, -1.2], [-3.0, -1.0, -1.9, -4.0]], np.float32)
    seen = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]], bool)
    keys, steps = jax.vmap(jax.random.key)(jnp.arange(3)), jnp.zeros(3, jnp.int32)
    greedy = [
        choose(jnp.asarray(logits), choices(*[dict(repetition_penalty=p)] * 3), seen, keys, steps) for p in (1.0, 1.5, 2.0)
    ]
    assert np.array(greedy).tolist() == [[0, 0, 1], [1, 0, 1], [1, 0, 2]]


def test_draws_follow_the_distribution_that_is_left():
    """3 of 40 tokens at temperature 2, one of them penalised: each as often as its share says."""
    rows, penalty, temperature = 4000, 1.3, 2.0
    top = np.argsort(-LOGITS[0])[:3]
    seen = np.zeros((rows, V), bool)
    seen[:, top[0]] = True
    scores = LOGITS[0, top] / np.array([penalty, 1, 1])
    chances = np.exp(scores / temperature - (scores / temperature).max())
    options = choices(*[dict(repetition_penalty=penalty, temperature=temperature, top_k=3)] * rows)
    keys = jax.vmap(jax.random.key)(jnp.arange(rows))
    logits = jnp.broadcast_to(LOGITS[0], (rows, V))
    drawn = np.asarray(choose(logits, options, seen, keys, jnp.zeros(rows, jnp.int32)))
    shares = np.bincount(drawn, minlength=V) / rows
    np.testing.assert_allclose(shares[top], chances / chances.sum(), atol=0.03)
    assert shares[top].sum() == pytest.approx(1)


def test_greedy_rows_stay_greedy_beside_drawn_ones():
    keys, steps = jax.vmap(jax.random.key)(jnp.arange(6)), jnp.zeros(6, jnp.int32)
    hot = choices({}, dict(temperature=5.0), {}, dict(temperature=5.0), dict(top_k=3, top_p=0.1, min_p=0.5), {})
    found = choose(jnp.asarray(LOGITS), hot, jnp.zeros((6, V), bool), keys, steps)
    for row in (0, 2, 4, 5):
        assert found[row] == LOGITS[row].argmax()


# --- through generate -------------------------------------------------------------------------------------------------

CFG = small(n_layers=1)
PARAMS = random_params(CFG)
PROMPT = [5, 6, 7]


def test_no_value_of_an_option_compiles_anew():
    model.generate(CFG, PARAMS, [PROMPT], Sampling(20, temperature=1.0))
    compiled = sys.modules["tanuki_jax.model.generate"]._generate
    before = compiled._cache_size()
    for options in (
        Sampling(15, temperature=0.7, top_p=0.9, stop=(4, 5)),
        Sampling(25, top_k=3, min_p=0.1, repetition_penalty=1.2, temperature=1.0),
        Sampling(16, repetition_penalty=1.1),
    ):
        model.generate(CFG, PARAMS, [PROMPT], options, seed=7)
    assert compiled._cache_size() == before


def test_a_penalty_keeps_a_text_from_repeating_itself():
    [free] = model.generate(CFG, PARAMS, [PROMPT], Sampling(24))
    [other] = model.generate(CFG, PARAMS, [PROMPT], Sampling(24, repetition_penalty=50.0))
    assert len(set(free)) < 24 and len({*PROMPT, *other}) == 27


def test_the_samples_of_a_request_are_those_of_equal_prompts():
    hot = Sampling(6, temperature=1.0)
    texts = model.generate(CFG, PARAMS, [PROMPT] * 3, hot, seed=5)
    keys = [sampling.request_key(5, PROMPT, index) for index in range(3)]
    numbers = sampling.row_numbers([PROMPT] * 3)
    rows = sampling.row_keys(np.int32(5), numbers)
    np.testing.assert_array_equal(jax.random.key_data(jnp.stack(keys)), jax.random.key_data(rows))
    assert len({tuple(text) for text in texts}) == 3
    assert list(model.stream(CFG, PARAMS, PROMPT, hot, seed=5)) == texts[0]
