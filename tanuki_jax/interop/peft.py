"""PEFT's adapters, in and out: `adapter_config.json` and `adapter_model.safetensors`.

A published A is [r, in] and B [out, r].  The experts of a Mixtral have adapters of their own each, `experts.E.w1` and so on,
as transformers 4 and vLLM name them and as PEFT converts them for transformers 5.  Where experts are one tensor (Tanuki's
class, and what PEFT itself writes since) one adapter holds those of gate and up: A is [E * R, D], expert by expert, and B
[2F, R * E], rank by rank, with R = 2r and B zero where gate would meet up.  Both are read.
"""

from __future__ import annotations

import collections
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from tanuki_jax import checkpoint, config, files, model
from tanuki_jax.data.tokenizer import copy_tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tanuki_jax.interop import layout
from tanuki_jax.interop.config_json import Settings, read_settings
from tanuki_jax.interop.export import kind_of
from tanuki_jax.interop.layout import EXPERT, LAYER, ROUTER, ROUTER_FUSED

DTYPES = ("float32", "bfloat16", "float16")  # of which float32 holds every value
PREFIX, WEIGHTS, SETTINGS = "base_model.model.", "adapter_model.safetensors", "adapter_config.json"
FUSED, INNER = "mlp.experts", "mlp.experts.base_layer"  # of down, and of gate and up, which PEFT wraps first
RENAMED = {"w2": "down_proj", "gate": "gate.weight"}  # of a Mixtral's module, from transformers 4 to 5
# Keys of adapter_config.json that change the function computed, with the values that are read here.
SUPPORTED_VALUES: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "layer_replication": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "arrow_config": (None,),
}
# Initialisations that take something out of the base, which is not in the files.
UNSUPPORTED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Sides(NamedTuple):
    """Both sides of the adapters of one path, stacked over layers: A [L, ..., r] and B [L, r, ...]."""

    a: np.ndarray
    b: np.ndarray


# --- out ------------------------------------------------------------------------------------------------------------


def export_adapters(path: Path, output: Path, base_name: str = "") -> str:
    """Writes the adapters of a checkpoint as a PEFT directory and says what they are."""
    from safetensors.numpy import save_file

    loaded = checkpoint.load_adapters(path)
    kind = kind_of(loaded.cfg)
    adapters, scales = {}, {}
    for matrix, arrays, scale_L in model.lora.adapters({**loaded.params, **loaded.scales}):
        adapters[matrix.removeprefix("layers/")], scales[matrix] = _with_one_scale(arrays, scale_L)
    experts = {name: sides for name, sides in adapters.items() if name in EXPERT}
    if experts:
        _check_experts(loaded.ranks)
    tensors: dict[str, np.ndarray] = {}
    names: dict[str, list[str]] = {}  # path of ours -> what PEFT calls its target
    for name, sides in adapters.items():
        if name not in EXPERT:
            stem = (LAYER | {"moe/router": ROUTER_FUSED if kind == "tanuki" else ROUTER})[name].stem
            if not (name == "moe/router" and kind == "tanuki"):
                names[f"layers/{name}"] = [stem.rsplit(".", 1)[-1]]
            for layer, (a, b) in enumerate(zip(*sides, strict=True)):
                tensors |= _pair(f"model.layers.{layer}.{stem}", a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1))
        elif kind == "mixtral":
            stem = EXPERT[name].stem
            names[f"layers/{name}"] = [stem.rsplit(".", 1)[-1]]
            for layer, of_layer in enumerate(zip(*sides, strict=True)):
                for number, (a, b) in enumerate(zip(*of_layer, strict=True)):
                    tensors |= _pair(f"model.layers.{layer}.{stem.format(number)}", a, b)
    if experts and kind == "tanuki":
        tensors |= _fused(experts)
    settings = _settings(loaded, kind, names, scales, base_name)
    metadata = {"format": "pt", "base_fingerprint": loaded.meta["adapter"]["base_fingerprint"]}
    with lock.output(output), files.disk_errors(output), files.atomic_path(output) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / WEIGHTS, metadata)
        files.write_json(temporary / SETTINGS, settings)
    count = sum(t.size for t in tensors.values())
    return f"{output}: PEFT adapters of {loaded.base}; {count:,} parameters, {len(tensors)} tensors, exact"


def _with_one_scale(sides: Mapping[str, jax.Array], scale_L: jax.Array) -> tuple[Sides, float]:
    """Adapters of one scale in all layers; where a layer's scale is smaller, its B makes up for it."""
    a, b, scales = (np.asarray(x) for x in (sides["a"], sides["b"], scale_L))
    largest = float(scales.max())
    shares = (scales / largest).astype(np.float32).reshape(-1, *(1,) * (b.ndim - 1))
    return Sides(a, b if (shares == 1).all() else b * shares), largest


def _pair(stem: str, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Both tensors of a matrix, from A [in, r] and B [r, out]."""
    return {f"{PREFIX}{stem}.lora_{side}.weight": np.ascontiguousarray(w.T) for side, w in (("A", a), ("B", b))}


def _check_experts(ranks: dict[str, int]) -> None:
    """PEFT fuses gate and up, so both must be there, alike."""
    gate, up = (ranks.get(f"layers/moe/{part}") for part in ("gate", "up"))
    if gate != up:
        raise UserError(
            f"export: the adapters of moe/gate and moe/up have ranks {gate or 'none'} and {up or 'none'}; PEFT holds both in "
            "one, so they must be equal; merge them into the weights with --format=hf"
        )


def _fused(experts: Mapping[str, Sides]) -> dict[str, np.ndarray]:
    """Tensors of all layers where the experts are one parameter: gate and up side by side, then down."""
    tensors: dict[str, np.ndarray] = {}

    def add(stem: str, a_LEir: np.ndarray, b_LEro: np.ndarray) -> None:
        for layer, (a_Eir, b_Ero) in enumerate(zip(a_LEir, b_LEro, strict=True)):
            a = a_Eir.swapaxes(1, 2).reshape(-1, a_Eir.shape[1])  # [E * r, in]
            b = b_Ero.transpose(2, 1, 0).reshape(b_Ero.shape[2], -1)  # [out, r * E]
            sides = (("A", a), ("B", b))
            tensors.update({f"{PREFIX}model.layers.{layer}.{stem}.lora_{s}.weight": np.ascontiguousarray(w) for s, w in sides})

    both = "moe/down" in experts
    if "moe/gate" in experts:
        (gate_a, gate_b), (up_a, up_b) = experts["moe/gate"], experts["moe/up"]
        upper = np.concatenate([gate_b, np.zeros_like(gate_b)], axis=-1)
        lower = np.concatenate([np.zeros_like(up_b), up_b], axis=-1)
        b = np.concatenate([upper, lower], axis=-2)
        add(INNER if both else FUSED, np.concatenate([gate_a, up_a], axis=-1), b)
    if both:
        add(FUSED, *experts["moe/down"])
    return tensors


def _settings(
    loaded: checkpoint.Adapters, kind: str, names: dict[str, list[str]], scales: dict[str, float], base_name: str
) -> Settings:
    """adapter_config.json: the commonest rank and alpha, and patterns for the others."""
    ranks: dict[str, float] = {target: loaded.ranks[path] for path, targets in names.items() for target in targets}
    alphas = {target: scales[path] * loaded.ranks[path] for path, targets in names.items() for target in targets}
    parameters: dict[str, float] = {}
    if kind == "tanuki":
        theirs = (("gate", f"{FUSED}.gate_up_proj", 2), ("down", f"{FUSED}.down_proj", 1), ("router", ROUTER_FUSED.theirs, 1))
        for part, name, factor in theirs:
            path = f"layers/moe/{part}"
            if path in loaded.ranks:
                parameters[name] = factor * loaded.ranks[path]
                alphas[name] = scales[path] * factor * loaded.ranks[path]
    ranks |= parameters
    # PEFT's conversion of a Mixtral takes r for the rank of w1 and w3, and looks others up by their new names too.
    rank, ranks = _commonest(ranks, kind)
    alpha, alphas = _commonest(alphas, kind)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": sorted({target for targets in names.values() for target in targets}),
        "target_parameters": list(parameters) or None,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _commonest(values: dict[str, float], kind: str) -> tuple[float, dict[str, float]]:
    """The value that most targets have (w1, where there is one), and the names of those that have another."""
    first = values["w1"] if "w1" in values else collections.Counter(values.values()).most_common(1)[0][0]
    if kind == "mixtral":
        values = values | {new: values[old] for old, new in RENAMED.items() if old in values}
    return first, {name: value for name, value in values.items() if value != first}


# --- in -------------------------------------------------------------------------------------------------------------


def is_peft(path: Path) -> bool:
    """Whether a directory holds PEFT's adapters."""
    return (Path(path) / SETTINGS).is_file()


def import_adapters(path: Path, base: Path, output: Path) -> str:
    """Writes PEFT's adapters as step 0 of a stage of adapters on `base`, a checkpoint of ours, and says what they are."""
    import safetensors.numpy

    path = Path(path)
    base_stage, step = checkpoint.locate(base)
    meta = checkpoint.read_meta(base_stage, step)
    if "adapter" in meta:
        raise UserError(f"import: {base} holds adapters itself; give the checkpoint that they lie on, or export and import it")
    cfg, settings = config.read_model(meta), _read_settings(path)
    try:
        with safetensors.safe_open(str(path / WEIGHTS), framework="numpy") as opened:
            base_fingerprint = (opened.metadata() or {}).get("base_fingerprint")
        tensors = safetensors.numpy.load_file(path / WEIGHTS)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path / WEIGHTS} cannot be read: {error}; is the download whole?") from error
    for name, array in tensors.items():
        if array.dtype.name not in DTYPES:
            raise UserError(f"{path / WEIGHTS}: {name} is {array.dtype.name}; {', '.join(DTYPES)} are read, and become float32")
    if base_fingerprint and base_fingerprint != files.fingerprint(meta):
        raise UserError(f"import: the adapters in {path} were trained on another model than {base}; give that one as --base")
    count = sum(t.size for t in tensors.values())
    ranks, params, scales = _stack(path, cfg, _by_matrix(path, cfg, settings, tensors))
    with lock.output(output), files.disk_errors(output), files.atomic_path(output) as temporary:
        adapter = checkpoint.adapters_meta(temporary, base, ranks, scales)
        adapters_meta: checkpoint.Meta = {
            **meta,
            "stage": "import",
            "data_fingerprint": "",
            "id": uuid.uuid4().hex,
            "adapter": adapter,
        }
        checkpoint.save_params(temporary, params, adapters_meta)
        copy_tokenizer(base_stage / "tokenizer", temporary / "tokenizer")
    return f"{output}: adapters on {base}; {count:,} parameters, exact"


def _read_settings(path: Path) -> Settings:
    settings = read_settings(path / SETTINGS)
    for key, values in SUPPORTED_VALUES.items():
        if settings.get(key, values[0]) not in values:
            raise UserError(f"{path / SETTINGS}: {key} {settings[key]!r} is not supported, {values[0]!r} is")
    if str(settings.get("init_lora_weights")).startswith(UNSUPPORTED_INITS):
        raise UserError(
            f"{path / SETTINGS}: init_lora_weights {settings['init_lora_weights']!r} is not supported, it changes the base; "
            "convert the adapters with PEFT's path_initial_model_for_weight_conversion"
        )
    return settings


class Adapter(NamedTuple):
    """The adapter of one matrix: A [in, r], B [r, out]."""

    a: np.ndarray
    b: np.ndarray
    scale: float


ByMatrix = dict[str, dict[tuple[int, ...], Adapter]]  # path of ours -> (layer,) or (layer, expert) -> adapter


def _by_matrix(path: Path, cfg: config.ModelConfig, settings: Settings, tensors: dict[str, np.ndarray]) -> ByMatrix:
    """The adapters by the matrices that they adapt; an error about any tensor that has no place in the model."""
    single = {name.stem: ours for ours, name in LAYER.items() if not ours.startswith("norm")}
    single |= {name.stem: "moe/router" for name in (ROUTER, ROUTER_FUSED)}
    adapters: ByMatrix = collections.defaultdict(dict)
    for key in sorted(name for name in tensors if ".lora_A." in name):
        match = re.fullmatch(r"(?:base_model\.model\.)?(model\.layers\.(\d+)\.(.+))\.lora_A(?:\.default)?\.weight", key)
        other = key.replace(".lora_A.", ".lora_B.")
        if not match or other not in tensors:
            raise UserError(f"{path / WEIGHTS}: {key} has no place here, or no lora_B beside it")
        (module, layer, stem), a, b = match.groups(), tensors.pop(key).T, tensors.pop(other).T
        expert = _match_expert(stem)
        if stem in single:
            named = f"{module}.weight" if stem == ROUTER_FUSED.stem else module  # a parameter there
            adapters[single[stem]][(int(layer),)] = Adapter(a, b, _scale(settings, named, a.shape[1]))
        elif expert:
            ours, number = expert
            adapters[ours][(int(layer), number)] = Adapter(a, b, _scale(settings, module, a.shape[1]))
        elif stem in (FUSED, INNER) and cfg.n_experts and not a.shape[1] % cfg.n_experts:
            for ours, number, (expert_a, expert_b) in _split_fused(cfg, a, b, stem):
                name = "gate_up_proj" if ours != "moe/down" else "down_proj"
                scale = _scale(settings, f"{module.removesuffix('.base_layer')}.{name}", expert_a.shape[1])
                adapters[ours][(int(layer), number)] = Adapter(expert_a, expert_b, scale)
        else:
            raise UserError(f"{path / WEIGHTS}: {key} adapts what cannot be adapted here; {', '.join(model.lora.SPLITS)} can")
    if tensors or not adapters:
        raise UserError(
            f"{path / WEIGHTS}: {next(iter(tensors), 'nothing')} is no adapter of a matrix; LoRA's A and B are read"
        )
    return adapters


def _match_expert(stem: str) -> tuple[str, int] | None:
    """The path of ours and the number of the expert whose module has this name, if any."""
    for ours, name in EXPERT.items():
        match = re.fullmatch(re.escape(name.stem).replace(r"\{\}", r"(\d+)"), stem)
        if match:
            return ours, int(match[1])
    return None


def _stack(
    path: Path, cfg: config.ModelConfig, adapters: ByMatrix
) -> tuple[dict[str, int], dict[str, object], dict[str, list[float]]]:
    """Ranks, parameters and scales in our layout: one rank per path, smaller ones padded with zeros."""
    ranks = {f"layers/{name}": max(a.shape[1] for a, _, _ in parts.values()) for name, parts in adapters.items()}
    flat, scales, unused = {}, {}, set(ranks)
    for target in model.lora.targets(cfg, ranks):
        unused.remove(target.path)
        stacked_a, stacked_b = np.zeros(target.a[1], np.float32), np.zeros(target.b[1], np.float32)
        scale_L = np.zeros(target.a[1][0])
        for at, (a, b, scale) in adapters[target.path.removeprefix("layers/")].items():
            rank = a.shape[1]
            try:
                stacked_a[at][..., :rank] = a.reshape(*stacked_a[at].shape[:-1], rank)
                stacked_b[at][:rank] = b.reshape(rank, *stacked_b[at].shape[1:])
            except (IndexError, ValueError) as error:
                raise UserError(
                    f"{path / WEIGHTS}: an adapter of {target.path} is {a.shape[0]} to {b.shape[1]} at {at}, which does not "
                    "fit the model of --base; is it another base's?"
                ) from error
            scale_L[at[0]] = scale
        flat[target.path], scales[target.path] = {"a": stacked_a, "b": stacked_b}, scale_L.tolist()
    if unused:
        names = ", ".join(name for name in adapters if f"layers/{name}" in unused)
        raise UserError(f"{path / WEIGHTS}: the model of --base has no {names}; the adapters are for another base")
    return ranks, {"lora": model.lora.to_tree(flat)}, scales


def _split_fused(cfg: config.ModelConfig, a: np.ndarray, b: np.ndarray, stem: str) -> Iterator[tuple[str, int, Sides]]:
    """The adapters that a fused one holds: path of ours, number of the expert, and A [in, R], B [R, out]."""
    E, rank, F = cfg.n_experts, a.shape[1] // cfg.n_experts, layout.axis_sizes(cfg)["F"]
    a_EiR = a.reshape(-1, E, rank).transpose(1, 0, 2)
    b_ERo = b.reshape(rank, E, -1).transpose(1, 0, 2)
    parts = [("moe/gate", slice(0, F)), ("moe/up", slice(F, None))]
    if stem == FUSED and (a_EiR.shape[1], b_ERo.shape[2]) != (cfg.d_model, 2 * F):
        parts = [("moe/down", slice(None))]
    for ours, rows in parts:
        for number in range(E):
            yield ours, number, Sides(a_EiR[number], b_ERo[number][:, rows])


def _scale(settings: Settings, module: str, rank: int) -> float:
    """alpha / r, by the patterns that PEFT looks up: a name, or a regular expression for its end."""
    declared = _look_up(settings, "r", "rank_pattern", module)
    alpha = _look_up(settings, "lora_alpha", "alpha_pattern", module)
    if declared != rank:  # a pattern may have been converted with the weights; the tensors are what is true
        alpha = alpha * rank / declared
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def _look_up(settings: Settings, key: str, patterns_key: str, module: str) -> float:
    """The value of the first pattern that fits a module, else that of the key itself, else PEFT's default."""
    patterns, value = settings.get(patterns_key), settings.get(key, 8)
    if isinstance(patterns, dict):
        value = next((v for pattern, v in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), value)
    if not isinstance(value, int | float):
        raise UserError(f"{SETTINGS}: {key} of {module} is {value!r}; it must be a number")
    return value
