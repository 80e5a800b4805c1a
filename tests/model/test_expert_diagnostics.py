import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import config, model, upcycle
from tests.tiny import random_params, small

DENSE = small(n_layers=3, d_model=13, d_ff=21)
PARAMS = random_params(DENSE)
similarity = jax.jit(model.expert_similarity)


def drawn(E, seed=0, dtype=jnp.float32):
    """Experts whose matrices differ much in size, so that a mean over matrices would show."""
    rng = np.random.default_rng(seed)
    shapes = {"gate": (3, E, 13, 21), "up": (3, E, 13, 21), "down": (3, E, 21, 13)}
    sizes = {"gate": 1.0, "up": 0.1, "down": 5.0}
    return {name: jnp.asarray(rng.normal(0.3, 1, shape) * sizes[name], dtype) for name, shape in shapes.items()}


def mean_cosine(moe):
    """One pair of experts after the other."""
    arrays = {name: np.asarray(w.astype(jnp.float32), np.float64) for name, w in moe.items()}
    L, E = arrays["gate"].shape[:2]
    found = []
    for layer in range(L):
        experts = [np.concatenate([arrays[n][layer, e].ravel() for n in model.FFN_MATRICES]) for e in range(E)]
        pairs = [(a, b) for a in range(E) for b in range(a)]
        cosines = [experts[a] @ experts[b] / np.linalg.norm(experts[a]) / np.linalg.norm(experts[b]) for a, b in pairs]
        found.append(np.mean(cosines))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("E", [2, 5])
def test_similarity_is_the_mean_cosine_of_all_pairs(E, dtype):
    moe = drawn(E, dtype=dtype)
    found = similarity(moe)
    assert found.shape == (3,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, mean_cosine(moe), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_similarity_does_not_know_how_large_the_weights_are(scale):
    moe = drawn(4)
    scaled = {name: w * scale for name, w in moe.items()}
    np.testing.assert_allclose(similarity(scaled), similarity(moe), rtol=1e-5)


def test_opposite_experts_have_minus_one():
    one = drawn(1)
    moe = {name: jnp.concatenate([w, -w], axis=1) for name, w in one.items()}
    np.testing.assert_allclose(similarity(moe), -1, rtol=1e-6)


def test_copies_have_one_independent_experts_about_none_and_noise_lies_between():
    cfg = upcycle.moe_config(DENSE, n_experts=4)

    def made(strategy, **options):
        return upcycle.upcycle(PARAMS, cfg, config.Upcycle(strategy, **options), jax.random.key(0))["layers"]["moe"]

    np.testing.assert_allclose(similarity(made("copy")), 1, rtol=1e-6)
    size = 3 * 13 * 21
    independent = random_params(small(n_layers=3, d_model=13, d_ff=21, n_experts=4))["layers"]["moe"]
    assert (np.abs(similarity(independent)) < 5 / np.sqrt(size * 6)).all()
    # cosine of w + a and w + b with independent a, b of deviation s: |w|^2 / (|w|^2 + n s^2)
    std = 0.1
    for layer, found in enumerate(similarity(made("noise", noise_std=std))):
        square = sum(float((PARAMS["layers"]["mlp"][n][layer] ** 2).sum()) for n in model.FFN_MATRICES)
        assert float(found) == pytest.approx(square / (square + size * std**2), abs=0.08)


def test_the_norm_of_the_routers_against_numpy_and_only_mixtures_have_one():
    cfg = small(n_layers=4, n_experts=4, first_dense=1)
    params = random_params(cfg)
    params["layers"]["moe"]["router"] = jax.random.normal(jax.random.key(1), (3, 32, 4)) * jnp.array([1, 3, 9])[:, None, None]
    found = jax.jit(model.expert_diagnostics)(params)
    assert set(found) == {"moe/similarity", "moe/router_norm"}
    norms = [np.sqrt(sum(float(x) ** 2 for x in np.asarray(layer).ravel())) for layer in params["layers"]["moe"]["router"]]
    np.testing.assert_allclose(found["moe/router_norm"], norms, rtol=1e-5)
    np.testing.assert_allclose(
        found["moe/similarity"], mean_cosine({n: params["layers"]["moe"][n] for n in model.FFN_MATRICES}), atol=1e-6
    )


def test_a_single_expert_is_like_no_other():
    np.testing.assert_allclose(similarity(drawn(1)), 0, atol=1e-6)
