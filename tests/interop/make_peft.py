"""Adapters as PEFT makes them: `python -m tests.interop.make_peft` writes tests/interop/peft/.

Needs torch, transformers and peft, no JAX.  Of each case it keeps the base that `save_pretrained` wrote, the adapters that PEFT
wrote, and PEFT's logits of random tokens.
"""

import json
import shutil
from pathlib import Path

import numpy as np

from tests.interop.make_export import SHAPE

HERE = Path(__file__).parent / "peft"
EXPERTS = dict(num_local_experts=3, num_experts_per_tok=2)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Case -> class of the base, and what PEFT is told.
CASES = {
    "llama": (
        "Llama",
        dict(
            r=4,
            lora_alpha=6,
            target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"],
            rank_pattern={"v_proj": 2, "mlp.down_proj": 3},
            alpha_pattern={"v_proj": 5, "up_proj": 1.5},
        ),
    ),
    # Layers that differ, and one that has none.
    "uneven": (
        "Llama",
        dict(
            r=2,
            lora_alpha=3,
            use_rslora=True,
            target_modules=r"model\.layers\.(0\.self_attn\.[qv]_proj|1\.(self_attn\.q_proj|mlp\.up_proj))",
            rank_pattern={r"model.layers.1.self_attn.q_proj": 3},
            alpha_pattern={r".*\.0\.self_attn\.q_proj": 7},
        ),
    ),
    "mixtral": (
        "Mixtral",
        dict(
            r=2,
            lora_alpha=5,
            target_modules=["q_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            rank_pattern={"o_proj": 1, "mlp.experts.down_proj": 3},
            alpha_pattern={"o_proj": 3, "mlp.experts.gate_up_proj": 7},
        ),
    ),
    # The router is no module that PEFT can wrap, so it is a parameter as well.
    "router": (
        "Mixtral",
        dict(
            r=3,
            lora_alpha=4,
            use_rslora=True,
            target_modules=["v_proj"],
            target_parameters=["mlp.experts.down_proj", "mlp.gate.weight"],
            rank_pattern={"mlp.gate.weight": 2},
            alpha_pattern={"mlp.gate.weight": 9},
        ),
    ),
}
# How it computes; some kernels of experts want rows of 16 bytes.
PLAIN = dict(dtype="float32", attn_implementation="eager", experts_implementation="eager")
ROWS, LENGTH = 2, 10


def ids():
    return np.random.RandomState(1).randint(0, SHAPE["vocab_size"], (ROWS, LENGTH))


def logits(model):
    """[B, S, V] of a model of transformers or PEFT."""
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(ids())).logits.float().numpy()


def randomize(model, names, size):
    """Parameters whose name has one of `names` in it."""
    import torch

    rng = np.random.RandomState(11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in names):
                weight.copy_(torch.tensor(rng.standard_normal(weight.shape) * size + ("norm" in name)))
    return model


def base_of(architecture):
    """A random model."""
    import transformers

    more = EXPERTS if architecture == "Mixtral" else {}
    settings = getattr(transformers, f"{architecture}Config")(**SHAPE, **more)
    return randomize(getattr(transformers, f"{architecture}ForCausalLM")(settings), [""], 0.3)


if __name__ == "__main__":
    import peft
    import transformers

    shutil.rmtree(HERE, ignore_errors=True)
    for architecture in ("Llama", "Mixtral"):
        base_of(architecture).save_pretrained(HERE / f"base-{architecture.lower()}")
        (HERE / f"base-{architecture.lower()}" / "generation_config.json").unlink()
    for case, (architecture, told) in CASES.items():
        base = getattr(transformers, f"{architecture}ForCausalLM").from_pretrained(
            HERE / f"base-{architecture.lower()}", **PLAIN
        )
        model = randomize(peft.get_peft_model(base, peft.LoraConfig(**told)), ["lora_"], 0.3)
        model.save_pretrained(HERE / case)
        (HERE / case / "README.md").unlink()
        settings = HERE / case / "adapter_config.json"  # with a path of here, and targets in another order each time
        written = {name: sorted(v) if isinstance(v, list) else v for name, v in json.loads(settings.read_text()).items()}
        settings.write_text(json.dumps(written | {"base_model_name_or_path": architecture}, indent=1) + "\n")
        versions = dict(transformers=transformers.__version__, peft=peft.__version__)
        np.savez_compressed(HERE / case / "expected.npz", logits=logits(model), **versions)
