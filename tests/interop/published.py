"""Random mixtures in both published layouts, their weights as our tree, safetensors files read by hand, and the verbs."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tanuki_jax import checkpoint, config, interop, model
from tanuki_jax.cli.main import main
from tests import tiny_recipe
from tests.checkpoint.test_manager import mesh
from tests.interop.llama import DTYPES, dense, drawn, flat, nested

NUMPY = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
# How a layer's experts lie: a tensor for each matrix of each expert (w1, w2, w3), or one for all experts.
SINGLE, FUSED = "single", "fused"
EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}
# transformers wants a width that is a multiple of the heads; all sizes still differ.
HEADS = dict(n_heads=4, n_kv_heads=2, head_dim=6)
# What is published: our model, the layout of its experts, and the keys of config.json that are not Llama's.
KINDS = {
    "llama": (dict(), ""),
    "mixtral": (dict(n_experts=5, top_k=3, normalized_gate=False), SINGLE),
    "mixtral, fused": (dict(n_experts=5, top_k=3, normalized_gate=False), FUSED),
    "tanuki": (dict(n_experts=5, top_k=3, normalized_gate=True, gate_scale=1.75), FUSED),
}


def made(kind, dtype="float32", seed=0, **overrides):
    """Our model of a kind, its weights by published names, by ours, and the keys of its config.json."""
    shape, layout = KINDS[kind]
    cfg = dense(**{**HEADS, **shape, "param_dtype": dtype, **overrides})
    drawn_by_name = drawn(cfg, seed, dtype)
    return cfg, published(cfg, drawn_by_name, layout), ours(cfg, drawn_by_name), keys(kind, cfg)


def keys(kind, cfg):
    """What `llama.settings` lacks."""
    name = kind.partition(",")[0]
    if name == "llama":
        return {}
    scale = {"gate_scale": cfg.gate_scale} if name == "tanuki" else {}
    return scale | {
        "architectures": [f"{name.capitalize()}ForCausalLM"],
        "model_type": name,
        "num_local_experts": cfg.n_experts,
        "num_experts_per_tok": cfg.top_k,
        "sliding_window": None,
        "attention_bias": ...,
        "mlp_bias": ...,
    }


def published(cfg, arrays, layout):
    """What was drawn, one [out, in] matrix for each of an expert's, under the names of a layout."""
    if not cfg.n_experts:
        return arrays
    result = {name: w for name, w in arrays.items() if ".mlp." not in name}
    for i in range(cfg.n_layers):
        layer = f"model.layers.{i}"
        ffn = {n: [arrays[f"{layer}.mlp.experts.{e}.{n}_proj.weight"] for e in range(cfg.n_experts)] for n in EXPERT}
        router = arrays[f"{layer}.mlp.gate.weight"]
        if layout == SINGLE:
            result[f"{layer}.block_sparse_moe.gate.weight"] = router
            for name, theirs in EXPERT.items():
                result |= {f"{layer}.block_sparse_moe.experts.{e}.{theirs}.weight": w for e, w in enumerate(ffn[name])}
        else:
            result[f"{layer}.mlp.gate.weight"] = router
            pairs = zip(ffn["gate"], ffn["up"], strict=True)
            result[f"{layer}.mlp.experts.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in pairs])
            result[f"{layer}.mlp.experts.down_proj"] = np.stack(ffn["down"])
    return result


def ours(cfg, arrays):
    """What was drawn, in our tree's names and layouts."""
    if not cfg.n_experts:
        return flat(cfg, arrays)
    L, E = range(cfg.n_layers), range(cfg.n_experts)
    first = {
        f"model.layers.{i}.mlp.{n}_proj.weight": arrays[f"model.layers.{i}.mlp.experts.0.{n}_proj.weight"]
        for i in L
        for n in EXPERT
    }
    result = {name: w for name, w in flat(cfg, arrays | first).items() if "/mlp/" not in name}
    result["layers/moe/router"] = np.stack([arrays[f"model.layers.{i}.mlp.gate.weight"].T for i in L])
    for name in EXPERT:
        matrices = [[arrays[f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight"].T for e in E] for i in L]
        result[f"layers/moe/{name}"] = np.array(matrices, DTYPES[cfg.param_dtype])
    return result


def read_file(path):
    """Header, where its data begins, and arrays of a safetensors file."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            flat_array = np.frombuffer(data[begin + first : begin + last], NUMPY[entry["dtype"]])
            arrays[name] = flat_array.reshape(entry["shape"])
    return header, begin, arrays


def read_directory(home):
    """All arrays of a directory, whatever its files."""
    arrays = {}
    for path in sorted(home.glob("*.safetensors")):
        found = read_file(path)[2]
        assert not found.keys() & arrays.keys()
        arrays |= found
    return arrays


def assert_same_bits(found, expected):
    """Same names, shapes, dtypes and bits; NaNs count as what they are."""
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


# --- checkpoints ---------------------------------------------------------------------------------------------------


def save(home, cfg, named, meta=(), where=None, step=0):
    """Arrays under our names as a checkpoint, over the devices of a mesh as training writes it, or on one."""
    params = nested(named)
    params = jax.device_put(params, checkpoint.parameter_shardings(cfg, where)) if where else jax.tree.map(jnp.asarray, params)
    checkpoints = checkpoint.Checkpoints(home)
    checkpoints.save_items(step, {"params": params}, {"model": config.to_dict(cfg), "stage": "a", **dict(meta)})
    checkpoints.close()
    return home


def random(cfg, seed=0):
    rng = np.random.default_rng(seed)
    drawn_by_name = {
        name: (rng.normal(size=shape) * 0.1).astype(DTYPES[cfg.param_dtype]) for name, _, shape in model.named_parameters(cfg)
    }
    return {name: w.astype(model.parameter_dtype(cfg, name)) for name, w in drawn_by_name.items()}


def stage(home, name, tokenizer=None):
    """What a stage of the tiny recipe leaves, but for its numbers: parameters split over devices, its meta, its tokenizer."""
    recipe = config.load([tiny_recipe.CONFIG])
    cfg = config.model_config(recipe, name)
    meta = {"stage": name, "recipe": config.to_dict(recipe), "data_fingerprint": "0"}
    named = random(cfg)
    save(home, cfg, named, meta, mesh(2, 4), step=4)
    if tokenizer:
        shutil.copytree(tokenizer.directory, home / "tokenizer")
    return cfg, named


def opened(home):
    """Our model of a published directory, and its arrays."""
    found = interop.open_huggingface(home)
    return found.cfg, {name: array.read() for name, array in found.tree.items()}


# --- the verbs ------------------------------------------------------------------------------------------------------


def import_(home, output):
    assert main(["import", f"--hf={home}", f"--output={output}"]) == 0
    return output


def export(home, output):
    assert main(["export", f"--checkpoint={home}", f"--output={output}"]) == 0
    return output


def stored(home):
    """A checkpoint's model and all of its arrays."""
    opened = checkpoint.open_lazy(home)
    return opened.cfg, {name: array.read() for name, array in opened.tree.items()}


def config_json(home):
    return json.loads((home / "config.json").read_text())


def fails(capsys, directory, *arguments, words=()):
    """One message on stderr, nothing else, and nothing in the directory is new, gone or changed."""
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 1
    found = capsys.readouterr()
    [line] = found.err.splitlines()
    assert found.out == "" and line.startswith("tanuki: ") and len(line) < 500
    assert all(word in line for word in words), line
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
