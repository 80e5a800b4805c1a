import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import ops
from tanuki_jax.ops import mosaic_gpu

SIZES = {"groups": (70, 0, 33, 1), "nothing": (0, 0, 0, 0), "one group": (0, 104, 0, 0), "all rows": (50, 50, 50, 50)}


@functools.cache
def compiled(impl):
    """The product and the gradients of a weighted sum of it, for groups of any sizes."""

    def total(x, w, c, sizes):
        y = ops.grouped_matmul(x, w, sizes, impl=impl)
        return (y * c).sum(), y

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


@pytest.mark.parametrize("impl", ["ragged", "blocked", "megablox"])
@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize(("D", "F"), [(128, 256), (12, 20)])
def test_rows_past_the_last_group_are_zero_and_touch_nothing(impl, case, D, F):
    """In values and in gradients, whatever those rows hold, against a loop over groups."""
    sizes, rng = SIZES[case], np.random.default_rng(0)
    x, w, c = (rng.normal(size=s).astype(np.float32) for s in ((200, D), (4, D, F), (200, F)))
    x[sum(sizes) :] = np.nan
    (_, y), (dx, dw) = compiled(impl)(x, w, c, jnp.array(sizes))
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


ROWS = mosaic_gpu.ROWS
TILES = {
    "groups": (4, 0, 2, 1),
    "nothing": (0, 0, 0, 0),
    "one group": (0, 7, 0, 0),
    "all rows": (2, 3, 1, 3),
    "many": (17, 1, 0, 9),
}


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU: TANUKI_TEST_PLATFORM=cuda")
@pytest.mark.parametrize(("D", "F", "case"), [(128, 256, case) for case in TILES] + [(384, 128, "many"), (256, 768, "groups")])
def test_the_kernels_for_hopper_equal_a_loop_over_groups(D, F, case):
    sizes = ROWS * np.array(TILES[case])
    R, ends = max(9 * ROWS, sum(sizes)), np.cumsum(sizes)
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, c = (jax.random.normal(k, s, "bfloat16") for k, s in zip(keys, ((R, D), (4, D, F), (R, F)), strict=True))
    y, back = jax.vjp(lambda x, w: ops.grouped_matmul(x, w, jnp.array(sizes), impl="mosaic"), x, w)
    dx, dw = back(c)
    x, w, c = (a.astype("float32") for a in (x, w, c))
    for e, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        rows = slice(end - size, end)
        expected = (x[rows] @ w[e], c[rows] @ w[e].T, x[rows].T @ c[rows])
        for a, b in zip((y[rows], dx[rows], dw[e]), expected, strict=True):
            assert jnp.linalg.norm(a.astype("float32") - b) <= 1e-2 * jnp.linalg.norm(b)
