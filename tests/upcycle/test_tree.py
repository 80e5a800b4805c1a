import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, model, parallel, upcycle
from tanuki_jax.errors import UserError
from tests.tiny import apply, init, packed_batch, small

DENSE, E = small(), 4
BATCH = {name: jnp.asarray(value) for name, value in packed_batch(np.random.default_rng(0), DENSE, rows=2).items()}
PARAMS = init(DENSE, jax.random.key(0))
FFN = ("gate", "up", "down")


def mixture(top_k=2, normalized=True, n_experts=E):
    return upcycle.mixture_of(DENSE, n_experts=n_experts, top_k=top_k, normalized_gate=normalized)


def upcycled(strategy="copy", seed=0, cfg=None, **options):
    return upcycle.upcycle(PARAMS, cfg or mixture(), config.Upcycle(strategy, **options), jax.random.key(seed))


def logits(cfg, params):
    return apply(cfg, params, BATCH).hidden @ params["head"]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("top_k", range(1, E + 1))
def test_a_copy_computes_what_the_dense_model_does_whatever_its_router_says(top_k, normalized):
    expected, cfg = logits(DENSE, PARAMS), mixture(top_k, normalized)
    for seed, router_std in enumerate((0.0, 0.02, 1.0, 30.0)):
        found = logits(cfg, upcycled("copy", seed, cfg, router_std=router_std))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_noise_changes_what_is_computed():
    cfg = mixture()
    assert jnp.abs(logits(cfg, upcycled("noise", noise_std=0.05)) - logits(DENSE, PARAMS)).max() > 1e-2


@pytest.mark.parametrize("std", [1e-3, 0.3])
def test_noise_has_the_absolute_deviation_asked_for_and_is_drawn_for_each_expert(std):
    made = upcycled("noise", noise_std=std)["layers"]["moe"]
    noise = {name: np.asarray(made[name] - PARAMS["layers"]["mlp"][name][:, None]) for name in FFN}
    for name in FFN:
        assert noise[name].std() == pytest.approx(std, rel=0.03)
        assert abs(noise[name].mean()) < 5 * std / math.sqrt(noise[name].size)
    flat = np.concatenate([noise[name].reshape(DENSE.n_layers * E, -1) for name in FFN])  # each expert of each layer
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.15


def test_the_router_has_its_own_deviation_and_no_noise():
    copied, noisy = (upcycled(s, router_std=0.5, noise_std=9.0)["layers"]["moe"]["router"] for s in ("copy", "noise"))
    np.testing.assert_array_equal(copied, noisy)
    assert copied.std() == pytest.approx(0.5, rel=0.15)


def test_what_is_not_the_ffn_is_passed_on_untouched():
    made = upcycled("noise")
    assert all(made[name] is PARAMS[name] for name in ("norm_final", "head"))
    assert made["embed"]["table"] is PARAMS["embed"]["table"]
    assert all(made["layers"][name] is PARAMS["layers"][name] for name in ("norm_attn", "norm_mlp"))
    assert all(made["layers"]["attn"][name] is PARAMS["layers"]["attn"][name] for name in "qkvo")
    assert "mlp" not in made["layers"] and "mlp" in PARAMS["layers"]  # and the argument is as it was


def test_the_key_is_the_only_randomness():
    same, again, other = (jax.tree.leaves(upcycled("noise", seed)["layers"]["moe"]) for seed in (3, 3, 4))
    assert all((a == b).all() for a, b in zip(same, again, strict=True))
    assert all((a != b).any() for a, b in zip(same, other, strict=True))


def upcycled_on(data, fsdp):
    """As a stage does it: compiled, from parameters that are split over the mesh to such parameters."""
    cfg, mesh = mixture(), parallel.make_mesh(config.Mesh(data, fsdp), jax.devices()[: data * fsdp])
    convert = jax.jit(
        lambda p, k: upcycle.upcycle(p, cfg, config.Upcycle("noise"), k),
        out_shardings=checkpoint.parameter_shardings(cfg, mesh),
    )
    return convert(jax.device_put(PARAMS, checkpoint.parameter_shardings(DENSE, mesh)), jax.random.key(0))


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)])
def test_a_mesh_changes_no_bit(shape):
    split, whole = upcycled_on(*shape), upcycled_on(1, 1)
    assert len(split["layers"]["moe"]["gate"].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, split, whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_8b_becomes_the_8x8b(dtype):
    dense = config.Model(param_dtype=dtype)
    cfg = upcycle.mixture_of(dense, n_experts=8)
    made = jax.eval_shape(lambda p: upcycle.upcycle(p, cfg, config.Upcycle(), jax.random.key(0)), model.parameter_shapes(dense))
    assert jax.tree.map(lambda s: (s.shape, s.dtype), made) == jax.tree.map(
        lambda s: (s.shape, s.dtype), model.parameter_shapes(cfg)
    )
    assert sum(math.prod(s.shape) for s in jax.tree.leaves(made)) == 46_973_325_312


def test_a_mixture_cannot_be_upcycled_again():
    with pytest.raises(UserError, match="mixture already"):
        upcycle.mixture_of(mixture(), n_experts=8)
    with pytest.raises(UserError, match="mixture already"):
        upcycle.upcycle(upcycled(), mixture(), config.Upcycle(), jax.random.key(0))


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 5), (4, 0), (0, 1)])
def test_top_k_lies_between_one_and_the_experts(n_experts, top_k):
    with pytest.raises(UserError, match=f"top_k {top_k} must lie between 1 and n_experts {n_experts}"):
        upcycle.mixture_of(DENSE, n_experts=n_experts, top_k=top_k)
