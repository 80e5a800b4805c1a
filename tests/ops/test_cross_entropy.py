import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import ops


@pytest.mark.parametrize("S", [6, 16, 18, 23])
def test_chunks_equal_whole_logits_in_value_and_gradient(S):
    key = jax.random.key(0)
    x, head = jax.random.normal(key, (3, S, 16)), jax.random.normal(key, (16, 50))
    targets = jax.random.randint(key, (3, S), 0, 50)

    def total(impl):
        def f(x, head):
            scores = ops.token_logprobs(x, head, targets, impl=impl, chunk=8, entropy=True)
            return (scores.logprob * 2 + 0.1 * scores.log_z**2).sum(), scores

        return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, head)

    (value, scores), grads = total("xla")
    (expected, reference), expected_grads = total("reference")
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip((*scores, *grads), (*reference, *expected_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("S", [16, 18, 27])
def test_logits_of_a_whole_row_never_exist(S):
    x, head, targets = jnp.ones((3, S, 16)), jnp.ones((16, 50)), jnp.ones((3, S), jnp.int32)
    program = str(jax.make_jaxpr(jax.grad(lambda x: ops.token_logprobs(x, head, targets, chunk=10).logprob.sum()))(x))
    chunk = max(d for d in range(1, 11) if S % d == 0)
    assert f"[{3 * chunk},50]" in program  # as one matrix of 3 * chunk tokens
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([0-9,]+)\]", program)]
    assert max(sizes) == 3 * chunk * 50


def test_against_numpy():
    rng = np.random.default_rng(0)
    x, head, targets = rng.normal(size=(2, 5, 4)), rng.normal(size=(4, 7)), rng.integers(0, 7, (2, 5))
    logits = x @ head
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    scores = ops.token_logprobs(jnp.float32(x), jnp.float32(head), jnp.int32(targets))
    expected = np.log(np.take_along_axis(probabilities, targets[..., None], -1)[..., 0])
    np.testing.assert_allclose(scores.logprob, expected, rtol=1e-5)
    np.testing.assert_array_equal(scores.correct, probabilities.argmax(-1) == targets)


def test_the_masked_sum_of_tpus_equals_the_gather(monkeypatch):
    from tanuki_jax.ops import cross_entropy

    keys = jax.random.split(jax.random.key(0), 3)
    x, head = jax.random.normal(keys[0], (2, 6, 8)), jax.random.normal(keys[1], (8, 30))
    targets = jax.random.randint(keys[2], (2, 6), 0, 30)
    gathered = ops.token_logprobs(x, head, targets, entropy=True)
    monkeypatch.setattr(cross_entropy, "on_tpu", lambda: True)
    for a, b in zip(gathered, ops.token_logprobs(x, head, targets, entropy=True), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
