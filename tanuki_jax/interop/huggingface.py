"""Hugging Face directories of Llama models: `config.json` and sharded safetensors, read tensor by tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tanuki_jax import config, files
from tanuki_jax.checkpoint import Opened, Stored
from tanuki_jax.errors import UserError

DTYPES = {"BF16": "bfloat16", "F32": "float32"}


class Name(NamedTuple):
    """Where a parameter of ours lies in a published checkpoint, and its axes; a published matrix is [out, in]."""

    theirs: str
    axes: str
    transposed: bool = True


# Of one layer, under model.layers.N.
LAYER = {
    "attn/q": Name("self_attn.q_proj.weight", "DNH"),
    "attn/k": Name("self_attn.k_proj.weight", "DKH"),
    "attn/v": Name("self_attn.v_proj.weight", "DKH"),
    "attn/o": Name("self_attn.o_proj.weight", "NHD"),
    "norm_attn": Name("input_layernorm.weight", "D", False),
    "norm_mlp": Name("post_attention_layernorm.weight", "D", False),
    "mlp/gate": Name("mlp.gate_proj.weight", "DF"),
    "mlp/up": Name("mlp.up_proj.weight", "DF"),
    "mlp/down": Name("mlp.down_proj.weight", "FD"),
}
OUTER = {
    "embed/table": Name("model.embed_tokens.weight", "VD", False),
    "norm_final": Name("model.norm.weight", "D", False),
    "head": Name("lm_head.weight", "DV"),
}
# Keys of config.json that change the function computed, with the only value that is read here.
PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None, "sliding_window": None}


def is_huggingface(path: Path) -> bool:
    """Whether a directory is a published model rather than a checkpoint of ours."""
    return (Path(path) / "config.json").is_file()


def open_llama(path: Path) -> Opened:
    """A dense Llama directory as parameters that are read when asked for, in our names and layouts."""
    path = Path(path)
    settings = files.read_json(path / "config.json")
    weights = _Weights(path)
    head = "lm_head.weight"
    if settings.get("tie_word_embeddings") and not weights.has(head):
        outer = OUTER | {"head": Name("model.embed_tokens.weight", "DV")}
    else:
        outer = OUTER
    cfg = _model(path, settings, weights.dtype(outer["embed/table"].theirs))
    sizes = _sizes(cfg)

    def read(name: Name, layer: int | None) -> np.ndarray:
        theirs = name.theirs if layer is None else f"model.layers.{layer}.{name.theirs}"
        shape = tuple(sizes[axis] for axis in name.axes)
        array = weights.read(theirs)
        array = array.T if name.transposed else array
        if array.size != np.prod(shape):
            raise UserError(f"{path}: {theirs} has shape {list(array.shape)}, where config.json asks for {list(shape)}")
        return np.ascontiguousarray(array.reshape(shape))

    tree = {name: _stored(cfg, where, None, read) for name, where in outer.items()}
    tree |= {f"layers/{name}": _stored(cfg, where, cfg.n_layers, read) for name, where in LAYER.items()}
    for layer in range(cfg.n_layers):  # a missing tensor is said before hours of work
        for where in LAYER.values():
            weights.locate(f"model.layers.{layer}.{where.theirs}")
    for where in outer.values():
        weights.locate(where.theirs)
    return Opened(cfg, tree, {"huggingface": str(path)}, path)


def _stored(cfg: config.Model, name: Name, layers: int | None, read: Callable[..., np.ndarray]) -> Stored:
    sizes = _sizes(cfg)
    shape = tuple(sizes[axis] for axis in name.axes)
    whole = shape if layers is None else (layers, *shape)
    return Stored(whole, cfg.param_dtype, lambda layer=None: read(name, layer))


def _sizes(cfg: config.Model) -> dict[str, int]:
    return {
        "V": cfg.vocab_size,
        "D": cfg.d_model,
        "F": cfg.d_ff,
        "N": cfg.n_heads,
        "K": cfg.n_kv_heads,
        "H": cfg.head_dim,
    }


def _model(path: Path, settings: dict[str, Any], dtype: str) -> config.Model:
    """The model of a config.json, or an error that names what is not supported."""
    kind = settings.get("model_type")
    if kind == "mixtral" or settings.get("num_local_experts"):
        raise UserError(f"upcycle: {path} is a mixture already ({kind}); give a dense model")
    if kind != "llama":
        raise UserError(f"{path}: model_type is {kind!r}; dense models of type llama are read")
    rope = settings.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{path}: rope_type {rope['rope_type']!r} is not supported; plain rotary positions are")
    for name, value in PLAIN.items():
        if settings.get(name, value) not in (value, None):
            raise UserError(f"{path}: {name} {settings[name]!r} is not supported, {value!r} is")
    try:
        D, N = settings["hidden_size"], settings["num_attention_heads"]
        return config.Model(
            vocab_size=settings["vocab_size"],
            n_layers=settings["num_hidden_layers"],
            d_model=D,
            d_ff=settings["intermediate_size"],
            n_heads=N,
            n_kv_heads=settings.get("num_key_value_heads") or N,
            head_dim=settings.get("head_dim") or D // N,
            rope_theta=float(rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0),
            norm_eps=settings.get("rms_norm_eps", 1e-6),
            param_dtype=dtype,
        )
    except KeyError as error:
        raise UserError(f"{path}/config.json has no {error}") from error


class _Weights:
    """The safetensors files of a directory; each tensor is read from the file that the index names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index = path / "model.safetensors.index.json"
        if index.is_file():
            self._map: dict[str, str] = files.read_json(index)["weight_map"]
        elif (path / "model.safetensors").is_file():
            self._map = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise UserError(f"{path} has neither model.safetensors nor model.safetensors.index.json; is the download whole?")

    def has(self, name: str) -> bool:
        return name in self._map

    def locate(self, name: str) -> tuple[Any, str]:
        """The open file of a tensor, and the tensor's name."""
        if name not in self._map:
            raise UserError(f"{self.path} has no tensor {name}; the checkpoint is not whole or of another architecture")
        opened = self._open(self._map[name])
        if name not in self._names(self._map[name]):
            raise UserError(f"{self.path / self._map[name]} has no tensor {name}, though the index names it")
        return opened, name

    def dtype(self, name: str) -> str:
        opened, name = self.locate(name)
        found = opened.get_slice(name).get_dtype()
        if found not in DTYPES:
            raise UserError(f"{self.path}: {name} is {found}; bfloat16 and float32 are read")
        return DTYPES[found]

    def read(self, name: str) -> np.ndarray:
        opened, name = self.locate(name)
        return opened.get_tensor(name)

    @functools.cache  # noqa: B019  # as long-lived as the files
    def _names(self, file: str) -> set[str]:
        return set(self._open(file).keys())

    @functools.cache  # noqa: B019
    def _open(self, file: str) -> Any:
        import safetensors

        path = self.path / file
        if not path.is_file():
            raise UserError(f"{self.path} has no {file}, though the index names it; is the download whole?")
        try:
            return safetensors.safe_open(str(path), framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}; is the download whole?") from error
