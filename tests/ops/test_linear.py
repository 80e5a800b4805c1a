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
