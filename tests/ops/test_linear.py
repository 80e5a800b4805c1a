import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import ops


@pytest.mark.parametrize(
    ("x", "w", "axes", "letters"),
    [
        ((5, 3), (3, 7), 1, "TD,DF->TF"),
        ((2, 5, 3), (3, 4, 7), 1, "BSD,DNH->BSNH"),
        ((2, 5, 4, 7), (4, 7, 3), 2, "BSNH,NHD->BSD"),
        ((2, 1, 3), (3, 1), 1, "BSD,DE->BSE"),
    ],
)
def test_equals_einsum_in_value_and_gradients(x, w, axes, letters):
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], x), jax.random.normal(keys[1], w)
    y, back = jax.vjp(lambda x, w: ops.linear(x, w, axes), x, w)
    expected, expected_back = jax.vjp(lambda x, w: jnp.einsum(letters, x, w), x, w)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    gradient = jax.random.normal(keys[2], y.shape)
    for a, b in zip(back(gradient), expected_back(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_keeps_the_dtype_of_the_activations():
    x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
    y, back = jax.vjp(ops.linear, x, w)
    assert {a.dtype for a in (y, *back(y))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_table_adds_up_however_often_a_row_is_used(dtype):
    index = jnp.array([[2] * 4000 + [0]], jnp.int32)  # in bfloat16 256 + 1 = 256
    rows, back = jax.vjp(lambda w: ops.embedding_lookup(w.astype(dtype), index), jnp.arange(8, dtype=jnp.float32).reshape(4, 2))
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows[0, -2:], [[4, 5], [0, 1]])
    [gradient] = back(jnp.ones_like(rows))
    np.testing.assert_allclose(gradient, [[1, 1], [0, 0], [4000, 4000], [0, 0]], rtol=4e-3)
