import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import ops

SIZES = {"groups": (70, 0, 33, 1), "nothing": (0, 0, 0, 0), "one group": (0, 104, 0, 0), "all rows": (50, 50, 50, 50)}


@pytest.mark.parametrize("impl", ["ragged", "blocked", "megablox"])
@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize(("D", "F"), [(128, 256), (12, 20)])
def test_rows_past_the_last_group_are_zero_and_touch_nothing(impl, case, D, F):
    """In values and in gradients, whatever those rows hold, against a loop over groups."""
    sizes, rng = SIZES[case], np.random.default_rng(0)
    x, w, c = (rng.normal(size=s).astype(np.float32) for s in ((200, D), (4, D, F), (200, F)))
    x[sum(sizes) :] = np.nan

    def total(x, w):
        y = ops.grouped_matmul(x, w, jnp.array(sizes), impl=impl)
        return (y * c).sum(), y

    (_, y), (dx, dw) = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, w)
    expected_y, expected_dx, expected_dw = np.zeros_like(y), np.zeros_like(x), np.zeros_like(w)
    for e, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
        rows = slice(end - size, end)
        expected_y[rows], expected_dx[rows], expected_dw[e] = x[rows] @ w[e], c[rows] @ w[e].T, x[rows].T @ c[rows]
    for a, b in ((y, expected_y), (dx, expected_dx), (dw, expected_dw)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["ragged", "blocked", "megablox", "reference"])
def test_a_few_rows(impl):
    y = ops.grouped_matmul(jnp.ones((10, 3)), jnp.ones((4, 3, 5)), jnp.array([2, 0, 3, 1]), impl=impl)
    np.testing.assert_array_equal(y, np.repeat([3.0, 0.0], [6, 4])[:, None] * np.ones(5))


def test_an_unknown_impl_is_an_error():
    with pytest.raises(ValueError, match="dense"):
        ops.grouped_matmul(jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([2, 2]), impl="dense")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU: TANUKI_TEST_PLATFORM=cuda")
@pytest.mark.parametrize("case", [*SIZES, "uneven"])
@pytest.mark.parametrize(("D", "F"), [(128, 256), (384, 128), (256, 768)])
@pytest.mark.parametrize("full", [False, True])
def test_the_kernels_for_hopper_equal_a_loop_over_groups(case, D, F, full):
    sizes, R = ((500, 1, 0, 322), 823) if case == "uneven" else (SIZES[case], sum(SIZES[case]) if full else 200)
    if R == 0:
        pytest.skip("no rows at all")
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, c = (jax.random.normal(k, s, "bfloat16") for k, s in zip(keys, ((R, D), (4, D, F), (R, F)), strict=True))
    found = value_and_gradients(lambda x, w: ops.grouped_matmul(x, w, jnp.array(sizes), impl="mosaic", full=full), x, w, c)
    expected = value_and_gradients(
        lambda x, w: ops.grouped_matmul(x, w, jnp.array(sizes), impl="reference"), *(a.astype("float32") for a in (x, w, c))
    )
    for a, b in zip(found, expected, strict=True):
        assert jnp.linalg.norm(a.astype("float32") - b) <= 1e-2 * jnp.linalg.norm(b)


def value_and_gradients(product, x, w, c):
    def total(x, w):
        y = product(x, w)
        return (y.astype("float32") * c).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, w)
    return y, *gradients
