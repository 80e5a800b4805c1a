import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import config
from tanuki_jax.train import losses
from tanuki_jax.train.preference import pair_scores
from tests.tiny import QUICK, apply, as_arrays, of_batch, packed_batch, pair_batch, random_params, small

CFG = small(n_experts=4, **QUICK)
PARAMS = random_params(CFG)
PLAIN = config.Loss(router_aux_loss=0.0)
PREFERENCE = jax.jit(of_batch(losses.preference(CFG, config.Loss(beta=0.3, router_aux_loss=0.0))))


def numpy_logprobs(batch):
    hidden = np.asarray(apply(CFG, PARAMS, as_arrays(batch)).hidden, np.float64)
    logits = hidden @ np.asarray(PARAMS["head"], np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    return np.take_along_axis(logits, np.asarray(batch["targets"])[..., None], -1)[..., 0] - log_z, log_z


def test_next_token_loss_against_numpy():
    batch = packed_batch(np.random.default_rng(0), CFG)
    total, weight, metrics = jax.jit(of_batch(losses.next_token(CFG, config.Loss(z_loss=1e-2, router_aux_loss=0.0))))(
        PARAMS, as_arrays(batch)
    )
    logprobs, log_z = numpy_logprobs(batch)
    w = batch["loss_weights"]
    np.testing.assert_allclose(total, (w * (-logprobs + 1e-2 * log_z**2)).sum(), rtol=1e-5)
    assert weight == w.sum()
    np.testing.assert_allclose(metrics["loss"][0], -(w * logprobs).sum(), rtol=1e-5)


def test_padding_and_unlabelled_tokens_cost_nothing():
    batch = packed_batch(np.random.default_rng(0), CFG, rows=4)
    padded = {name: np.concatenate([value, np.zeros_like(value)]) for name, value in batch.items()}
    loss = jax.jit(of_batch(losses.next_token(CFG, config.Loss(router_z_loss=1e-3))))
    for a, b in zip(loss(PARAMS, as_arrays(batch))[:2], loss(PARAMS, as_arrays(padded))[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("kind", ["pretrain", "dpo"])
@pytest.mark.parametrize("experts", [0, 4])
def test_gradient_against_finite_differences(kind, experts):
    cfg, rng = small(n_experts=experts, **QUICK), np.random.default_rng(0)
    params = random_params(cfg)
    batch = as_arrays((pair_batch if kind == "dpo" else packed_batch)(rng, cfg, rows=2))
    loss = of_batch(losses.make_loss(kind, cfg, config.Loss(z_loss=1e-3, beta=0.1)))

    def value(p):
        total, weight, _ = loss(p, batch)
        return total / weight

    def moves(path):  # in a mixture only what no router sees: a changed choice of experts is a jump
        return not experts or path[-1].key in ("head", "norm_final")

    direction = jax.tree_util.tree_map_with_path(lambda path, p: jnp.float32(rng.normal(size=p.shape)) * moves(path), params)
    step, value_and_grad = 3e-4, jax.jit(jax.value_and_grad(value))
    ahead, behind = (value_and_grad(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction))[0] for s in (step, -step))
    gradient = value_and_grad(params)[1]
    slope = sum((g * d).sum() for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=2e-2)


# --- preference -----------------------------------------------------------------------------------------------------


def test_preference_loss_against_numpy():
    batch = pair_batch(np.random.default_rng(0), CFG)
    total, weight, metrics = PREFERENCE(PARAMS, as_arrays(batch))
    logprobs, _ = numpy_logprobs(batch)
    margins = []
    for r in range(len(logprobs)):
        for pair, reference in zip(batch["pair_segments"][r], batch["ref_logprobs"][r], strict=True):
            if pair[0]:
                sums = [(logprobs[r] * batch["loss_weights"][r])[batch["segment_ids"][r] == s].sum() for s in pair]
                margins.append(0.3 * ((sums[0] - reference[0]) - (sums[1] - reference[1])))
    margins = np.array(margins)
    assert weight == len(margins)
    np.testing.assert_allclose(total, np.log1p(np.exp(-margins)).sum(), rtol=1e-4)
    np.testing.assert_allclose(metrics["rewards/margins"][0] / weight, margins.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["rewards/accuracies"][0] / weight, (margins > 0).mean())


def with_own_reference(batch):
    logprobs = jax.jit(lambda p, b: pair_scores(CFG, p, b)[0].logprobs)(PARAMS, as_arrays(batch))
    return {**batch, "ref_logprobs": np.asarray(logprobs)}


def test_policy_equal_to_reference_gives_ln_2_and_no_reward():
    batch = with_own_reference(pair_batch(np.random.default_rng(0), CFG))
    total, weight, metrics = PREFERENCE(PARAMS, as_arrays(batch))
    np.testing.assert_allclose(total / weight, np.log(2), rtol=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        np.testing.assert_allclose(metrics[name][0], 0, atol=1e-5)


def test_swapping_chosen_and_rejected_flips_the_margin():
    batch = pair_batch(np.random.default_rng(0), CFG)
    swapped = {**batch, **{n: batch[n][..., ::-1].copy() for n in ("pair_segments", "ref_logprobs")}}
    a, b = (PREFERENCE(PARAMS, as_arrays(x))[2]["rewards/margins"][0] for x in (batch, swapped))
    np.testing.assert_allclose(a, -b, rtol=1e-5)


def test_prompt_tokens_get_no_gradient_of_their_own():
    """Only labelled positions' logits matter: the gradient at the hidden states of the others is zero."""
    batch = as_arrays(pair_batch(np.random.default_rng(0), CFG))
    hidden = apply(CFG, PARAMS, batch).hidden

    def loss(x):
        from tanuki_jax import ops

        scores = ops.token_logprobs(x, PARAMS["head"], batch["targets"])
        return (scores.logprob * batch["loss_weights"]).sum()

    gradient = jnp.abs(jax.jit(jax.grad(loss))(hidden)).max(axis=-1)
    assert (gradient[batch["loss_weights"] == 0] == 0).all()
    assert (gradient[batch["loss_weights"] == 1] > 0).all()


def test_router_losses_weigh_rows_by_their_labelled_tokens():
    batch = as_arrays(packed_batch(np.random.default_rng(0), CFG))
    outputs = apply(CFG, PARAMS, batch)
    plain, weight, _ = jax.jit(of_batch(losses.next_token(CFG, PLAIN)))(PARAMS, batch)
    with_router = of_batch(losses.next_token(CFG, config.Loss(router_aux_loss=0.02, router_z_loss=0.001)))
    full, _, metrics = jax.jit(with_router)(PARAMS, batch)
    rows = np.asarray(batch["loss_weights"]).sum(1)
    aux = sum((np.asarray(layer) * rows).sum() for layer in outputs.router.aux_B)
    z = sum((np.asarray(layer) * rows).sum() for layer in outputs.router.z_B)
    np.testing.assert_allclose(full - plain, 0.02 * aux + 0.001 * z, rtol=1e-3)
    assert metrics["moe/load"][0].shape == (2, 4)
