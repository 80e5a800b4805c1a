"""Hugging Face directories of Llama, Mistral and Mixtral models, read tensor by tensor: `config.json` and sharded safetensors.

A mixture's experts lie in one tensor for each matrix of each expert (as transformers writes Mixtral), or fused into one for all
experts of a layer (as newer modules hold them); both are read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tanuki_jax import config, files
from tanuki_jax.checkpoint import LazyArray, LazyCheckpoint
from tanuki_jax.errors import UserError

INDEX = "model.safetensors.index.json"
KINDS = ("llama", "mistral", "mixtral", "tanuki")  # of config.json; a Mistral without a window is a Llama
DENSE = ("llama", "mistral")
DTYPES = {"BF16": "bfloat16", "F32": "float32"}
UNSUPPORTED = {"F16": "float16", "F64": "float64"}  # which are cast on request
CAST = "`tanuki import --param_dtype=float32` (or bfloat16) casts all weights on request"
# What transformers takes where config.json is silent: the longest row, and Mistral's window, which then is no null.
LONGEST = {"llama": 2048, "mistral": 131_072, "mixtral": 131_072, "tanuki": 131_072}
WINDOW = {"mistral": 4096}


VECTOR = "D"  # axes of the scale of a norm, which is float32 here in any model


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
# Of one layer of a mixture: the router, beside single experts and beside fused ones, and expert E's matrices.
ROUTER, ROUTER_FUSED = Name("block_sparse_moe.gate.weight", "DE"), Name("mlp.gate.weight", "DE")
EXPERT = {
    "moe/gate": Name("block_sparse_moe.experts.{}.w1.weight", "DF"),
    "moe/up": Name("block_sparse_moe.experts.{}.w3.weight", "DF"),
    "moe/down": Name("block_sparse_moe.experts.{}.w2.weight", "FD"),
}
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"  # [E, 2F, D] and [E, D, F]
OUTER = {
    "embed/table": Name("model.embed_tokens.weight", "VD", False),
    "norm_final": Name("model.norm.weight", "D", False),
    "head": Name("lm_head.weight", "DV"),
}
# Keys of config.json that change the function computed, with the only value that is read here.
PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}


def is_huggingface(path: Path) -> bool:
    """Whether a directory is a published model rather than a checkpoint of ours."""
    return (Path(path) / "config.json").is_file()


def open_llama(path: Path) -> LazyCheckpoint:
    """A dense Llama directory as parameters that are read when asked for, in our names and layouts."""
    settings = _settings(Path(path))
    if settings.get("num_local_experts") or settings.get("model_type") == "mixtral":
        raise UserError(f"upcycle: {path} is a mixture already ({settings.get('model_type')}); give a dense model")
    return open_huggingface(path)


def open_huggingface(path: Path, param_dtype: str = "") -> LazyCheckpoint:
    """A Llama, Mistral, Mixtral or Tanuki directory as parameters that are read when asked for, in our names and layouts.

    Every tensor's name, shape and dtype is checked from the headers of the files before any weight is read.  The meta has what
    config.json and generation_config.json say, for the export.

    Args:
      param_dtype: what all weights are cast to as they are read; without it they must be of one dtype.
    """
    path = Path(path)
    settings = _settings(path)
    _check_kind(path, settings)
    weights = _Weights(path, param_dtype)
    outer = dict(OUTER)
    if settings.get("tie_word_embeddings") and not weights.has("lm_head.weight"):
        outer["head"] = Name("model.embed_tokens.weight", "DV")
    cfg = _model(path, settings, param_dtype or weights.dtype(outer["embed/table"].theirs))
    sizes = sizes_of(cfg)
    weights.dtype_of_all = cfg.param_dtype
    fused = weights.has(f"model.layers.0.{DOWN}")

    def ours(name: Name, array: np.ndarray) -> np.ndarray:
        """A published array in our layout."""
        shape = [sizes[axis] for axis in name.axes]
        array = (transpose(array) if name.transposed else np.ascontiguousarray(array)).reshape(shape)
        return array.astype(np.float32, copy=False) if name.axes == VECTOR else array

    def stored(name: Name, *before: int, read: Callable[..., np.ndarray]) -> LazyArray:
        dtype = "float32" if name.axes == VECTOR else cfg.param_dtype
        return LazyArray((*before, *(sizes[axis] for axis in name.axes)), dtype, read)

    def whole(name: Name) -> LazyArray:
        weights.expect(name.theirs, published_shape(name, sizes), name.axes == VECTOR)
        return stored(name, read=lambda: ours(name, weights.read(name.theirs)))

    def stacked(name: Name) -> LazyArray:
        names = [f"model.layers.{layer}.{name.theirs}" for layer in range(cfg.n_layers)]
        for theirs in names:
            weights.expect(theirs, published_shape(name, sizes), name.axes == VECTOR)

        def read(*layer: int) -> np.ndarray:
            return ours(name, weights.read(names[layer[0]])) if layer else np.stack([read(i) for i in range(cfg.n_layers)])

        return stored(name, cfg.n_layers, read=read)

    def experts(part: str, name: Name) -> LazyArray:
        E, F, D = cfg.n_experts, cfg.d_ff, cfg.d_model
        together, shape = (DOWN, (E, D, F)) if part == "moe/down" else (GATE_UP, (E, 2 * F, D))
        for layer in range(cfg.n_layers):
            for number in range(0 if fused else E):
                weights.expect(f"model.layers.{layer}.{name.theirs.format(number)}", published_shape(name, sizes))
            if fused:
                weights.expect(f"model.layers.{layer}.{together}", shape)
        rows = {"moe/down": slice(None), "moe/gate": slice(0, F), "moe/up": slice(F, 2 * F)}[part]

        def one(layer: int, number: int) -> np.ndarray:
            if fused:
                return ours(name, weights.read(f"model.layers.{layer}.{together}", (number, rows)))
            return ours(name, weights.read(f"model.layers.{layer}.{name.theirs.format(number)}"))

        def read(*at: int) -> np.ndarray:
            """One expert of a layer, the layer's, or all."""
            return one(*at) if len(at) == 2 else np.stack([read(*at, i) for i in range(E if at else cfg.n_layers)])

        return stored(name, cfg.n_layers, E, read=read)

    tree = {name: whole(where) for name, where in outer.items()}
    tree |= {f"layers/{n}": stacked(where) for n, where in LAYER.items() if not (cfg.n_experts and n.startswith("mlp/"))}
    if cfg.n_experts:
        tree["layers/moe/router"] = stacked(ROUTER_FUSED if fused else ROUTER)
        tree |= {f"layers/{part}": experts(part, name) for part, name in EXPERT.items()}
    weights.check_all_used()
    published = {"config": settings, "generation": _generation(path)}
    meta = {"huggingface": str(path), "longest": _longest(path, settings), "published": published}
    if weights.dtypes != {cfg.param_dtype}:
        meta["cast"] = sorted(weights.dtypes)
    return LazyCheckpoint(cfg, tree, meta, path)


def transpose(matrix: np.ndarray) -> np.ndarray:
    """A matrix the other way round, in its own memory; by XLA's CPU client, several times as fast as numpy."""
    bits = matrix.view(np.uint16) if matrix.dtype.itemsize == 2 else matrix
    return np.asarray(jax.device_put(bits.T, jax.devices("cpu")[0])).view(matrix.dtype)


def cast(array: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """An array in another dtype; an error, that begins with `where`, about a number that is too large for it."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        made = array.astype(dtype)
    if array.dtype.itemsize > 2 and (np.isinf(made) & np.isfinite(array)).any():
        largest = np.abs(array[np.isfinite(array)]).max()
        raise UserError(f"{where} has {largest:g}, which {dtype} cannot hold; cast to another --param_dtype")
    return made


def published_shape(name: Name, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of a tensor of ours in a published checkpoint: [out, in] for a matrix."""
    shape = [sizes[axis] for axis in name.axes]
    if not name.transposed:
        return tuple(shape)
    outward = name.axes[0] == "D"
    inner, outer = (shape[:1], shape[1:]) if outward else (shape[:-1], shape[-1:])
    return math.prod(outer), math.prod(inner)


def sizes_of(cfg: config.ModelConfig) -> dict[str, int]:
    """Length of every axis letter of a published matrix."""
    return {
        "V": cfg.vocab_size,
        "D": cfg.d_model,
        "F": cfg.d_ff,
        "N": cfg.n_heads,
        "K": cfg.n_kv_heads,
        "H": cfg.head_dim,
        "E": cfg.n_experts,
    }


def _settings(path: Path) -> dict[str, Any]:
    if not is_huggingface(path):
        raise UserError(f"{path} has no config.json; give the directory of a Hugging Face model")
    settings = files.read_json(path / "config.json")
    if not isinstance(settings, dict):
        raise UserError(f"{path}/config.json is not a dictionary of settings")
    return settings


def _generation(path: Path) -> dict[str, Any]:
    """What generation_config.json says, or nothing where there is none."""
    file = path / "generation_config.json"
    found = files.read_json(file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{file} is not a dictionary of settings")
    return found


def _longest(path: Path, settings: dict[str, Any]) -> int:
    """The longest row that the publisher names, in tokens."""
    found = settings.get("max_position_embeddings")
    if found is None:
        return LONGEST[settings["model_type"]]
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"{path}/config.json: max_position_embeddings is {found!r}; it must be a whole number above 0")
    return found


def _check_kind(path: Path, settings: dict[str, Any]) -> None:
    """An error that names what of a config.json is not supported."""
    kind = settings.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{path}: model_type is {kind!r}; {', '.join(KINDS)} are read")
    if settings.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantized; give a bfloat16 or float32 checkpoint")
    for key in ("rope_parameters", "rope_scaling"):
        rope = settings.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{path}/config.json: {key} is {rope!r}; it must be a dictionary")
        scaling = rope.get("rope_type", rope.get("type", "default"))
        if scaling != "default":
            raise UserError(f"{path}: {key} of type {scaling!r} is not supported; plain rotary positions are")
        if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
            raise UserError(f"{path}: {key} turns {rope['partial_rotary_factor']} of a head; all of it is supported")
    for name, value in PLAIN.items():
        if settings.get(name, value) not in (value, None):
            raise UserError(f"{path}: {name} {settings[name]!r} is not supported, {value!r} is")
    window = settings.get("sliding_window", WINDOW.get(kind))
    # Where no row is longer than the window, it changes nothing.
    if window is not None and (kind == "llama" or not isinstance(window, int) or window < _longest(path, settings)):
        raise UserError(
            f"{path}: sliding_window {window!r} is not supported, None is"
            + ("" if "sliding_window" in settings else "; a config.json without the key means that window")
        )


def _model(path: Path, settings: dict[str, Any], dtype: str) -> config.ModelConfig:
    """The model of a config.json, or an error that names the key whose value cannot be."""
    kind = settings["model_type"]
    rope = settings.get("rope_parameters") or {}

    def number(key: str, default: int = 0) -> int:
        value = settings.get(key) if settings.get(key) is not None else default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{path}/config.json: {key} is {settings.get(key)!r}; it must be a whole number above 0")
        return value

    def real(key: str, default: float, given: Any = None) -> float:
        value = given if given is not None else settings.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UserError(f"{path}/config.json: {key} is {value!r}; it must be a number above 0")
        return float(value)

    D, N, mixture = number("hidden_size"), number("num_attention_heads"), kind not in DENSE
    cfg = config.ModelConfig(
        vocab_size=number("vocab_size"),
        n_layers=number("num_hidden_layers"),
        d_model=D,
        d_ff=number("intermediate_size"),
        n_heads=N,
        n_kv_heads=number("num_key_value_heads", N if kind == "llama" else 8),
        head_dim=number("head_dim", D // N),
        rope_theta=real("rope_theta", 1e6 if mixture else 1e4, rope.get("rope_theta")),
        norm_eps=real("rms_norm_eps", 1e-5 if mixture else 1e-6),
        param_dtype=dtype,
        n_experts=number("num_local_experts") if mixture else 0,
        top_k=number("num_experts_per_tok") if mixture else 2,
        normalized_gate=kind != "mixtral",
        gate_scale=real("gate_scale", 1.0),
    )
    if N % cfg.n_kv_heads:
        raise UserError(f"{path}/config.json: num_attention_heads {N} is no multiple of num_key_value_heads {cfg.n_kv_heads}")
    if mixture and (cfg.top_k > cfg.n_experts or (cfg.normalized_gate and cfg.n_experts < 2)):
        raise UserError(
            f"{path}/config.json: num_experts_per_tok {cfg.top_k} of num_local_experts {cfg.n_experts}; a token visits at most "
            "all, and a normalised gate needs two"
        )
    return cfg


class _Weights:
    """The safetensors files of a directory; each tensor is read from the file that the index names."""

    def __init__(self, path: Path, cast: str = "") -> None:
        self.path, self._cast = path, cast
        self.dtype_of_all = ""  # once it is known
        self.dtypes: set[str] = set()  # of the matrices, as the files have them
        self._wanted: dict[str, str] = {}  # name -> what it is cast to
        self._used: set[str] = set()
        index = path / INDEX
        if index.is_file():
            found = files.read_json(index)
            named = found.get("weight_map") if isinstance(found, dict) else None
            if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
                raise UserError(f"{index} has no weight_map; is the download whole?")
            if outside := next((file for file in named.values() if file == ".." or Path(file).name != file), None):
                raise UserError(f"{index} names {outside!r}; weights must lie beside it")
            self._map: dict[str, str] = named
        elif (path / "model.safetensors").is_file():
            self._map = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            pickled = any(path.glob("*.bin")) or any(path.glob("*.pth"))
            fix = "is the download whole?" + " transformers' save_pretrained makes them of .bin files" * pickled
            raise UserError(f"{path} has neither model.safetensors nor {INDEX}; {fix}")

    def has(self, name: str) -> bool:
        return name in self._map

    def expect(self, name: str, shape: tuple[int, ...], vector: bool = False) -> None:
        """An error unless there is such a tensor, of this shape and of a dtype that is read; of a norm also float32."""
        found = list(self._locate(name).get_slice(name).get_shape())
        dtype, wanted = self.dtype(name), ("float32" if vector else "", self.dtype_of_all)
        if self.dtype_of_all and not self._cast and dtype not in wanted:
            raise UserError(
                f"{self.path}: {name} is {dtype}, the embedding {self.dtype_of_all}; weights of one dtype come as they are; "
                + CAST
            )
        if found != list(shape):
            raise UserError(f"{self.path}: {name} has shape {found}, where config.json asks for {list(shape)}")
        self._used.add(name)
        self._wanted[name] = "float32" if vector else self._cast
        if not vector:  # those of norms become float32, which holds every value of all but float64
            self.dtypes.add(dtype)

    def dtype(self, name: str) -> str:
        """That of a tensor; an error where it is not read, or not without a cast."""
        found = self._locate(name).get_slice(name).get_dtype()
        if found in UNSUPPORTED and not self._cast:
            raise UserError(f"{self.path}: {name} is {found}; bfloat16 and float32 are read as they are; {CAST}")
        if found not in DTYPES | UNSUPPORTED:
            raise UserError(f"{self.path}: {name} is {found}; bfloat16 and float32 are read")
        return (DTYPES | UNSUPPORTED)[found]

    def read(self, name: str, part: tuple[Any, ...] = ()) -> np.ndarray:
        opened = self._locate(name)
        array = opened.get_slice(name)[part] if part else opened.get_tensor(name)
        return cast(array, self._wanted.get(name) or self._cast, f"{self.path}: {name}") if self._cast else array

    def check_all_used(self) -> None:
        """An error where a tensor has no place in our model: a bias, an adapter."""
        left = sorted(n for n in self._map if n not in self._used and not n.endswith(".rotary_emb.inv_freq"))
        if left:
            raise UserError(f"{self.path}: tensor {left[0]} is not part of this architecture ({len(left)} such tensors)")

    def _locate(self, name: str) -> Any:
        """The open file of a tensor."""
        if name not in self._map:
            raise UserError(f"{self.path} has no tensor {name}; the checkpoint is not whole or of another architecture")
        if name not in self._names(self._map[name]):
            raise UserError(f"{self.path / self._map[name]} has no tensor {name}, though the index names it")
        return self._open(self._map[name])

    @functools.cache  # noqa: B019  # as long-lived as the files
    def _names(self, file: str) -> set[str]:
        return set(self._open(file).keys())

    @functools.lru_cache(maxsize=2)  # noqa: B019  # a mapped file counts as memory in use
    def _open(self, file: str) -> Any:
        import safetensors

        path = self.path / file
        if not path.is_file():
            raise UserError(f"{self.path} has no {file}, though the index names it; is the download whole?")
        try:
            return safetensors.safe_open(str(path), framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}; is the download whole?") from error
