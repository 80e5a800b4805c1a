"""Small dense trees, and mixtures made of them."""

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, model, upcycle
from tests.tiny import QUICK, apply, packed_batch, random_params, small, with_options

DENSE, E = small(), 4
BATCH = {name: jnp.asarray(value) for name, value in packed_batch(np.random.default_rng(0), DENSE, rows=2).items()}
PARAMS = random_params(DENSE)
FFN = ("gate", "up", "down")


def mixture(top_k=2, normalized=True, n_experts=E):
    return upcycle.moe_config(DENSE, n_experts=n_experts, top_k=top_k, normalized_gate=normalized)


def upcycled(strategy="copy", seed=0, cfg=None, **options):
    return upcycle.upcycle(PARAMS, cfg or mixture(), config.Upcycle(strategy, **options), jax.random.key(seed))


def logits(cfg, params):
    return outputs(cfg, params).hidden @ params["head"]


def outputs(cfg, params):
    return apply(with_options(cfg, **QUICK), params, BATCH)


STRATEGIES = {"copy": {}, "noise": {}, "drop": {"drop_ratio": 0.4}, "groups": {}}


ODD = small(n_layers=3, d_model=7, d_ff=15, vocab_size=19, n_heads=1, n_kv_heads=1, head_dim=6)
CENTRE, SPREAD = {"gate": 1.0, "up": -3.0, "down": 10.0}, {"gate": 2.0, "up": 0.5, "down": 0.01}


def drawn(cfg=ODD, seed=0, dtype=None):
    """A dense tree of random numbers, no two matrices of one mean and deviation."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name = path[-1].key
        return jnp.asarray(rng.normal(CENTRE.get(name, 0), SPREAD.get(name, 1), shape.shape), dtype or shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, model.parameter_shapes(cfg))


# Op by op: the ops are shared by most cases, whereas compiling a case as a whole takes seconds.  The compiled one is held
# against numpy's by way of the streamed one (test_stream.py), and on several meshes (test_convert.py).
convert = upcycle.upcycle


def made_of(dense, strategy, n_experts=5, seed=0, others=(), shape=None, source=ODD, **options):
    cfg = upcycle.moe_config(source, n_experts=n_experts, **shape or {})
    return convert(dense, cfg, config.Upcycle(strategy, **options), jax.random.key(seed), tuple(others))


def draw_key(seed, layer, number):
    key = jax.random.key(seed)
    for part in (1, layer, number):
        key = jax.random.fold_in(key, part)
    return key


UP = {1: 1, 2: 1, 3: 2, 4: 2, 5: 2, 8: 4}  # factor of up, by the number of parts


def numpy_groups(weights, number, parts):
    width = weights["gate"].shape[1] // parts
    of_part = slice(number % parts * width, (number % parts + 1) * width)
    return {
        "gate": weights["gate"][:, of_part],
        "up": weights["up"][:, of_part] * UP[parts],
        "down": weights["down"][of_part] * (parts / UP[parts]),
    }
