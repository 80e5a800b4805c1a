"""The decoder of slots against the scanned one before it, and against the forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, model, parallel
from tanuki_jax.evaluate import score
from tanuki_jax.model import Sampling, sampling, slots
from tanuki_jax.model.generate import pad_prompts
from tests.model import scanned_decoder as scanned
from tests.tiny import apply, prompt_scores, random_params, small, with_options

MODELS = {"dense": small(), "mixture": small(n_experts=4)}
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, 96, length).tolist() for length in RNG.integers(1, 33, 64)]
LIMITS = [int(limit) for limit in RNG.integers(1, 13, 64)]


@functools.cache
def loaded(name):
    params = random_params(MODELS[name])
    return params, slots.unstack(MODELS[name], params)


@functools.cache
def expected(name):
    """The new ids of each prompt, by the decoder before this one."""
    texts = scanned.generate(with_options(MODELS[name], expert_impl="reference"), loaded(name)[0], PROMPTS, max(LIMITS))
    return [text[:limit] for text, limit in zip(texts, LIMITS, strict=True)]


# One program for nearly all tests: 8 slots of 256 tokens, prompts padded to 32, 4 tokens a step with the 3 likeliest.
COUNT, LENGTH, WIDTH, STEPS, TOP = 8, 256, 32, 4, 3
GREEDY = Sampling()


def put(cfg, weights, state, slot, prompt, options, key):
    tokens, lengths = pad_prompts([prompt], WIDTH)
    admitted = slots.Prompts(tokens, lengths, np.array([slot], np.int32), sampling.stack([options]), key[None])
    return slots.admit(cfg, weights, state, admitted)


def fill(cfg, weights, prompts, options=GREEDY):
    """Slots with these prompts, the random key of each from the seed of its number."""
    state = slots.empty(cfg, COUNT, LENGTH)
    for slot, prompt in enumerate(prompts):
        state = put(cfg, weights, state, slot, prompt, options, sampling.request_key(slot, prompt))
    return state


def serve(cfg, weights, requests, count=COUNT, length=LENGTH):
    """The new ids of each request (prompt, limit, options, key) from slots that are given out as they become free, and their
    log-probabilities."""
    state, waiting, busy = slots.empty(cfg, count, length), list(enumerate(requests)), {}
    ids, logprobs = [[] for _ in requests], [[] for _ in requests]
    while waiting or busy:
        for slot in sorted(set(range(count)) - busy.keys())[: len(waiting)]:
            number, (prompt, _, options, key) = waiting.pop(0)
            state, busy[slot] = put(cfg, weights, state, slot, prompt, options, key), number
        state, chosen = slots.step(cfg, weights, state, STEPS, TOP)
        for slot, number in list(busy.items()):
            ids[number] += np.asarray(chosen.ids[:, slot]).tolist()
            logprobs[number] += np.asarray(chosen.logprobs[:, slot]).tolist()
            if len(ids[number]) >= requests[number][1]:
                del busy[slot]
    limits = [limit for _, limit, _, _ in requests]
    return [[row[:limit] for row, limit in zip(rows, limits, strict=True)] for rows in (ids, logprobs)]


def greedy(count=64):
    key = sampling.request_key(0, [1])
    return [(prompt, limit, Sampling(), key) for prompt, limit in zip(PROMPTS[:count], LIMITS[:count], strict=True)]


QUICK = [(name, COUNT, LENGTH) for name in MODELS]
EVERY = [(name, count, length) for name in MODELS for count in (1, 8, 32, 64) for length in (256, 1024)]


@pytest.mark.parametrize(
    ("name", "count", "length"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY]
)
def test_greedy_texts_of_any_number_of_busy_slots_are_those_of_the_decoder_before(name, count, length):
    assert serve(MODELS[name], loaded(name)[1], greedy(), count, length)[0] == expected(name)


def test_a_seeded_sample_is_what_its_prompt_alone_gives():
    """Beside others with other options; `generate` is called with one prompt at a time."""
    cfg, weights = MODELS["mixture"], loaded("mixture")[1]
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 16]  # of one width
    options = [
        Sampling(8, temperature=1.0),
        Sampling(8, temperature=0.7, top_p=0.8),
        Sampling(8),
        Sampling(8, temperature=1.3, top_k=5, repetition_penalty=1.5),
        Sampling(8, temperature=1.0, min_p=0.1),
    ]
    seeds = range(70, 80)
    asked = zip(prompts, options * 2, seeds, strict=False)
    requests = [(prompt, 8, own, sampling.request_key(seed, prompt)) for prompt, own, seed in asked]
    texts, _ = serve(cfg, weights, requests)
    for text, (prompt, _, own, _), seed in zip(texts, requests, seeds, strict=True):
        assert text == model.generate(cfg, weights, [prompt], own, seed)[0]


@pytest.mark.parametrize("name", MODELS)
def test_of_one_number_of_slots_a_row_has_the_same_bits_whatever_the_others_hold(name):
    cfg, weights = MODELS[name], loaded(name)[1]
    request = (PROMPTS[5], 12, Sampling(temperature=1.0), sampling.request_key(3, PROMPTS[5]))
    ids, logprobs = serve(cfg, weights, [request])
    others = greedy(20)
    for place in (0, 3, 7):
        beside = [*others[:place], request, *others[place:]]
        found_ids, found_logprobs = serve(cfg, weights, beside)
        assert found_ids[place] == ids[0] and found_logprobs[place] == logprobs[0]


# --- what a token's numbers are ---------------------------------------------------------------------------------------


def forward(cfg, params, rows):
    """Hidden states after the last token of each row, and log-probabilities [V] of every place, by the whole forward pass."""
    tokens, lengths = pad_prompts(rows, 64)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": np.broadcast_to(np.arange(64), tokens.shape)}
    hidden = apply(cfg, params, batch).hidden
    return hidden[np.arange(len(rows)), lengths - 1], jax.nn.log_softmax(hidden @ params["head"])


MIXED = {
    "dense first": small(n_layers=3, n_experts=4, first_dense=1),
    "every second": small(
        n_layers=4, n_experts=5, moe_every=2, top_k=3, expert_d_ff=13, normalized_gate=False, router_bias=True
    ),
    "qk norm": small(qk_norm=True, n_kv_heads=4),
}
OTHERS = ("mixture", "dense first", "qk norm")


@pytest.mark.parametrize("name", ["dense", "every second", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_hidden_states_and_log_probabilities_are_those_of_the_forward_pass(name):
    cfg = with_options((MODELS | MIXED)[name], expert_impl="reference")
    params = random_params(cfg)
    rows, options = PROMPTS[:3], Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2)
    weights = slots.unstack(cfg, params)
    state, chosen = slots.step(cfg, weights, fill(cfg, weights, rows, options), STEPS, TOP)
    texts = [[*row, *np.asarray(chosen.ids[:, i]).tolist()] for i, row in enumerate(rows)]
    hidden, logprobs = (np.asarray(a) for a in forward(cfg, params, texts))
    chosen = jax.tree.map(np.asarray, chosen)
    np.testing.assert_allclose(state.hidden_BD[:3], hidden, rtol=1e-4, atol=1e-5)
    for i, row in enumerate(rows):
        for t in range(STEPS):
            place = logprobs[i, len(row) + t - 1]
            np.testing.assert_allclose(chosen.logprobs[t, i], place[texts[i][len(row) + t]], atol=1e-5)
            np.testing.assert_allclose(chosen.top_logprobs[t, i], np.sort(place)[::-1][:TOP], atol=1e-5)
            np.testing.assert_allclose(place[chosen.top_ids[t, i]], chosen.top_logprobs[t, i], atol=1e-5)
    held = [set(text) for text in texts]
    assert [set(np.flatnonzero(row).tolist()) for row in state.seen_BV[:3]] == held


def test_the_likeliest_tokens_log_probability_is_the_first_of_the_top_bit_for_bit():
    cfg, weights = MODELS["mixture"], loaded("mixture")[1]
    state = fill(cfg, weights, PROMPTS[:COUNT])
    _, chosen = slots.step(cfg, weights, state, STEPS, TOP)
    np.testing.assert_array_equal(chosen.ids, chosen.top_ids[..., 0])
    np.testing.assert_array_equal(chosen.logprobs, chosen.top_logprobs[..., 0])


@pytest.mark.parametrize("chunk", [12, pytest.param(512, marks=pytest.mark.slow)])
def test_scores_of_a_prompt_are_those_of_evaluate(chunk):
    cfg = with_options(MODELS["mixture"], logits_chunk=chunk)
    params, weights = loaded("mixture")
    answered = [prompt + text for prompt, text in zip(PROMPTS, expected("mixture"), strict=True) if len(prompt + text) <= 32]
    rows = [answered[0], answered[1], (PROMPTS[3] * 32)[:32]]
    tokens, _ = pad_prompts(rows, 32)
    found = prompt_scores(cfg, weights, tokens, 5)
    assert found.logprobs.shape == (3, 31) and found.top_ids.shape == found.top_logprobs.shape == (3, 31, 5)
    masks = [[0] + [1] * (len(row) - 1) for row in rows]
    sums = score.sequence_logprobs(cfg, params, rows, masks)
    for row, total, logprobs in zip(rows, sums, found.logprobs, strict=True):
        assert np.asarray(logprobs[: len(row) - 1], np.float64).sum() == pytest.approx(total, abs=1e-5 * max(1, len(row)))
    table, found = np.asarray(forward(cfg, params, rows)[1]), jax.tree.map(np.asarray, found)
    for i, row in enumerate(rows):
        for t in range(len(row) - 1):
            np.testing.assert_allclose(found.logprobs[i, t], table[i, t, row[t + 1]], atol=1e-5)
            np.testing.assert_allclose(table[i, t, found.top_ids[i, t]], found.top_logprobs[i, t], atol=1e-5)
    likeliest = found.top_ids[..., 0] == tokens[:, 1:]
    np.testing.assert_array_equal(found.logprobs[likeliest], found.top_logprobs[..., 0][likeliest])
    assert likeliest.any()


@pytest.mark.slow
def test_bfloat16_is_computed_in_bfloat16_and_stays_near():
    cfg = with_options(MODELS["mixture"], dtype="bfloat16")
    params = loaded("mixture")[0]
    weights = slots.unstack(cfg, params)
    layer = weights.layers[0]["params"]
    assert weights.head_DV.dtype == layer["attn"]["q"].dtype == layer["moe"]["up"].dtype == jnp.bfloat16
    assert layer["moe"]["router"].dtype == layer["norm_attn"].dtype == weights.norm_final_D.dtype == jnp.float32
    state = fill(cfg, weights, PROMPTS[:3])
    assert state.cache[1]["k"].dtype == jnp.bfloat16
    state, chosen = slots.step(cfg, weights, state, STEPS, TOP)
    texts = [[*row, *np.asarray(chosen.ids[:, i]).tolist()] for i, row in enumerate(PROMPTS[:3])]
    _, table = forward(MODELS["mixture"], params, texts)
    for i, row in enumerate(PROMPTS[:3]):
        for t in range(4):
            assert float(chosen.logprobs[t, i]) == pytest.approx(float(table[i, len(row) + t - 1].max()), abs=0.1)


# --- one program for everything -----------------------------------------------------------------------------------------


def test_one_program_gives_what_the_programs_for_each_number_of_steps_give():
    cfg, weights = MODELS["dense"], loaded("dense")[1]
    state = fill(cfg, weights, PROMPTS[:3], Sampling(temperature=1.0, top_p=0.9))
    copy = jax.tree.map(jnp.copy, state)
    lowered = slots.step_up_to.lower(cfg, weights, copy, np.int32(1), np.bool_(True), STEPS + 2, TOP)
    assert lowered.compile().memory_analysis().alias_size_in_bytes >= sum(c.nbytes for c in jax.tree.leaves(copy.cache))
    for wanted in (True, False, True):
        state, chosen = slots.step(cfg, weights, state, STEPS, TOP)
        copy, found = slots.step_up_to(cfg, weights, copy, np.int32(STEPS), np.bool_(wanted), STEPS + 2, TOP)
        for name in ("ids", "logprobs", *(("top_ids", "top_logprobs") if wanted else ())):
            np.testing.assert_array_equal(getattr(found, name)[:STEPS], getattr(chosen, name), err_msg=name)
        assert not any(np.asarray(part[STEPS:]).any() for part in found)
        assert wanted or not np.asarray(found.top_ids).any()
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(copy), strict=True):
        np.testing.assert_array_equal(one, other)


def test_prompts_are_admitted_and_scored_by_one_program():
    cfg, weights = MODELS["dense"], loaded("dense")[1]
    prompts = PROMPTS[:2]
    tokens, lengths = pad_prompts(prompts, WIDTH)
    options, keys = sampling.stack([GREEDY] * 2), sampling.row_keys(np.int32(0), sampling.row_numbers(prompts))
    admitted = slots.Prompts(tokens, lengths, np.array([1, COUNT], np.int32), options, keys)  # the second into no slot
    expected_scores = prompt_scores(cfg, weights, tokens, TOP)
    for wanted in (True, False):
        state = slots.empty(cfg, COUNT, LENGTH)
        state, scores = slots.admit_scored(cfg, weights, state, admitted, np.bool_(wanted), TOP)
        assert np.asarray(state.position_B).tolist() == [0, lengths[0], *[0] * 6]
        for found, part in zip(scores, expected_scores, strict=True):
            np.testing.assert_allclose(found, part if wanted else np.zeros_like(part), atol=1e-5)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_slots_are_taken_over_and_nothing_of_a_freed_one_is_left():
    """A slot that runs past its end, and whose sampling is switched off, does no harm to what comes after it."""
    cfg, weights = MODELS["dense"], loaded("dense")[1]
    state = slots.empty(cfg, COUNT, LENGTH)
    before = state.cache[0]["k"]
    state = put(cfg, weights, state, 2, PROMPTS[0], Sampling(temperature=2.0), sampling.request_key(0, PROMPTS[0]))
    while int(state.position_B[2]) <= LENGTH:
        state, _ = slots.step(cfg, weights, state, STEPS, TOP)
    assert before.is_deleted()
    state = slots.release(state, np.array([2], np.int32))
    assert not np.asarray(state.choices.temperature).any()
    state = put(cfg, weights, state, 2, PROMPTS[0], Sampling(), sampling.request_key(0, PROMPTS[0]))
    _, chosen = slots.step(cfg, weights, state, STEPS, TOP)
    limit = LIMITS[0]
    assert np.asarray(chosen.ids[:, 2]).tolist()[:limit] == expected("dense")[0][:STEPS]


def test_the_cache_is_written_in_place():
    cfg, weights = MODELS["dense"], loaded("dense")[1]
    state = slots.empty(cfg, COUNT, LENGTH)
    memory = slots.step.lower(cfg, weights, state, STEPS, TOP).compile().memory_analysis()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    assert memory.alias_size_in_bytes >= cache and memory.temp_size_in_bytes < cache / 4


MESHES = [dict(fsdp=4, tensor=2), dict(fsdp=2, expert=2, tensor=2), dict(data=2, fsdp=2, context=2)]
CASES = [(sizes, rows) for sizes in MESHES for rows in (8, 3)]


@pytest.mark.parametrize(
    ("sizes", "rows"), [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])], ids=str
)
def test_eight_devices_give_the_text_of_one(sizes, rows):
    """Rows that divide over the devices, and rows that do not; weights and cache stay split."""
    cfg, (params, _) = MODELS["mixture"], loaded("mixture")
    mesh = parallel.make_mesh(config.Mesh(**sizes), jax.devices())
    placed = jax.device_put(params, checkpoint.parameter_shardings(cfg, mesh))
    with jax.set_mesh(mesh):
        weights = slots.unstack(cfg, placed)
        found = model.generate(cfg, weights, PROMPTS[:rows], Sampling(12))
        cache = slots.empty(cfg, 8, 64).cache[0]["k"]
    for part, tree in (("attn", placed["layers"]["attn"]), ("moe", placed["layers"]["moe"])):
        for name, stacked in tree.items():
            layer = weights.layers[1]["params"][part][name]
            whole, local = (a.addressable_shards[0].data.size for a in (stacked, layer))
            assert local * cfg.n_layers == whole, name
    replicas = 2 if "context" in sizes else 1
    assert cache.addressable_shards[0].data.size * 8 == cache.size * replicas
    assert found == scanned.generate(with_options(cfg, expert_impl="reference"), params, PROMPTS[:rows], 12)
