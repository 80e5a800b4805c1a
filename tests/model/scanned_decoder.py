"""The decoder before that of slots, for comparison: a scan over stacked layers, whose whole cache is read and written anew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import ops
from tanuki_jax.model import dropless
from tanuki_jax.model.layers import apply_rope, compute_dtype, rms_norm
from tanuki_jax.model.moe import MoE


def generate(cfg, params, prompts, limit, keys=None):
    """The likeliest new ids of each prompt, or, with a key for each, a draw from the whole distribution."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = 1 << max(4, int(lengths.max() - 1).bit_length())
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return np.asarray(_generate(dropless(cfg), limit, params, tokens, lengths, keys)).tolist()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(cfg, limit, params, tokens_BP, lengths_B, keys_B):
    (B, P), dtype = tokens_BP.shape, compute_dtype(cfg)
    shape = (cfg.n_layers, B, P + limit, cfg.n_kv_heads, cfg.head_dim)
    cache = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
    hidden_BPD, cache = _decode(cfg, params, cache, tokens_BP, jnp.broadcast_to(jnp.arange(P), (B, P)))

    def add_token(step, state):
        hidden_BD, cache, out_BT = state
        logits_BV = jnp.einsum("BD,DV->BV", hidden_BD, params["head"].astype(dtype), preferred_element_type=jnp.float32)
        if keys_B is None:
            token_B = logits_BV.argmax(axis=-1).astype(jnp.int32)
        else:
            step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
            token_B = jax.vmap(jax.random.categorical)(step_keys_B, logits_BV).astype(jnp.int32)
        hidden_B1D, cache = _decode(cfg, params, cache, token_B[:, None], (lengths_B + step)[:, None])
        return hidden_B1D[:, 0], cache, out_BT.at[:, step].set(token_B)

    state = hidden_BPD[jnp.arange(B), lengths_B - 1], cache, jnp.zeros((B, limit), jnp.int32)
    return jax.lax.fori_loop(0, limit, add_token, state)[2]


def _decode(cfg, params, cache, tokens_BS, positions_BS):
    """Hidden states of new tokens after those in the cache [L, B, M, K, H], and the cache with them in it."""
    rows_B1 = jnp.arange(len(tokens_BS))[:, None]

    def block(x_BSD, inputs):
        layer, k_BMKH, v_BMKH = inputs
        h_BSD = rms_norm(x_BSD, layer["norm_attn"], cfg.norm_eps)
        q, k, v = (ops.linear(h_BSD, layer["attn"][name].astype(x_BSD.dtype)) for name in "qkv")
        q = apply_rope(q, positions_BS, cfg.rope_theta, scale=cfg.head_dim**-0.5)
        k_BMKH = k_BMKH.at[rows_B1, positions_BS].set(apply_rope(k, positions_BS, cfg.rope_theta))
        v_BMKH = v_BMKH.at[rows_B1, positions_BS].set(v)
        y_BSNH = ops.cached_attention(q, k_BMKH.swapaxes(1, 2), v_BMKH.swapaxes(1, 2), positions_BS)
        x_BSD = x_BSD + ops.linear(y_BSNH, layer["attn"]["o"].astype(x_BSD.dtype), 2)
        h_BSD = rms_norm(x_BSD, layer["norm_mlp"], cfg.norm_eps)
        if "moe" in layer:
            y_BSD, _ = MoE(cfg).apply({"params": layer["moe"]}, h_BSD, jnp.ones(h_BSD.shape[:2], bool))
        else:
            gate, up, down = (layer["mlp"][name].astype(x_BSD.dtype) for name in ("gate", "up", "down"))
            y_BSD = ops.linear(jax.nn.silu(ops.linear(h_BSD, gate)) * ops.linear(h_BSD, up), down)
        return x_BSD + y_BSD, (k_BMKH, v_BMKH)

    x_BSD = params["embed"]["table"].astype(compute_dtype(cfg))[tokens_BS]
    x_BSD, (k, v) = jax.lax.scan(block, x_BSD, (params["layers"], cache["k"], cache["v"]))
    return rms_norm(x_BSD, params["norm_final"], cfg.norm_eps), {"k": k, "v": v}
