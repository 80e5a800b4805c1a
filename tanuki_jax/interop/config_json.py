"""The config.json and generation_config.json of a published model, as far as they are read here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeAlias

from tanuki_jax import config, files
from tanuki_jax.errors import UserError

Settings: TypeAlias = dict[str, object]  # of a JSON file

KINDS = ("llama", "mistral", "mixtral", "tanuki")  # of config.json; a Mistral without a window is a Llama
DENSE = ("llama", "mistral")
# What transformers takes where config.json is silent: the longest row, and Mistral's window, which then is no null.
LONGEST = {"llama": 2048, "mistral": 131_072, "mixtral": 131_072, "tanuki": 131_072}
WINDOW = {"mistral": 4096}
# Keys of config.json that change the function computed, with the only value that is read here.
SUPPORTED_VALUES: Settings = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}


def is_huggingface(path: Path) -> bool:
    """Whether a directory is a published model rather than a checkpoint of ours."""
    return (Path(path) / "config.json").is_file()


def read_settings(file: Path) -> Settings:
    """A JSON file that holds a dictionary."""
    settings = files.read_json(file)
    if not isinstance(settings, dict):
        raise UserError(f"{file} is not a dictionary of settings")
    return settings


def read_config(path: Path) -> Settings:
    """The config.json of a directory."""
    if not is_huggingface(path):
        raise UserError(f"{path} has no config.json; give the directory of a Hugging Face model")
    return read_settings(path / "config.json")


def read_generation(path: Path) -> Settings:
    """The generation_config.json of a directory, empty where there is none."""
    file = path / "generation_config.json"
    return read_settings(file) if file.is_file() else {}


def longest_row(path: Path, settings: Settings) -> int:
    """The longest row that the publisher names, in tokens."""
    longest = settings.get("max_position_embeddings")
    if longest is None:
        return LONGEST[str(settings["model_type"])]
    if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
        raise UserError(f"{path}/config.json: max_position_embeddings is {longest!r}; it must be a whole number above 0")
    return longest


def check_supported(path: Path, settings: Settings) -> None:
    """An error that names what of a config.json is not supported."""
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
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
    for name, value in SUPPORTED_VALUES.items():
        if settings.get(name, value) not in (value, None):
            raise UserError(f"{path}: {name} {settings[name]!r} is not supported, {value!r} is")
    window = settings.get("sliding_window", WINDOW.get(kind))
    # Where no row is longer than the window, it changes nothing.
    if window is not None and (kind == "llama" or not isinstance(window, int) or window < longest_row(path, settings)):
        raise UserError(
            f"{path}: sliding_window {window!r} is not supported, None is"
            + ("" if "sliding_window" in settings else "; a config.json without the key means that window")
        )


def model_config(path: Path, settings: Settings, dtype: str) -> config.ModelConfig:
    """The model of a config.json that `check_supported` accepts; an error names a key whose value is not valid."""
    kind = str(settings["model_type"])
    rope = settings.get("rope_parameters")
    rope_theta = rope.get("rope_theta") if isinstance(rope, dict) else None

    def whole(key: str, default: int = 0) -> int:
        value = settings.get(key) if settings.get(key) is not None else default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{path}/config.json: {key} is {settings.get(key)!r}; it must be a whole number above 0")
        return value

    def real(key: str, default: float, value: object = None) -> float:
        value = value if value is not None else settings.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UserError(f"{path}/config.json: {key} is {value!r}; it must be a number above 0")
        return float(value)

    D, N, moe = whole("hidden_size"), whole("num_attention_heads"), kind not in DENSE
    cfg = config.ModelConfig(
        vocab_size=whole("vocab_size"),
        n_layers=whole("num_hidden_layers"),
        d_model=D,
        d_ff=whole("intermediate_size"),
        n_heads=N,
        n_kv_heads=whole("num_key_value_heads", N if kind == "llama" else 8),
        head_dim=whole("head_dim", D // N),
        rope_theta=real("rope_theta", 1e6 if moe else 1e4, rope_theta),
        norm_eps=real("rms_norm_eps", 1e-5 if moe else 1e-6),
        param_dtype=dtype,
        n_experts=whole("num_local_experts") if moe else 0,
        top_k=whole("num_experts_per_tok") if moe else 2,
        normalized_gate=kind != "mixtral",
        gate_scale=real("gate_scale", 1.0),
    )
    if N % cfg.n_kv_heads:
        raise UserError(f"{path}/config.json: num_attention_heads {N} is no multiple of num_key_value_heads {cfg.n_kv_heads}")
    if moe and (cfg.top_k > cfg.n_experts or (cfg.normalized_gate and cfg.n_experts < 2)):
        raise UserError(
            f"{path}/config.json: num_experts_per_tok {cfg.top_k} of num_local_experts {cfg.n_experts}; a token visits at most "
            "all, and a normalised gate needs two"
        )
    return cfg
