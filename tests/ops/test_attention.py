import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import ops


def inputs(S, N, K, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k, v = (jax.random.normal(key, (2, S, heads, 8)) for key, heads in zip(keys, (N, K, K), strict=True))
    segments = jnp.array([[1] * (S // 3) + [2] * (S - S // 3), [1] * (S - 2) + [0] * 2], jnp.int32)
    return q, k, v, segments


@pytest.mark.parametrize(("S", "N", "K"), [(7, 4, 4), (16, 4, 2), (33, 6, 1), (130, 8, 2)])
def test_xla_equals_reference_in_value_and_gradient(S, N, K):
    q, k, v, segments = inputs(S, N, K)

    def total(impl):
        return lambda q, k, v: (ops.attention(q, k, v, segments, impl=impl) ** 2).sum()

    np.testing.assert_allclose(
        ops.attention(q, k, v, segments), ops.attention(q, k, v, segments, impl="reference"), rtol=1e-5, atol=1e-5
    )
    for a, b in zip(
        jax.jit(jax.grad(total("xla"), (0, 1, 2)))(q, k, v),
        jax.jit(jax.grad(total("reference"), (0, 1, 2)))(q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_nothing_leaks_from_later_tokens_or_other_segments():
    q, k, v, segments = inputs(12, 4, 2)
    out = ops.attention(q, k, v, segments)
    changed = ops.attention(q, k.at[0, 4:].add(1.0), v.at[0, 4:].add(1.0), segments)  # row 0: segment 2 begins at 4
    np.testing.assert_array_equal(out[0, :4], changed[0, :4])
    assert jnp.abs(out[0, 5:] - changed[0, 5:]).max() > 1e-3
    changed = ops.attention(q, k.at[0, :4].add(1.0), v.at[0, :4].add(1.0), segments)
    np.testing.assert_array_equal(out[0, 4:], changed[0, 4:])


def test_low_precision_inputs_keep_a_float32_softmax():
    q, k, v, segments = inputs(64, 4, 2)
    low = ops.attention(*(a.astype(jnp.bfloat16) for a in (q, k, v)), segments)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), ops.attention(q, k, v, segments), atol=0.05)
