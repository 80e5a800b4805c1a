import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import config, model, parallel
from tests.tiny import apply, as_arrays, init, packed_batch, random_params, small, with_options

MODELS = {"dense": small(), "mixture": small(n_experts=4)}


def test_parameter_counts_of_the_paper():
    dense, mixture = config.ModelConfig(), config.ModelConfig(n_experts=8)
    assert model.count_parameters(dense) == (7_512_264_704, 7_512_264_704)
    assert model.count_parameters(mixture) == (46_973_325_312, 13_150_457_856)


def test_the_tree_is_the_contract():
    cfg = small(n_experts=4)
    shapes = {
        "/".join(k.key for k in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.parameter_shapes(cfg))
    }
    L, D, N, K, H, F, E, V = 2, 32, 4, 2, 8, 48, 4, 96
    assert shapes == {
        "embed/table": (V, D),
        "layers/attn/q": (L, D, N, H),
        "layers/attn/k": (L, D, K, H),
        "layers/attn/v": (L, D, K, H),
        "layers/attn/o": (L, N, H, D),
        "layers/moe/router": (L, D, E),
        "layers/moe/gate": (L, E, D, F),
        "layers/moe/up": (L, E, D, F),
        "layers/moe/down": (L, E, F, D),
        "layers/norm_attn": (L, D),
        "layers/norm_mlp": (L, D),
        "norm_final": (D,),
        "head": (D, V),
    }
    axes = model.logical_axes(cfg)
    assert axes["layers"]["moe"]["down"] == ("L", "E", "F", "D")
    assert jax.tree.structure(jax.tree.map(lambda _: 0, axes, is_leaf=lambda a: isinstance(a, tuple))) == jax.tree.structure(
        jax.tree.map(lambda _: 0, model.parameter_shapes(cfg))
    )


def test_layers_start_different():
    params = init(small(), jax.random.key(0))
    assert jnp.abs(params["layers"]["attn"]["q"][0] - params["layers"]["attn"]["q"][1]).max() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_causal_and_blind_to_other_segments(name):
    cfg, params = MODELS[name], random_params(MODELS[name])
    batch = as_arrays(packed_batch(np.random.default_rng(0), cfg, rows=2))
    out = apply(cfg, params, batch).hidden
    for at in (0, 9, 17):
        changed = apply(cfg, params, {**batch, "tokens": batch["tokens"].at[:, at].add(1)}).hidden
        differs = jnp.abs(changed - out).max(axis=-1) > 1e-6
        for r in range(2):
            segment = batch["segment_ids"][r]
            may = (jnp.arange(segment.size) >= at) & (segment == segment[at])
            assert not (differs[r] & ~may).any()
            assert differs[r, at]


def test_packing_changes_nothing():
    """A segment's hidden states are those of the same text alone in a row."""
    cfg, params = MODELS["mixture"], random_params(MODELS["mixture"])
    batch = packed_batch(np.random.default_rng(1), cfg, rows=2)
    out = apply(cfg, params, as_arrays(batch)).hidden[0]
    for segment in (1, 2, 3):
        inside = batch["segment_ids"][0] == segment
        alone = {name: np.zeros_like(value) for name, value in batch.items()}
        for name in ("tokens", "segment_ids", "positions"):
            alone[name][0, : inside.sum()] = batch[name][0, inside]
        np.testing.assert_allclose(
            apply(cfg, params, as_arrays(alone)).hidden[0, : inside.sum()], out[inside], rtol=1e-4, atol=1e-5
        )


@functools.cache
def gradient(**options):
    """Of a model with a dense layer and a mixture."""
    cfg = small(n_experts=4, first_dense=1, expert_impl="padded")
    params, cfg = random_params(cfg), with_options(cfg, **options)
    batch = as_arrays(packed_batch(np.random.default_rng(0), cfg, rows=2))
    return jax.jit(jax.grad(lambda p: (model.apply(cfg, p, batch).hidden ** 2).sum()))(params)


@pytest.mark.parametrize("remat", config.CHOICES["remat"][1:])
def test_remat_changes_no_gradient(remat):
    for a, b in zip(jax.tree.leaves(gradient()), jax.tree.leaves(gradient(remat=remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("impl", [pytest.param("splash", marks=pytest.mark.slow), "reference"])
def test_the_model_computes_attention_as_configured(impl):
    cfg = small(head_dim=128)
    params = random_params(cfg)
    batch = as_arrays(packed_batch(np.random.default_rng(0), cfg, rows=2))
    valid = batch["segment_ids"] > 0
    found, expected = (apply(c, params, batch).hidden[valid] for c in (with_options(cfg, attention_impl=impl), cfg))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", [pytest.param("pallas", marks=pytest.mark.slow), "ragged", "reference"])
def test_the_model_computes_experts_as_configured(impl):
    params = random_params(MODELS["mixture"])
    batch = as_arrays(packed_batch(np.random.default_rng(0), MODELS["mixture"], rows=2))
    found, expected = (apply(c, params, batch).hidden for c in (small(n_experts=4, expert_impl=impl), MODELS["mixture"]))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_experts_with_little_capacity_drop_tokens_and_count_them():
    cfg = small(n_experts=4, capacity_factor=0.5)
    batch = as_arrays(packed_batch(np.random.default_rng(0), cfg, rows=2))
    stats = apply(cfg, random_params(cfg), batch).router
    total = (batch["segment_ids"] > 0).sum() * cfg.top_k
    np.testing.assert_array_equal(stats.load_E.sum(axis=1), total)
    assert stats.dropped.shape == (cfg.n_layers,) and (stats.dropped > total // 3).all() and (stats.dropped < total).all()


def test_bfloat16_compute_keeps_float32_parameters():
    cfg = small(dtype="bfloat16")
    params = random_params(cfg)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    batch = as_arrays(packed_batch(np.random.default_rng(0), cfg, rows=2))
    low, high = apply(cfg, params, batch).hidden, apply(small(), params, batch).hidden
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), high, atol=0.15)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_word_used_often_learns_as_much_in_bfloat16_as_all_words_of_its_vector_together(devices):
    """The gradients of a token's uses are summed in float32; a bfloat16 sum of equals stops growing at some 256 of them."""
    B, S = 8, 512
    cfg = small(vocab_size=B * S, n_layers=1, dtype="bfloat16", attention_impl="reference")
    params = random_params(cfg)
    params["embed"]["table"] = jnp.broadcast_to(params["embed"]["table"][0], (B * S, cfg.d_model))
    wanted_D = 1.0 + jax.random.uniform(jax.random.key(1), (cfg.d_model,))  # each use pulls about the same way
    positions = jnp.tile(jnp.arange(S), (B, 1))

    @jax.jit
    def gradient(params, tokens):
        batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}

        def pull(params):
            return (model.apply(cfg, params, batch).hidden.astype(jnp.float32) * wanted_D).sum()

        return jax.grad(pull)(params)["embed"]["table"]

    with jax.set_mesh(parallel.make_mesh(config.Mesh(fsdp=devices), jax.devices()[:devices])):
        apart_VD = gradient(params, jnp.arange(B * S, dtype=jnp.int32).reshape(B, S))
        together_VD = gradient(params, jnp.zeros((B, S), jnp.int32))
    expected_D = np.asarray(apart_VD, np.float64).sum(axis=0)
    error = np.abs(together_VD[0] - expected_D).max() / np.abs(expected_D).max()
    assert error < 1e-2, error
    assert not np.asarray(together_VD[1:]).any()


def test_flops_per_token_is_six_per_active_weight_plus_attention():
    cfg = small(n_experts=4)
    L, D, N, K, H, F, E, V, S = 2, 32, 4, 2, 8, 48, 4, 96, 64
    weights = L * (2 * D * N * H + 2 * D * K * H + 2 * 3 * D * F + D * E + 2 * D) + D + D * V
    causal_attention = 6 * L * (2 * N * H * S / 2)
    assert model.flops_per_token(cfg, S) == 6 * weights + causal_attention
