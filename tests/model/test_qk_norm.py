"""Queries and keys that are normed: the same as a plain loop, in training, decoding, on a mesh and through upcycling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, interop, model, parallel
from tanuki_jax.errors import UserError
from tanuki_jax.upcycle import stream
from tests import plain
from tests.tiny import apply, packed_batch, random_params, small

CFG = small(qk_norm=True)


def params_of(cfg=CFG):
    """With scales that are not 1, each its own."""
    params = random_params(cfg)
    for number, name in enumerate(("norm_q", "norm_k")):
        scale = params["layers"]["attn"][name]
        assert scale.shape == (cfg.n_layers, cfg.head_dim) and (scale == 1).all()
        params["layers"]["attn"][name] = 1 + 0.3 * jax.random.normal(jax.random.key(number), scale.shape)
    return params


def batch_of(rows=2):
    return {name: jnp.asarray(value) for name, value in packed_batch(np.random.default_rng(0), CFG, rows).items()}


def loss(forward, params, batch):
    hidden = forward(CFG, params, batch)[0]
    return (hidden**3 * (batch["segment_ids"] > 0)[..., None]).sum()


def test_it_is_the_plain_loop_and_so_are_its_gradients():
    params, batch = params_of(), batch_of()
    values = [
        jax.jit(jax.value_and_grad(lambda p, f=forward: loss(f, p, batch)))(params) for forward in (model.apply, plain.forward)
    ]
    np.testing.assert_allclose(values[0][0], values[1][0], rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(values[0][1]), jax.tree.leaves(values[1][1]), strict=True):
        assert path[0].key == "head" or np.abs(b).max() > 0, path
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-7, err_msg=str(path))


def test_without_it_nothing_changes_and_with_it_large_weights_do_not_sharpen_attention():
    batch = batch_of()
    assert "norm_q" not in model.parameter_shapes(small())["layers"]["attn"]
    params = params_of()
    larger = jax.tree.map(lambda w: w, params)
    for name in "qk":
        larger["layers"]["attn"][name] = 50 * params["layers"]["attn"][name]
    np.testing.assert_allclose(apply(CFG, larger, batch).hidden, apply(CFG, params, batch).hidden, rtol=1e-2, atol=1e-3)


def test_decoding_with_a_cache_says_what_the_whole_row_says():
    params, prompt = params_of(), [5, 9, 3, 17]
    [found] = model.generate(CFG, params, [prompt], model.Sampling(max_new_tokens=6, stop=()), 0)
    row = list(prompt)
    for _ in range(6):  # tokens after the last do not change what comes before
        tokens = jnp.array([row + [0] * (24 - len(row))] * 2)
        batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.tile(jnp.arange(24), (2, 1))}
        row.append(int((apply(CFG, params, batch).hidden[0, len(row) - 1] @ params["head"]).argmax()))
    assert found == row[len(prompt) :]


def test_on_a_mesh():
    params, batch = params_of(), batch_of(8)
    mesh = parallel.make_mesh(config.Mesh(fsdp=2, tensor=2, context=2))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, checkpoint.parameter_shardings(CFG, mesh))
        found = jax.jit(model.apply, static_argnums=0)(CFG, split, batch).hidden
    np.testing.assert_allclose(found, apply(CFG, params, batch).hidden, rtol=1e-4, atol=1e-5)


def test_upcycling_from_file_to_file_keeps_the_norms_and_export_refuses_them(tmp_path):
    params, home = params_of(), tmp_path / "dense"
    checkpoint.save_params(home, params, {"model": config.to_dict(CFG), "recipe": {}, "stage": "dense"})
    shape = dict(n_experts=4, top_k=2, expert_d_ff=0, first_dense=0, moe_every=1)
    shape |= dict(normalized_gate=True, gate_scale=1.0, router_bias=False)
    settings = dict(strategy="copy", noise_std=0.0, drop_ratio=0.5, router_init="normal", router_std=0.02)
    (home / "tokenizer").mkdir()
    stream.run(stream.plan([str(home)], shape, settings, 0, ""), tmp_path / "mixture")
    loaded = checkpoint.load(tmp_path / "mixture")
    assert loaded.cfg.qk_norm
    for name in ("norm_q", "norm_k"):
        np.testing.assert_array_equal(loaded.params["layers"]["attn"][name], params["layers"]["attn"][name])
    batch = batch_of()
    np.testing.assert_allclose(apply(loaded.cfg, loaded.params, batch).hidden, apply(CFG, params, batch).hidden, atol=1e-4)
    with pytest.raises(UserError, match="qk_norm"):
        interop.export_huggingface(home, tmp_path / "hf", 0)
