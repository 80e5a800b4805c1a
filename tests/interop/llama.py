"""Random Llama directories as Hugging Face keeps them, the safetensors files written by hand, and their weights as our tree."""

import json

import ml_dtypes
import numpy as np

from tests.model.make_parity import weights
from tests.tiny import small

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
INDEX = "model.safetensors.index.json"
# Every size is another one, so that no axis can be taken for another.
SHAPE = dict(
    vocab_size=88, n_layers=3, d_model=32, d_ff=40, n_heads=6, n_kv_heads=2, head_dim=4, norm_eps=1e-3, rope_theta=50.0
)


def dense(**overrides):
    return small(**{**SHAPE, "init_std": 0.008, "dtype": "auto", **overrides})


def drawn(cfg, seed=0, dtype="float32"):
    """Names of a published checkpoint -> arrays."""
    rng = np.random.RandomState(seed)
    made = {name: rng.standard_normal(w.shape) * 0.15 + ("norm" in name) for name, w in weights(cfg).items()}
    return {name: w.astype(DTYPES[dtype]) for name, w in made.items()}


def settings(cfg, **overrides):
    """config.json, as transformers 4 wrote it; a key whose value is ... is left out."""
    made = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "num_hidden_layers": cfg.n_layers,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "rope_theta": cfg.rope_theta,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return {name: value for name, value in {**made, **overrides}.items() if value is not ...}


def save_file(path, arrays):
    """A safetensors file.  A pair (dtype, shape) in an array's place takes no room on the disk, and reads as zeros."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, array in arrays.items():
        dtype, shape = (str(array.dtype), array.shape) if isinstance(array, np.ndarray) else array
        size = int(np.prod(shape, dtype=np.int64)) * {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}[CODES[dtype]]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, array in arrays.items():
            if isinstance(array, np.ndarray):
                f.seek(8 + len(text) + header[name]["data_offsets"][0])
                f.write(np.ascontiguousarray(array).tobytes())
        f.truncate(8 + len(text) + end)


def write(home, cfg, arrays, shards=3, **overrides):
    """A directory with config.json and the arrays in shards, in an index; in one file without index where shards is 0."""
    home.mkdir(parents=True)
    (home / "config.json").write_text(json.dumps(settings(cfg, **overrides)))
    if not shards:
        save_file(home / "model.safetensors", arrays)
        return home
    names = list(arrays)
    parts = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    where = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(home / file, {name: arrays[name] for name in part})
        where |= dict.fromkeys(part, file)
    (home / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
    return home


def shapes(cfg):
    """Names of a published checkpoint -> shapes, without the arrays."""
    D, Q, KV = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    made = {"model.embed_tokens.weight": (cfg.vocab_size, D)}
    for i in range(cfg.n_layers):
        layer = f"model.layers.{i}"
        made |= {
            f"{layer}.self_attn.{n}_proj.weight": s for n, s in (("q", (Q, D)), ("k", (KV, D)), ("v", (KV, D)), ("o", (D, Q)))
        }
        made |= {f"{layer}.mlp.{n}_proj.weight": (cfg.d_ff, D) for n in ("gate", "up")}
        made |= {f"{layer}.mlp.down_proj.weight": (D, cfg.d_ff)}
        made |= {f"{layer}.{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    return made | {"model.norm.weight": (D,), "lm_head.weight": (cfg.vocab_size, D)}


def flat(cfg, arrays):
    """The same weights under our names, in our layouts: a published matrix is [out, in], its heads one after another.

    Norms are float32 here.
    """
    N, K, H, D, L = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.d_model, range(cfg.n_layers)

    def stacked(name, layout=lambda w: w):
        return np.stack([layout(arrays[f"model.layers.{i}.{name}.weight"]) for i in L])

    return {
        "embed/table": arrays["model.embed_tokens.weight"],
        "layers/attn/q": stacked("self_attn.q_proj", lambda w: np.moveaxis(w.reshape(N, H, D), 2, 0)),
        "layers/attn/k": stacked("self_attn.k_proj", lambda w: np.moveaxis(w.reshape(K, H, D), 2, 0)),
        "layers/attn/v": stacked("self_attn.v_proj", lambda w: np.moveaxis(w.reshape(K, H, D), 2, 0)),
        "layers/attn/o": stacked("self_attn.o_proj", lambda w: np.moveaxis(w.reshape(D, N, H), 0, 2)),
        "layers/norm_attn": stacked("input_layernorm").astype(np.float32),
        "layers/norm_mlp": stacked("post_attention_layernorm").astype(np.float32),
        "layers/mlp/gate": stacked("mlp.gate_proj", np.transpose),
        "layers/mlp/up": stacked("mlp.up_proj", np.transpose),
        "layers/mlp/down": stacked("mlp.down_proj", np.transpose),
        "norm_final": arrays["model.norm.weight"].astype(np.float32),
        "head": arrays.get("lm_head.weight", arrays["model.embed_tokens.weight"]).T,
    }


def nested(named):
    """A tree from paths."""
    tree = {}
    for path, array in named.items():
        *groups, last = path.split("/")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = array
    return tree
