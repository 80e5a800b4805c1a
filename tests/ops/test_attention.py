import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import ops


def inputs(S, N, K, H=8, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, S, heads, H), dtype) for key, heads in zip(keys, (N, K, K), strict=True))
    segments = jnp.array([[1] * (S // 3) + [2] * (S - S // 3), [1] * (S - 2) + [0] * 2], jnp.int32)
    return q, k, v, segments


def value_and_gradients(impl, q, k, v, segments):
    """The output where there are tokens, and the gradients of a sum over them."""
    valid = (segments > 0)[..., None, None]

    def total(q, k, v):
        y = jnp.where(valid, ops.attention(q * q.shape[-1] ** -0.5, k, v, segments, impl=impl), 0)
        return (y.astype(jnp.float32) ** 2).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return y, *grads


@pytest.mark.parametrize(
    ("impl", "S", "N", "K", "H"),
    [
        ("xla", 7, 4, 4, 8),
        ("xla", 16, 4, 2, 8),
        ("xla", 33, 6, 1, 8),
        ("xla", 130, 8, 2, 8),
        ("splash", 128, 2, 2, 128),
        ("splash", 130, 4, 2, 128),
        ("splash", 200, 4, 1, 128),
        ("splash", 130, 4, 2, 64),
    ],
)
def test_equals_the_reference_in_value_and_gradient(impl, S, N, K, H):
    arguments = inputs(S, N, K, H)
    found, expected = (value_and_gradients(i, *arguments) for i in (impl, "reference"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("S", [64, 130])
def test_cudnn_equals_the_reference_in_value_and_gradient(S):
    arguments = inputs(S, 4, 2, 64, "bfloat16")
    found, expected = (value_and_gradients(i, *arguments) for i in ("cudnn", "reference"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.05, atol=0.05)


def test_an_unknown_impl_is_an_error():
    with pytest.raises(ValueError, match="flash"):
        ops.attention(*inputs(8, 2, 2), impl="flash")


@pytest.mark.parametrize(("impl", "H"), [("xla", 8), ("splash", 128)])
def test_nothing_leaks_from_later_tokens_or_other_segments(impl, H):
    q, k, v, segments = inputs(12, 4, 2, H)
    attention = jax.jit(lambda k, v: ops.attention(q, k, v, segments, impl=impl))
    out = attention(k, v)
    changed = attention(k.at[0, 4:].add(1.0), v.at[0, 4:].add(1.0))  # row 0: segment 2 begins at 4
    np.testing.assert_array_equal(out[0, :4], changed[0, :4])
    assert jnp.abs(out[0, 5:] - changed[0, 5:]).max() > 1e-3
    changed = attention(k.at[0, :4].add(1.0), v.at[0, :4].add(1.0))
    np.testing.assert_array_equal(out[0, 4:], changed[0, 4:])


def test_low_precision_inputs_keep_a_float32_softmax():
    q, k, v, segments = inputs(64, 4, 2)
    low = ops.attention(*(a.astype(jnp.bfloat16) for a in (q, k, v)), segments)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), ops.attention(q, k, v, segments), atol=0.05)


def test_splash_refuses_parts_that_its_blocks_do_not_divide():
    assert ops.splash_kernel("xla", np.arange(256), 256, 2, 2) is None
    with pytest.raises(ValueError, match="256 tokens over 2 devices; each needs a multiple of 256"):
        ops.splash_kernel("splash", np.arange(256), 256, 2, 2)
