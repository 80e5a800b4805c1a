import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import model
from tanuki_jax.errors import UserError
from tanuki_jax.model import Sampling, streaming
from tests.tiny import apply, random_params, small

CFG = small(n_experts=4, expert_impl="reference")  # which compiles the fastest
PARAMS = random_params(CFG)
PROMPTS = [[5, 6, 7], [8], list(range(1, 20))]


def logits_after(ids):
    tokens = jnp.array([[*ids, *[0] * (32 - len(ids))]])
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(32)[None]}
    return apply(CFG, PARAMS, batch).hidden[0, len(ids) - 1] @ PARAMS["head"]


def test_greedy_equals_the_forward_pass_for_prompts_of_any_length_together():
    found = model.generate(CFG, PARAMS, PROMPTS, Sampling(max_new_tokens=4))
    for prompt, ids in zip(PROMPTS, found, strict=True):
        expected = list(prompt)
        for _ in range(4):
            expected.append(int(logits_after(expected).argmax()))
        assert ids == expected[len(prompt) :]


def test_a_stop_token_ends_a_row_and_is_left_out():
    [free] = model.generate(CFG, PARAMS, PROMPTS[:1], Sampling(max_new_tokens=6))
    [cut] = model.generate(CFG, PARAMS, PROMPTS[:1], Sampling(max_new_tokens=6, stop=(free[2],)))
    assert cut == free[: free.index(free[2])]


def test_sampling_is_seeded_and_top_p_keeps_the_likeliest():
    hot = Sampling(max_new_tokens=8, temperature=1.0)
    assert model.generate(CFG, PARAMS, PROMPTS, hot, seed=1) == model.generate(CFG, PARAMS, PROMPTS, hot, seed=1)
    assert model.generate(CFG, PARAMS, PROMPTS, hot, seed=1) != model.generate(CFG, PARAMS, PROMPTS, hot, seed=2)
    narrow = Sampling(max_new_tokens=8, temperature=1.0, top_p=1e-6)
    assert model.generate(CFG, PARAMS, PROMPTS, narrow, seed=3) == model.generate(
        CFG, PARAMS, PROMPTS, Sampling(max_new_tokens=8)
    )


def test_what_is_drawn_for_a_prompt_does_not_depend_on_the_rows_beside_it():
    """Neither on their number and order, nor on the padding that a longer one brings; equal prompts have draws of their own."""
    hot = Sampling(max_new_tokens=8, temperature=1.0)
    alone = [model.generate(CFG, PARAMS, [prompt], hot, seed=1)[0] for prompt in PROMPTS]
    assert model.generate(CFG, PARAMS, PROMPTS, hot, seed=1) == alone
    assert model.generate(CFG, PARAMS, PROMPTS[:0:-1], hot, seed=1) == alone[:0:-1]
    first, second = model.generate(CFG, PARAMS, [PROMPTS[0]] * 2, hot, seed=1)
    assert first == alone[0] != second


def test_a_seed_has_up_to_64_bits():
    hot = Sampling(max_new_tokens=8, temperature=1.0)
    drawn = [model.generate(CFG, PARAMS, PROMPTS, hot, seed=seed) for seed in (1, 2**63 - 1, -(2**63), 2**40 + 1)]
    assert drawn[1] == model.generate(CFG, PARAMS, PROMPTS, hot, seed=-1) and drawn[3] == drawn[0] != drawn[1]


def test_samples_follow_the_distribution():
    probabilities = np.asarray(jax.nn.softmax(logits_after([5, 6, 7])))
    drawn = [ids[0] for ids in model.generate(CFG, PARAMS, [[5, 6, 7]] * 4000, Sampling(1, temperature=1.0), seed=0)]
    shares = np.bincount(drawn, minlength=CFG.vocab_size) / 4000
    assert np.abs(shares - probabilities).max() < 0.02


def test_no_token_is_dropped_while_decoding():
    """An expert's room is for training: an answer would depend on the other rows."""
    tight = dataclasses.replace(CFG, capacity_factor=0.5)
    options = Sampling(max_new_tokens=4)
    assert model.generate(tight, PARAMS, PROMPTS, options) == model.generate(CFG, PARAMS, PROMPTS, options)


def test_any_seed_of_64_bits_will_do():
    hot = Sampling(max_new_tokens=8, temperature=1.0)
    for seed in (2**40 + 5, -(2**63), 2**63 - 1):
        [ids] = model.generate(CFG, PARAMS, PROMPTS[:1], hot, seed)
        assert list(model.stream(CFG, PARAMS, PROMPTS[0], hot, seed)) == ids


def test_an_empty_prompt_is_an_error():
    assert model.generate(CFG, PARAMS, [], Sampling()) == []
    with pytest.raises(UserError, match="prompt is empty"):
        model.generate(CFG, PARAMS, [[]], Sampling())


# --- a token at a time ------------------------------------------------------------------------------------------------


SAMPLED = Sampling(max_new_tokens=6, temperature=1.0, top_p=0.9)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([8], Sampling(max_new_tokens=6)),
        ([5, 6, 7], SAMPLED),
        (list(range(1, 65)), SAMPLED),
        (list(range(1, 96)) * 2, Sampling(max_new_tokens=6)),
    ],
    ids=["1", "3", "64", "190"],
)
def test_a_stream_is_what_generate_gives(prompt, options):
    [ids] = model.generate(CFG, PARAMS, [prompt], options, seed=3)
    assert list(model.stream(CFG, PARAMS, prompt, options, seed=3)) == ids


def test_a_stream_ends_before_its_stop_token_whichever_it_is():
    free = list(model.stream(CFG, PARAMS, PROMPTS[0], Sampling(max_new_tokens=6)))
    for stop in ((free[2],), (95, free[2]), (free[4], free[2])):
        cut = list(model.stream(CFG, PARAMS, PROMPTS[0], Sampling(max_new_tokens=6, stop=stop)))
        assert cut == free[: next(i for i, token in enumerate(free) if token in stop)]


def test_a_stream_gives_a_token_before_it_makes_the_next(monkeypatch):
    steps = []
    real = streaming.slots.step
    monkeypatch.setattr(streaming.slots, "step", lambda *args: (steps.append(args), real(*args))[1])
    tokens = model.stream(CFG, PARAMS, PROMPTS[0], Sampling(max_new_tokens=6))
    for number in (1, 2, 3):
        next(tokens)
        assert len(steps) == number


def test_streams_of_any_length_up_to_a_power_of_two_are_two_programs():
    def compiled():
        return model.slots.admit._cache_size(), model.slots.step._cache_size()

    list(model.stream(CFG, PARAMS, [5], Sampling(max_new_tokens=3)))
    before = compiled()
    for length, limit in ((1, 2), (20, 30), (60, 4)):
        list(model.stream(CFG, PARAMS, [5] * length, Sampling(limit, stop=(96,))))
    assert compiled() == before
    next(model.stream(CFG, PARAMS, [5], Sampling(400)))
    assert compiled() == (before[0] + 1, before[1] + 1)


def test_a_stream_of_an_empty_prompt_is_an_error():
    with pytest.raises(UserError, match="prompt is empty"):
        list(model.stream(CFG, PARAMS, [], Sampling()))
