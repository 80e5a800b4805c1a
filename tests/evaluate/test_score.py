import jax
import numpy as np
import pytest

from tanuki_jax.data.chat import encode_chat
from tanuki_jax.errors import UserError
from tanuki_jax.evaluate import score
from tanuki_jax.model import Sampling, generate
from tests.tiny import apply, init, small

CFG = small(vocab_size=512)
PARAMS = init(CFG, jax.random.key(0))
ROWS = [
    {"text": "昔々、山の奥に狸が住んでいました。"},
    {"text": "狸"},
    {"text": ""},
    {"prompt": "What is the sum of 1, 2, 3? ", "completion": "The sum is 6."},
    {"prompt": "", "completion": "The mean is 2."},
    {"prompt": "山の", "completion": "奥に狸が\n"},
    {"prompt": "月を見て\n", "completion": ""},
    {"text": "The tanuki lived deep in the mountains, 3 miles from the river. " * 3},
]


def logprobs_of(ids):
    """Log-probability of each token after the first, by the whole forward pass and a softmax in float64."""
    tokens = np.zeros((1, 192), np.int32)  # one shape for all; what follows a token does not change it
    tokens[0, : len(ids)] = ids
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": np.arange(192)[None]}
    hidden_SD = apply(CFG, PARAMS, batch).hidden[0, : len(ids)]
    logits = np.asarray(hidden_SD, np.float64) @ np.asarray(PARAMS["head"], np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return table[np.arange(len(ids) - 1), ids[1:]]


def scored(tokenizer, rows):
    found = score.score_rows(CFG, PARAMS, tokenizer, rows)
    return np.array([row["logprob"] for row in found]), [row["tokens"] for row in found]


def test_texts_and_completions_equal_the_direct_computation(tokenizer):
    found, tokens = scored(tokenizer, ROWS)
    for row, logprob, count in zip(ROWS, found, tokens, strict=True):
        ids = tokenizer.encode(row.get("text", row.get("prompt", "") + row.get("completion", "")))
        # Prompts here end where a token ends.
        start = len(tokenizer.encode(row["prompt"])) if "prompt" in row else 1
        assert count == max(0, len(ids) - max(start, 1))
        expected = logprobs_of(ids)[max(start, 1) - 1 :].sum() if count else 0.0
        assert logprob == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_prompt_and_its_completion_add_up_to_the_text(tokenizer):
    prompt, completion = "What is the mean of 1, 2, 3?\n", "The mean is 2."
    rows = [{"text": prompt + completion}, {"text": prompt}, {"prompt": prompt, "completion": completion}]
    (whole, first, second), (n, a, b) = scored(tokenizer, rows)
    assert n == a + b and whole == pytest.approx(first + second, rel=1e-5)


def test_a_completion_of_unknown_characters_after_one_counts_all_its_bytes(tokenizer):
    assert scored(tokenizer, [{"prompt": "🦝", "completion": "🐈"}])[1] == [4]


def test_batching_and_order_change_nothing(tokenizer, monkeypatch):
    rows = [{"text": "山の奥に狸が。" * n} for n in (1, 7, 2, 3, 11, 1)] + ROWS
    together, _ = scored(tokenizer, rows)
    backwards, _ = scored(tokenizer, rows[::-1])
    monkeypatch.setattr(score, "MAX_SEQUENCES", 2)
    np.testing.assert_allclose(scored(tokenizer, rows)[0], together, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(backwards[::-1], together, rtol=1e-5, atol=1e-5)


def test_a_mask_says_which_tokens_count():
    ids, mask = [5, 6, 7, 8, 9], [1, 0, 1, 1, 0]  # the first has nothing before it
    [found] = score.sequence_logprobs(CFG, PARAMS, [ids], [mask])
    assert found == pytest.approx(logprobs_of(ids)[[1, 2]].sum(), rel=1e-5)


def test_a_row_without_its_fields_is_an_error_that_gives_its_number(tokenizer):
    for bad in ({"prompt": "a"}, {"text": 5}, {}):
        with pytest.raises(UserError, match="row 2"):
            score.score_rows(CFG, PARAMS, tokenizer, [{"text": "a"}, bad])


@pytest.mark.parametrize("batch_size", [2, 8])
def test_answers_together_are_those_of_each_alone(tokenizer, batch_size):
    conversations = [[{"role": "user", "content": "山の奥" * n}] for n in (3, 1, 9, 2, 1)]
    conversations.append([*conversations[0], {"role": "assistant", "content": "狸"}, {"role": "user", "content": "月"}])
    sampling = Sampling(max_new_tokens=5, stop=(tokenizer.eos,))
    expected = []
    for messages in conversations:
        prompt, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
        expected.append(tokenizer.decode(generate(CFG, PARAMS, [prompt], sampling)[0]))
    assert score.answers(CFG, PARAMS, tokenizer, conversations, sampling, batch_size) == expected
    assert len(set(expected)) > 1


def test_no_conversations_have_no_answers(tokenizer):
    assert score.answers(CFG, PARAMS, tokenizer, [], Sampling(), 4) == []


def test_exact_answers_are_shares_overall_and_per_family():
    rows = [{"family": "a", "answer": "1"}, {"family": "b", "answer": "2"}, {"family": "a", "answer": "3"}]
    found = score.exact_answers(rows, ["1", "0", "0"], lambda row, answer: row["answer"] == answer)
    assert found == {"exact_match": 0.3333, "prompts": 3, "families": {"a": 0.5, "b": 0.0}}
    with pytest.raises(ValueError):
        score.exact_answers(rows, ["1"], lambda row, answer: True)


def test_margins_are_the_difference_of_the_last_answers_alone(tokenizer):
    pairs = [
        {"prompt": "山", "chosen": "狸が。", "rejected": "The moon."},
        {"prompt": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
         "chosen": [{"role": "assistant", "content": "6"}], "rejected": "合計は6です。"},
        {"prompt": "山", "chosen": "狸", "rejected": "月"},
    ]  # fmt: skip
    expected = []
    for pair in pairs:
        prompt = [{"role": "user", "content": pair["prompt"]}] if isinstance(pair["prompt"], str) else pair["prompt"]
        start = len(encode_chat(tokenizer, prompt, add_generation_prompt=True)[0])
        sides = []
        for side in (pair["chosen"], pair["rejected"]):
            answer = side if isinstance(side, str) else side[0]["content"]
            ids, _ = encode_chat(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
            assert ids[-1] == tokenizer.eos
            sides.append(logprobs_of(ids)[start - 1 :].sum())
        expected.append(sides[0] - sides[1])
    margins = score.pair_margins(CFG, PARAMS, tokenizer, pairs)
    np.testing.assert_allclose(margins, expected, rtol=1e-4, atol=1e-4)
