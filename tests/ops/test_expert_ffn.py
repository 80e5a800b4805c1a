import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import ops

CASES = {
    "even": lambda rng, T, k, E: np.stack([rng.permutation(E)[:k] for _ in range(T)]),
    "one expert takes all": lambda rng, T, k, E: np.stack([[0, *(1 + rng.permutation(E - 1)[: k - 1])] for _ in range(T)]),
    "empty experts": lambda rng, T, k, E: np.stack([rng.permutation(k + 1)[:k] for _ in range(T)]),
}


def problem(case, T, k, E, D=12, F=20):
    rng = np.random.default_rng(0)
    experts = jnp.int32(CASES[case](rng, T, k, E))
    weights = jax.nn.softmax(jnp.float32(rng.normal(size=(T, k))))
    x, gate, up, down = (jnp.float32(rng.normal(size=s)) for s in ((T, D), (E, D, F), (E, D, F), (E, F, D)))
    return x, weights, experts, gate, up, down


@pytest.mark.parametrize("impl", ["padded", "ragged"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("T", "k", "E"), [(300, 2, 8), (5, 1, 4)])
def test_equals_computing_every_expert(impl, case, T, k, E):
    x, weights, experts, *matrices = problem(case, T, k, E)

    def total(impl):
        def f(x, weights, *matrices):
            y = ops.expert_ffn(x, weights, experts, *matrices, impl=impl)
            return (y * jnp.arange(y.size).reshape(y.shape) / y.size).sum(), y

        return jax.jit(jax.value_and_grad(f, (0, 1, 2, 3, 4), has_aux=True))(x, weights, *matrices)

    (_, y), grads = total(impl)
    (_, expected), expected_grads = total("reference")
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_against_a_loop_over_tokens():
    x, weights, experts, gate, up, down = problem("even", 9, 2, 4)
    expected = np.zeros(x.shape)
    for t in range(9):
        for w, e in zip(weights[t], experts[t], strict=True):
            a = np.asarray(x[t] @ gate[e], np.float64)
            expected[t] += w * ((a / (1 + np.exp(-a)) * (x[t] @ up[e])) @ down[e])
    np.testing.assert_allclose(ops.expert_ffn(x, weights, experts, gate, up, down), expected, rtol=1e-4, atol=1e-4)


def test_grouped_matmul_gives_zero_past_the_last_group():
    x, w = jnp.ones((10, 3)), jnp.ones((4, 3, 5))
    sizes = jnp.array([2, 0, 3, 1])
    for impl in ("ragged", "reference"):
        y = ops.grouped_matmul(x, w, sizes, impl=impl)
        np.testing.assert_array_equal(y[:6], 3.0)
        np.testing.assert_array_equal(y[6:], 0.0)
