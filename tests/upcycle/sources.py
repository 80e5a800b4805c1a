"""Dense checkpoints that are upcycled in tests: ours and Hugging Face's, of the same weights."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import checkpoint, config
from tests.interop.llama import dense, flat, nested

CFG = dense()
FFN = ("gate", "up", "down")
E = 4


def named(params):
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def save(home, cfg, arrays, step=0):
    """Published arrays as a checkpoint of ours, as training writes it."""
    cfg = dataclasses.replace(cfg, param_dtype=str(arrays["model.norm.weight"].dtype))
    checkpoints = checkpoint.Checkpoints(home)
    params = jax.tree.map(jnp.asarray, nested(flat(cfg, arrays)))
    checkpoints.save_items(step, {"params": params}, {"model": config.to_dict(cfg), "stage": "pretrain"})
    checkpoints.close()
    return home


class Source(NamedTuple):
    """A dense checkpoint: of ours or of Hugging Face, the same weights for the same seed."""

    kind: str = "ours"
    dtype: str = "float32"
    seed: int = 0


def shape(**overrides):
    plain = dict(n_experts=E, top_k=2, expert_d_ff=0, first_dense=0, moe_every=1)
    return {**plain, "normalized_gate": True, "gate_scale": 1.0, "router_bias": False, **overrides}


NOISY = ("--strategy=noise", "--noise_std=0.05", f"--n_experts={E}")
COPY, LLAMA = dict(strategy="copy", router_std=0.3), Source("llama")
