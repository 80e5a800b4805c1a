"""Tiny models as transformers publishes them: `python -m tests.interop.make_export` writes tests/interop/export/.

Needs the extra `parity` alone, no JAX.  Of each class it keeps the directory that `save_pretrained` wrote, the logits of
random tokens and what greedy decoding says after the first of them, both computed in float32.  Tanuki's class is the modelling
file that `tanuki export` copies beside the weights.
"""

import importlib.util
import shutil
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "export"
CODE = Path(__file__).parents[2] / "tanuki_jax/interop/modeling_tanuki.py"
# Every size is another one, and no setting is the default of a class.
SHAPE = dict(
    vocab_size=28,
    hidden_size=12,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=96,
    rms_norm_eps=1e-3,
    rope_parameters={"rope_type": "default", "rope_theta": 50.0},
    tie_word_embeddings=False,
)
EXPERTS = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "tanuki": dict(num_local_experts=5, num_experts_per_tok=3),
}
GATE_SCALE = 1.75
SAVED = {
    "llama": dict(dtype="float32", shard="1GB"),
    "mixtral": dict(dtype="bfloat16", shard="4KB"),
    "tanuki": dict(dtype="bfloat16", shard="1GB"),
}
# How it computes; some kernels of experts want rows of 16 bytes.
PLAIN = dict(dtype="float32", attn_implementation="eager", experts_implementation="eager")
ROWS, LENGTH, PROMPT, NEW = 2, 10, 4, 6


def ids():
    return np.random.RandomState(1).randint(0, SHAPE["vocab_size"], (ROWS, LENGTH))


def answers(model):
    """Logits [B, S, V] of a model of transformers, and the tokens [B, NEW] that it says greedily after PROMPT tokens."""
    import torch

    tokens = torch.tensor(ids())
    with torch.no_grad():
        logits = model(tokens).logits.float().numpy()
        said = model.generate(
            tokens[:, :PROMPT],
            attention_mask=torch.ones_like(tokens[:, :PROMPT]),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
    return logits, said[:, PROMPT:].numpy()


def tanuki_class():
    spec = importlib.util.spec_from_file_location("modeling_tanuki", CODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TanukiConfig, module.TanukiForCausalLM


def built(kind):
    """A random model."""
    import torch
    import transformers

    if kind == "tanuki":
        config, architecture = tanuki_class()
        settings = config(**SHAPE, **EXPERTS[kind], gate_scale=GATE_SCALE)
    else:
        name = kind.capitalize()
        config, architecture = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
        settings = config(**SHAPE, **EXPERTS.get(kind, {}))
    model = architecture(settings)
    rng = np.random.RandomState(11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.tensor(rng.standard_normal(weight.shape) * 0.4 + ("norm" in name)))
    return model.to(getattr(torch, SAVED[kind]["dtype"]))


if __name__ == "__main__":
    import transformers

    for kind in ("llama", "mixtral", "tanuki"):
        home = HERE / kind
        shutil.rmtree(home, ignore_errors=True)
        model = built(kind)
        model.save_pretrained(home, max_shard_size=SAVED[kind]["shard"])
        (home / "generation_config.json").unlink()
        logits, said = answers(type(model).from_pretrained(home, **PLAIN).eval())
        np.savez_compressed(home / "expected.npz", logits=logits, said=said, transformers=transformers.__version__)
