"""Logits of transformers' Llama and Mixtral on random weights: `python -m tests.model.make_parity` writes tests/model/parity/.

Needs the extra `parity`.  The weights are drawn from RandomState(case's seed) in the order of `weights` below, in the layouts
of published checkpoints (one [out, in] matrix for each projection of each expert), so no file of weights is kept.
"""

from pathlib import Path

import numpy as np

from tanuki_jax import config

HERE = Path(__file__).parent / "parity"
SHAPE = dict(vocab_size=96, n_layers=2, d_model=32, d_ff=48, n_heads=4, n_kv_heads=2, head_dim=16, norm_eps=1e-3)
FLOAT32 = config.Compute(dtype="float32")
CASES = {
    "llama": config.ModelConfig(**SHAPE, rope_theta=50.0, compute=FLOAT32),
    "mixtral": config.ModelConfig(**SHAPE, rope_theta=5e5, compute=FLOAT32, n_experts=4, top_k=2, normalized_gate=False),
}
ROWS, LENGTH = 3, 40


def weights(cfg):
    """Names of the published checkpoints -> float32 arrays, drawn one after another in this order."""
    rng = np.random.RandomState(7 + cfg.n_experts)
    D, F, Q, KV = cfg.d_model, cfg.d_ff, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    shapes = {"model.embed_tokens.weight": (cfg.vocab_size, D)}
    for i in range(cfg.n_layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (m, D) for n, m in (("q", Q), ("k", KV), ("v", KV))}
        shapes[f"{layer}.self_attn.o_proj.weight"] = (D, Q)
        if cfg.n_experts:
            shapes[f"{layer}.mlp.gate.weight"] = (cfg.n_experts, D)
        for e in [f"experts.{e}." for e in range(cfg.n_experts)] or [""]:
            shapes |= {f"{layer}.mlp.{e}{n}_proj.weight": s for n, s in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F)))}
        shapes |= {f"{layer}.{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (D,), "lm_head.weight": (cfg.vocab_size, D)}
    drawn = {name: rng.standard_normal(shape) * 0.15 for name, shape in shapes.items()}
    return {name: (1 + w if "norm" in name else w).astype(np.float32) for name, w in drawn.items()}


def ids(cfg):
    """Input of several rows."""
    return np.random.RandomState(1).randint(0, cfg.vocab_size, (ROWS, LENGTH))


def published(cfg):
    """An untrained model of transformers of this architecture, in float32 with plain attention."""
    import transformers

    kind = "Mixtral" if cfg.n_experts else "Llama"
    experts = dict(num_local_experts=cfg.n_experts, num_experts_per_tok=cfg.top_k) if cfg.n_experts else {}
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        head_dim=cfg.head_dim,
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        tie_word_embeddings=False,
        attn_implementation="eager",
        dtype="float32",
        **experts,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(settings).eval()


def transformers_logits(cfg):
    """Logits [B, S, V] in float32 with plain attention."""
    import torch

    model = published(cfg)
    state = {name: torch.tensor(w) for name, w in weights(cfg).items()}
    for layer in [f"model.layers.{i}.mlp.experts" for i in range(cfg.n_layers) if cfg.n_experts]:
        gate, up, down = (
            torch.stack([state.pop(f"{layer}.{e}.{n}_proj.weight") for e in range(cfg.n_experts)])
            for n in ("gate", "up", "down")
        )
        state |= {f"{layer}.gate_up_proj": torch.cat([gate, up], dim=1), f"{layer}.down_proj": down}
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model(torch.tensor(ids(cfg))).logits.numpy()


if __name__ == "__main__":
    import transformers

    HERE.mkdir(exist_ok=True)
    for name, cfg in CASES.items():
        np.savez_compressed(
            HERE / f"{name}.npz", ids=ids(cfg), logits=transformers_logits(cfg), transformers=transformers.__version__
        )
