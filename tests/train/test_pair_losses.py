"""The losses of one pair against the values of their published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import config
from tanuki_jax.train import pair_losses

# Three pairs: log-probabilities of policy and reference, and what the published formulas give for them.
CHOSEN, REJECTED = np.array([-42, -30.5, -61.25]), np.array([-45.5, -29, -80])
REF_CHOSEN, REF_REJECTED = np.array([-44, -31, -60]), np.array([-44.5, -30.5, -74])
LENGTHS = np.array([[20, 24], [16, 15], [40, 50]], np.float32)
RATIOS = np.stack([CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED], -1).astype(np.float32)
GOLDEN = {
    ("sigmoid", 0.1): 0.594114,
    ("sigmoid", 0.01): 0.682033,
    ("cdpo", 0.1): 0.616614,
    ("robust", 0.1): 0.565989,
    ("hinge", 0.1): 0.775,
    ("ipo", 0.1): 24.472002,
    ("sigmoid_norm", 0.1): 0.690466,
    ("apo_zero", 0.1): 0.945224,
    ("apo_down", 0.1): 0.955031,
    ("nca_pair", 0.1): 1.341739,
    ("bco_pair", 0.1): 1.292346,
    ("sppo_hard", 0.1): 42.520833,
}


def of_golden_pairs(weights, beta, smoothing=0.1):
    policy = np.stack([CHOSEN, REJECTED], -1).astype(np.float32)
    arrays = (jnp.asarray(a)[None] for a in (RATIOS, policy, LENGTHS))
    return pair_losses.pair_loss(config.Loss(preference=weights, beta=beta, label_smoothing=smoothing), *arrays)[0]


@pytest.mark.parametrize(("name", "beta"), GOLDEN)
def test_golden_vector(name, beta):
    np.testing.assert_allclose(of_golden_pairs({name: 1.0}, beta).mean(), GOLDEN[name, beta], atol=1e-6, rtol=2e-7)


def test_every_loss_has_its_golden_value_and_its_name_in_the_schema():
    assert {name for name, _ in GOLDEN} == set(pair_losses.PREFERENCE_LOSSES)
    assert {*pair_losses.PREFERENCE_LOSSES, pair_losses.SFT} == set(config.PREFERENCES)


def test_losses_are_summed_by_their_weights_and_sft_is_the_mean_of_the_chosen_tokens():
    found = of_golden_pairs({"sigmoid": 0.5, "ipo": 2.0, "sft": 3.0}, 0.1)
    parts = 0.5 * of_golden_pairs({"sigmoid": 1.0}, 0.1) + 2 * of_golden_pairs({"ipo": 1.0}, 0.1)
    np.testing.assert_allclose(found, parts - 3 * CHOSEN / LENGTHS[:, 0], rtol=1e-6)


def test_cdpo_without_smoothing_is_the_dpo_loss():
    np.testing.assert_array_equal(of_golden_pairs({"cdpo": 1.0}, 0.1, 0.0), of_golden_pairs({"sigmoid": 1.0}, 0.1))


@pytest.mark.parametrize("name", pair_losses.PREFERENCE_LOSSES)
def test_no_pair_gives_a_finite_loss_and_gradient(name):
    """Empty places of a packed row are zeros in every input, and are masked out afterwards."""
    nothing = jnp.zeros((1, 1, 2))
    options = config.Loss(preference={name: 1.0}, beta=0.1, label_smoothing=0.1)
    value = lambda x: pair_losses.pair_loss(options, x, x, nothing).sum()  # noqa: E731
    assert jnp.isfinite(value(nothing)) and jnp.isfinite(jax.grad(value)(nothing)).all()
