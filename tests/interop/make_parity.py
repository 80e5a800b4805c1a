"""What transformers' Mixtral says of upcycled Llamas: `python -m tests.interop.make_parity` writes tests/interop/parity/.

Needs the extra `parity`.  A random Llama directory goes through `tanuki upcycle`.  transformers gets the dense model's weights
as they were published, and of our checkpoint what is random: the router, and the experts where they have noise.  These are kept
beside the logits.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from tanuki_jax import checkpoint
from tanuki_jax.cli.main import main
from tests.interop.llama import dense, drawn, write
from tests.model.make_parity import published

HERE = Path(__file__).parent / "parity"
CFG = dense(vocab_size=64, n_layers=2, d_model=16, d_ff=20, n_heads=4, n_kv_heads=2, head_dim=8)
E = 4
FLAGS = ("--no_normalized_gate", f"--n_experts={E}", "--top_k=2", "--router_std=0.5", "--seed=3")
CASES = {"copy": ("--strategy=copy",), "noise": ("--strategy=noise", "--noise_std=0.05")}
ROWS, LENGTH = 2, 16
FFN = ("gate", "up", "down")


def ids():
    return np.random.RandomState(1).randint(0, CFG.vocab_size, (ROWS, LENGTH))


def directory(home):
    """The Llama directory, and its arrays by their published names."""
    arrays = drawn(CFG, seed=5)
    return write(home, CFG, arrays), arrays


def upcycled(home, case, output):
    """Our checkpoint of the directory's mixture."""
    assert main(["upcycle", f"--checkpoint={home}", f"--output={output}", *FLAGS, *CASES[case]]) == 0
    return checkpoint.load(output)


def drawn_by_us(case, params):
    """What of our checkpoint no one else could draw: [L,D,E] and, for noise, [L,E,D,F], [L,E,F,D]."""
    moe = params["layers"]["moe"]
    return {name: np.asarray(moe[name]) for name in ("router", *(FFN if case == "noise" else ()))}


def mixtral(arrays, random):
    """State of transformers' Mixtral from the dense arrays and `drawn_by_us`; every expert without noise is the dense FFN."""
    state = {name: w for name, w in arrays.items() if ".mlp." not in name}
    for i in range(CFG.n_layers):
        layer = f"model.layers.{i}.mlp"
        ffn = {
            name: [random[name][i, e].T if name in random else arrays[f"{layer}.{name}_proj.weight"] for e in range(E)]
            for name in FFN
        }
        state[f"{layer}.gate.weight"] = random["router"][i].T
        pairs = zip(ffn["gate"], ffn["up"], strict=True)
        state[f"{layer}.experts.gate_up_proj"] = np.stack([np.concatenate([gate, up]) for gate, up in pairs])
        state[f"{layer}.experts.down_proj"] = np.stack(ffn["down"])
    return state


def transformers_logits(state):
    """Logits [B, S, V] of Mixtral in float32 with plain attention."""
    import torch

    model = published(dataclasses.replace(CFG, n_experts=E, top_k=2))
    model.load_state_dict({name: torch.tensor(np.ascontiguousarray(w)) for name, w in state.items()}, strict=True)
    with torch.no_grad():
        return model(torch.tensor(ids())).logits.numpy()


def llama_logits(home):
    """Logits [B, S, V] of a directory as transformers reads it, in float32 with plain attention."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(ids())).logits.numpy()


if __name__ == "__main__":
    import transformers

    HERE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        home, arrays = directory(Path(scratch) / "llama")
        np.savez_compressed(HERE / "llama.npz", logits=llama_logits(home), transformers=transformers.__version__)
        for case in CASES:
            random = drawn_by_us(case, upcycled(home, case, Path(scratch) / case).params)
            logits = transformers_logits(mixtral(arrays, random))
            np.savez_compressed(HERE / f"{case}.npz", logits=logits, **random, transformers=transformers.__version__)
