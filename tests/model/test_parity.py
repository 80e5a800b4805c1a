import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.make_parity import CASES, HERE, LENGTH, ROWS, ids, transformers_logits, weights
from tests.tiny import apply


def tree(cfg):
    """The weights of a case as our parameters."""
    L, D, H, drawn = cfg.n_layers, cfg.d_model, cfg.head_dim, weights(cfg)

    def stacked(name, *shape):  # a published matrix is [out, in]
        return jnp.stack([drawn[f"model.layers.{i}.{name}.weight"].T.reshape(shape) for i in range(L)])

    def experts(name, *shape):
        per_expert = [stacked(f"mlp.experts.{e}.{name}_proj", *shape) for e in range(cfg.n_experts)]
        return jnp.stack(per_expert, axis=1) if per_expert else stacked(f"mlp.{name}_proj", *shape)

    ffn = {n: experts(n, *((cfg.d_ff, D) if n == "down" else (D, cfg.d_ff))) for n in ("gate", "up", "down")}
    router = {"router": stacked("mlp.gate", D, cfg.n_experts)} if cfg.n_experts else {}
    return {
        "embed": {"table": jnp.array(drawn["model.embed_tokens.weight"])},
        "layers": {
            "attn": {
                "q": stacked("self_attn.q_proj", D, cfg.n_heads, H),
                "k": stacked("self_attn.k_proj", D, cfg.n_kv_heads, H),
                "v": stacked("self_attn.v_proj", D, cfg.n_kv_heads, H),
                "o": stacked("self_attn.o_proj", cfg.n_heads, H, D),
            },
            "moe" if cfg.n_experts else "mlp": {**router, **ffn},
            "norm_attn": stacked("input_layernorm", D),
            "norm_mlp": stacked("post_attention_layernorm", D),
        },
        "norm_final": jnp.array(drawn["model.norm.weight"]),
        "head": jnp.array(drawn["lm_head.weight"].T),
    }


def our_logits(cfg):
    ones, positions = jnp.ones((ROWS, LENGTH), jnp.int32), jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    params = tree(cfg)
    batch = {"tokens": jnp.int32(ids(cfg)), "segment_ids": ones, "positions": positions}
    return apply(cfg, params, batch).hidden @ params["head"]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_that_transformers_gave(name):
    with np.load(HERE / f"{name}.npz") as stored:
        np.testing.assert_array_equal(stored["ids"], ids(CASES[name]))
        assert stored["logits"].std() > 0.5  # the comparison is not of zeros
        np.testing.assert_allclose(our_logits(CASES[name]), stored["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_the_transformers_that_is_installed(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    np.testing.assert_allclose(our_logits(CASES[name]), transformers_logits(CASES[name]), rtol=0, atol=1e-4)
