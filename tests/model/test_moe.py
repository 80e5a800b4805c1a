import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax.model.moe import route, router_stats


def numpy_gate(logits, top_k, normalized):
    """Tanuki's and Mixtral's gates, one token at a time."""
    weights, experts = np.zeros((*logits.shape[:-1], top_k)), np.zeros((*logits.shape[:-1], top_k), int)
    for index in np.ndindex(logits.shape[:-1]):
        z = logits[index].astype(np.float64)
        if normalized:
            z = (z - z.mean()) / (z.std(ddof=1) + 1e-5)
        chosen = sorted(range(len(z)), key=lambda e: -z[e])[:top_k]
        top = np.exp(z[chosen] - z[chosen].max())
        weights[index], experts[index] = top / top.sum(), chosen
    return weights, experts


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_gate_against_a_numpy_loop(top_k, normalized):
    logits = np.random.default_rng(0).normal(size=(2, 9, 8)) * 3 + 5
    weights, experts, probs = route(jnp.float32(logits), top_k, normalized)
    expected_weights, expected_experts = numpy_gate(np.float32(logits), top_k, normalized)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
    np.testing.assert_array_equal(experts, expected_experts)
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)


def test_the_normalised_gate_ignores_scale_and_is_bounded():
    logits = jnp.float32(np.random.default_rng(0).normal(size=(1, 50, 8)))
    a, b = route(logits, 2, True)[0], route(logits * 40 + 7, 2, True)[0]
    np.testing.assert_allclose(a, b, atol=1e-3)
    assert a.max() <= 1 / (1 + np.exp(-8 / np.sqrt(8))) + 1e-6  # reached by a single non-zero logit


def test_equal_logits_have_a_finite_gradient():
    gradient = jax.grad(lambda x: route(x, 2, True)[0][..., 0].sum())(jnp.zeros((1, 3, 8)))
    assert jnp.isfinite(gradient).all()


def test_statistics_against_numpy():
    rng = np.random.default_rng(0)
    B, S, E, k = 3, 10, 4, 2
    logits = rng.normal(size=(B, S, E))
    valid = rng.random((B, S)) < 0.7
    valid[2] = False
    gate = _, experts, probs = route(jnp.float32(logits), k, False)
    kept = rng.random((B, S, k)) < 0.8
    stats = router_stats(jnp.float32(logits), *gate, jnp.asarray(kept), jnp.asarray(valid))
    load = np.zeros(E)
    for b in range(B):
        tokens = np.flatnonzero(valid[b])
        counts = np.zeros(E)
        for t in tokens:
            for e in np.asarray(experts[b, t]):
                counts[e] += 1
        load += counts
        n = max(len(tokens), 1)
        expected = E * sum((counts[e] / (n * k)) * np.asarray(probs)[b, tokens, e].sum() / n for e in range(E))
        np.testing.assert_allclose(stats.aux_B[b], expected, rtol=1e-5)
        z = np.log(np.exp(logits[b, tokens]).sum(-1)) ** 2
        np.testing.assert_allclose(stats.z_B[b], z.sum() / n, rtol=1e-5)
    np.testing.assert_allclose(stats.load_E, load)
    assert stats.dropped == (~kept & valid[..., None]).sum()


def test_perfect_balance_costs_one():
    experts = jnp.array([[[0, 1], [2, 3], [1, 2], [3, 0]]])
    kept = jnp.ones(experts.shape, bool)
    stats = router_stats(
        jnp.zeros((1, 4, 4)), jnp.full((1, 4, 2), 0.5), experts, jnp.full((1, 4, 4), 0.25), kept, jnp.ones((1, 4))
    )
    np.testing.assert_allclose(stats.aux_B, 1.0, rtol=1e-6)
    assert stats.dropped == 0
