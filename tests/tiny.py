"""Models and batches small enough for any test."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, model

apply = jax.jit(model.apply, static_argnums=0)
_init = jax.jit(model.init, static_argnums=0)
# Of all ways to compute a mixture on one device the one that compiles the fastest, for tests of what lies around the experts:
# tests/ops/test_expert_ffn.py holds every way against this one.
QUICK = dict(expert_impl="reference")


def init(cfg, key):
    """Random parameters, which do not depend on how the model is computed."""
    return _init(with_options(cfg, **QUICK), key)


def small(**overrides):
    """A model small enough for any test; float32."""
    shape = dict(vocab_size=96, n_layers=2, d_model=32, d_ff=48, n_heads=4, n_kv_heads=2, head_dim=8, init_std=0.1)
    return with_options(config.ModelConfig(**shape), **{"dtype": "float32", **overrides})


def random_params(cfg, seed=0):
    """Parameters of the distribution of `init`, other numbers, from NumPy: nothing is compiled."""
    rng = np.random.default_rng(seed)
    layers = (2 * cfg.n_layers) ** 0.5

    def draw(path, shape):
        name = path[-1].key
        if name.startswith(("norm", "bias")):
            return jnp.full(shape.shape, name.startswith("norm"), shape.dtype)
        std = cfg.init_std / (layers if name in ("o", "down") else 1)
        return jnp.asarray(std * rng.standard_normal(shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.parameter_shapes(cfg))


def with_options(cfg, **options):
    """A model with other keys of its architecture, or of how it is computed."""
    compute = {name: options.pop(name) for name in vars(cfg.compute) if name in options}
    return dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, **compute), **options)


def prompt_scores(cfg, weights, tokens_BS, top=0):
    """The decoder's scores of prompts without padding, admitted together."""
    B, S = tokens_BS.shape
    keys = model.sampling.row_keys(np.int32(0), np.zeros((B, 2), np.uint32))
    options = model.sampling.stack([model.Sampling()] * B)
    prompts = model.slots.Prompts(tokens_BS, np.full(B, S, np.int32), np.arange(B), options, keys)
    return model.slots.admit_scored(cfg, weights, model.slots.empty(cfg, B, S), prompts, np.bool_(True), top)[1]


def of_batch(loss_fn):
    """A loss of (params, batch) alone: nothing balances, nothing is drawn."""
    return lambda params, batch: loss_fn(params, batch, {}, None)


def packed_batch(rng, cfg, rows=8, length=24):
    """Random rows of two or three segments each, the last one padding, with loss on most tokens."""
    tokens = rng.integers(1, cfg.vocab_size, (rows, length + 1)).astype(np.int32)
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for r in range(rows):
        cuts = [0, *sorted(rng.choice(np.arange(4, length - 2), 2, replace=False)), length - int(rng.integers(0, 4))]
        for s, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False), 1):
            segments[r, a:b] = s
            positions[r, a:b] = np.arange(b - a)
    weights = (segments > 0) * (rng.random((rows, length)) < 0.8)
    return {
        "tokens": tokens[:, :-1] * (segments > 0),
        "targets": tokens[:, 1:],
        "loss_weights": weights.astype(np.float32),
        "segment_ids": segments,
        "positions": positions,
    }


def pair_batch(rng, cfg, rows=8, length=32):
    """Rows of one or two packed pairs: segments 1 and 2 are the first pair, 3 and 4 the second."""
    batch = packed_batch(rng, cfg, rows, length)
    pairs = np.zeros((rows, 2, 2), np.int32)
    for r in range(rows):
        count = 1 + r % 2
        cuts = np.linspace(0, length - int(rng.integers(0, 3)), 2 * count + 1).astype(int)
        batch["segment_ids"][r] = batch["positions"][r] = 0
        for s, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False), 1):
            batch["segment_ids"][r, a:b] = s
            batch["positions"][r, a:b] = np.arange(b - a)
            batch["loss_weights"][r, a:b] = np.arange(b - a) >= 2
            batch["loss_weights"][r, b - 1] = 0
        batch["loss_weights"][r, cuts[-1] :] = 0
        pairs[r, :count] = np.arange(1, 2 * count + 1).reshape(-1, 2)
    reference = rng.normal(size=(rows, 2, 2)).astype(np.float32) * (pairs > 0)
    return {**batch, "pair_segments": pairs, "ref_logprobs": reference}


def problem(kind, cfg, rows=8):
    """A batch of a stage kind; sft has loss on few tokens, unevenly over the rows."""
    rng = np.random.default_rng(3)
    if kind == "dpo":
        return pair_batch(rng, cfg, rows)
    batch = packed_batch(rng, cfg, rows)
    if kind == "sft":
        batch["loss_weights"] *= rng.random(batch["loss_weights"].shape) < np.linspace(0.05, 0.9, rows)[:, None]
    return batch


def assert_close(found, expected, tolerance):
    """Relative to the largest number of each leaf."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        wrong = np.abs(np.asarray(a) - np.asarray(b)).max()
        assert wrong <= tolerance * (np.abs(np.asarray(b)).max() + 1e-9), (jax.tree_util.keystr(path), wrong)


def as_arrays(batch):
    """A batch on the device."""
    return {name: jnp.asarray(value) for name, value in batch.items()}
