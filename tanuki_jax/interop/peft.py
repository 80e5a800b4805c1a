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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tanuki_jax import checkpoint, config, files, model
from tanuki_jax.data.tokenizer import copy_tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tanuki_jax.interop.export import kind_of
from tanuki_jax.interop.huggingface import EXPERT, LAYER, ROUTER, ROUTER_FUSED

DTYPES = ("float32", "bfloat16", "float16")  # of which float32 holds every value
PREFIX, WEIGHTS, SETTINGS = "base_model.model.", "adapter_model.safetensors", "adapter_config.json"
FUSED, INNER = "mlp.experts", "mlp.experts.base_layer"  # of down, and of gate and up, which PEFT wraps first
RENAMED = {"w2": "down_proj", "gate": "gate.weight"}  # of a Mixtral's module, from transformers 4 to 5
# Keys of adapter_config.json that change the function computed, with the values that are read here.
PLAIN: dict[str, tuple[Any, ...]] = {
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
# Ways to begin that take something out of the base, which is not in the files.
IGNORED_KEYS = ("pissa", "olora", "corda", "loftq", "lora_ga")


# --- out ------------------------------------------------------------------------------------------------------------


def export_adapters(path: Path, output: Path, base_name: str = "") -> str:
    """Writes the adapters of a checkpoint as a PEFT directory and says what they are."""
    from safetensors.numpy import save_file

    found = checkpoint.load_adapters(path)
    kind = kind_of(found.cfg)
    flat = {name: _evenly(sides, scale_L) for name, sides, scale_L in model.lora.adapters({**found.params, **found.scales})}
    tensors: dict[str, np.ndarray] = {}
    names: dict[str, list[str]] = {}  # path of ours -> what PEFT calls its target
    experts = {
        name.removeprefix("layers/"): sides
        for name, (sides, _) in flat.items()
        if "/moe/" in name and not name.endswith("router")
    }
    if experts:
        _check_experts(found.ranks)
    for name, (sides, _) in flat.items():
        short = name.removeprefix("layers/")
        if short not in EXPERT:
            theirs = (LAYER | {"moe/router": ROUTER_FUSED if kind == "tanuki" else ROUTER})[short].theirs
            stem = theirs.removesuffix(".weight")
            if not (short == "moe/router" and kind == "tanuki"):
                names[name] = [stem.rsplit(".", 1)[-1]]
            for layer, (a, b) in enumerate(zip(*_sides(sides), strict=True)):
                tensors |= _pair(f"model.layers.{layer}.{stem}", a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1))
        elif kind == "mixtral":
            stem = EXPERT[short].theirs.removesuffix(".weight")
            names[name] = [stem.rsplit(".", 1)[-1]]
            for layer, of_layer in enumerate(zip(*_sides(sides), strict=True)):
                for number, (a, b) in enumerate(zip(*of_layer, strict=True)):
                    tensors |= _pair(f"model.layers.{layer}.{stem.format(number)}", a, b)
    if experts and kind == "tanuki":
        tensors |= _fused(experts)
    settings = _settings(found, kind, names, {name: scale for name, (_, scale) in flat.items()}, base_name)
    with lock.output(output), files.disk_errors(output), files.atomic_path(output) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / WEIGHTS, {"format": "pt", "base_fingerprint": found.meta["adapter"]["base_fingerprint"]})
        files.write_json(temporary / SETTINGS, settings)
    count = sum(t.size for t in tensors.values())
    return f"{output}: PEFT adapters of {found.base}; {count:,} parameters, {len(tensors)} tensors, exact"


def _evenly(sides: dict[str, Any], scale_L: Any) -> tuple[dict[str, np.ndarray], float]:
    """Adapters of one scale in all layers; where a layer's own is smaller, it goes into its B."""
    a, b, scale_L = (np.asarray(x) for x in (sides["a"], sides["b"], scale_L))
    largest = float(scale_L.max())
    shares = (scale_L / largest).astype(np.float32).reshape(-1, *(1,) * (b.ndim - 1))
    return {"a": a, "b": b if (shares == 1).all() else b * shares}, largest


def _sides(sides: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(sides["a"]), np.asarray(sides["b"])


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


def _fused(experts: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
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
        (gate_a, gate_b), (up_a, up_b) = (_sides(experts[f"moe/{part}"]) for part in ("gate", "up"))
        upper = np.concatenate([gate_b, np.zeros_like(gate_b)], axis=-1)
        lower = np.concatenate([np.zeros_like(up_b), up_b], axis=-1)
        b = np.concatenate([upper, lower], axis=-2)
        add(INNER if both else FUSED, np.concatenate([gate_a, up_a], axis=-1), b)
    if both:
        add(FUSED, *_sides(experts["moe/down"]))
    return tensors


def _settings(
    found: checkpoint.Adapters, kind: str, names: dict[str, list[str]], scales: dict[str, float], base_name: str
) -> dict[str, Any]:
    """adapter_config.json: the commonest rank and alpha, and patterns for the others."""
    ranks = {target: found.ranks[path] for path, targets in names.items() for target in targets}
    alphas = {target: scales[path] * found.ranks[path] for path, targets in names.items() for target in targets}
    parameters = {}
    if kind == "tanuki":
        theirs = (("gate", f"{FUSED}.gate_up_proj", 2), ("down", f"{FUSED}.down_proj", 1), ("router", ROUTER_FUSED.theirs, 1))
        for part, name, factor in theirs:
            path = f"layers/moe/{part}"
            if path in found.ranks:
                parameters[name] = factor * found.ranks[path]
                alphas[name] = scales[path] * factor * found.ranks[path]
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


def _commonest(values: dict[str, Any], kind: str) -> tuple[Any, dict[str, Any]]:
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

    home, step = checkpoint.locate(base)
    meta = checkpoint.read_meta(home, step)
    if "adapter" in meta:
        raise UserError(f"import: {base} holds adapters itself; give the checkpoint that they lie on, or export and import it")
    cfg, settings = config.read_model(meta), _read_settings(Path(path))
    try:
        with safetensors.safe_open(str(path / WEIGHTS), framework="numpy") as opened:
            told = (opened.metadata() or {}).get("base_fingerprint")
        tensors = safetensors.numpy.load_file(path / WEIGHTS)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path / WEIGHTS} cannot be read: {error}; is the download whole?") from error
    for name, array in tensors.items():
        if array.dtype.name not in DTYPES:
            raise UserError(f"{path / WEIGHTS}: {name} is {array.dtype.name}; {', '.join(DTYPES)} are read, and become float32")
    if told and told != files.fingerprint(meta):
        raise UserError(f"import: the adapters in {path} were trained on another model than {base}; give that one as --base")
    count = sum(t.size for t in tensors.values())
    ranks, params, scales = _ours(Path(path), cfg, settings, tensors)
    with lock.output(output), files.disk_errors(output), files.atomic_path(output) as temporary:
        told_of = checkpoint.adapters_meta(temporary, base, ranks, scales)
        new = {**meta, "stage": "import", "data_fingerprint": "", "id": uuid.uuid4().hex, "adapter": told_of}
        checkpoint.save_params(temporary, params, new)
        copy_tokenizer(home / "tokenizer", temporary / "tokenizer")
    return f"{output}: adapters on {base}; {count:,} parameters, exact"


def _read_settings(path: Path) -> dict[str, Any]:
    settings = files.read_json(path / SETTINGS)
    if not isinstance(settings, dict):
        raise UserError(f"{path / SETTINGS} is not a dictionary of settings")
    for key, values in PLAIN.items():
        if settings.get(key, values[0]) not in values:
            raise UserError(f"{path / SETTINGS}: {key} {settings[key]!r} is not supported, {values[0]!r} is")
    if str(settings.get("init_lora_weights")).startswith(IGNORED_KEYS):
        raise UserError(
            f"{path / SETTINGS}: init_lora_weights {settings['init_lora_weights']!r} is not supported, it changes the base; "
            "convert the adapters with PEFT's path_initial_model_for_weight_conversion"
        )
    return settings


def _ours(
    path: Path, cfg: config.ModelConfig, settings: dict[str, Any], tensors: dict[str, np.ndarray]
) -> tuple[dict[str, int], Any, dict[str, list[float]]]:
    """Ranks, parameters and scales in our layout; an error about any tensor that has no place in the model."""
    single = {name.theirs.removesuffix(".weight"): path for path, name in LAYER.items() if not path.startswith("norm")}
    single |= {name.theirs.removesuffix(".weight"): "moe/router" for name in (ROUTER, ROUTER_FUSED)}
    each = {re.escape(name.theirs.removesuffix(".weight")).replace(r"\{\}", r"(\d+)"): path for path, name in EXPERT.items()}
    # path of ours -> (layer, expert) -> A [in, r], B [r, out], scale
    found: dict[str, dict[tuple[int, ...], tuple[np.ndarray, np.ndarray, float]]] = {}
    for key in sorted(name for name in tensors if ".lora_A." in name):
        match = re.fullmatch(r"(?:base_model\.model\.)?(model\.layers\.(\d+)\.(.+))\.lora_A(?:\.default)?\.weight", key)
        other = key.replace(".lora_A.", ".lora_B.")
        if not match or other not in tensors:
            raise UserError(f"{path / WEIGHTS}: {key} has no place here, or no lora_B beside it")
        (module, layer, stem), a, b = match.groups(), tensors.pop(key).T, tensors.pop(other).T
        numbered = next(((ours, m) for pattern, ours in each.items() if (m := re.fullmatch(pattern, stem))), None)
        if stem in single:
            named = f"{module}.weight" if stem == ROUTER_FUSED.theirs.removesuffix(".weight") else module  # a parameter there
            found.setdefault(single[stem], {})[(int(layer),)] = (a, b, _scale(settings, named, a.shape[1]))
        elif numbered:
            ours, expert = numbered[0], int(numbered[1][1])
            found.setdefault(ours, {})[(int(layer), expert)] = (a, b, _scale(settings, module, a.shape[1]))
        elif stem in (FUSED, INNER) and cfg.n_experts and not a.shape[1] % cfg.n_experts:
            for ours, expert, sides in _apart(cfg, a, b, stem):
                name = "gate_up_proj" if ours != "moe/down" else "down_proj"
                scale = _scale(settings, f"{module.removesuffix('.base_layer')}.{name}", sides[0].shape[1])
                found.setdefault(ours, {})[(int(layer), expert)] = (*sides, scale)
        else:
            raise UserError(f"{path / WEIGHTS}: {key} adapts what cannot be adapted here; {', '.join(model.lora.SPLITS)} can")
    if tensors or not found:
        raise UserError(
            f"{path / WEIGHTS}: {next(iter(tensors), 'nothing')} is no adapter of a matrix; LoRA's A and B are read"
        )
    ranks = {f"layers/{name}": max(a.shape[1] for a, _, _ in parts.values()) for name, parts in found.items()}
    flat, scales = {}, {}
    for one in model.lora.targets(cfg, ranks):
        parts = found.pop(one.path.removeprefix("layers/"))
        inward, outward = np.zeros(one.a[1], np.float32), np.zeros(one.b[1], np.float32)
        scale_L = np.zeros(one.a[1][0])
        for at, (a, b, scale) in parts.items():
            rank = a.shape[1]
            try:
                inward[at][..., :rank] = a.reshape(*inward[at].shape[:-1], rank)
                outward[at][:rank] = b.reshape(rank, *outward[at].shape[1:])
            except (IndexError, ValueError) as error:
                raise UserError(
                    f"{path / WEIGHTS}: an adapter of {one.path} is {a.shape[0]} to {b.shape[1]} at {at}, which does not fit "
                    "the model of --base; is it another base's?"
                ) from error
            scale_L[at[0]] = scale
        flat[one.path], scales[one.path] = {"a": inward, "b": outward}, scale_L.tolist()
    if found:
        raise UserError(f"{path / WEIGHTS}: the model of --base has no {', '.join(found)}; the adapters are for another base")
    return ranks, {"lora": model.lora.to_tree(flat)}, scales


def _apart(
    cfg: config.ModelConfig, a: np.ndarray, b: np.ndarray, stem: str
) -> list[tuple[str, int, tuple[np.ndarray, np.ndarray]]]:
    """The adapters that a fused one holds: part, expert, and A [in, R], B [R, out] of each."""
    E, rank, F = cfg.n_experts, a.shape[1] // cfg.n_experts, cfg.expert_d_ff or cfg.d_ff
    a_EiR = a.reshape(-1, E, rank).transpose(1, 0, 2)
    b_ERo = b.reshape(rank, E, -1).transpose(1, 0, 2)
    if stem == FUSED and (a_EiR.shape[1], b_ERo.shape[2]) != (cfg.d_model, 2 * F):
        return [("moe/down", e, (a_EiR[e], b_ERo[e])) for e in range(E)]
    halves = (("moe/gate", slice(0, F)), ("moe/up", slice(F, None)))
    return [(part, e, (a_EiR[e], b_ERo[e][:, where])) for part, where in halves for e in range(E)]


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, by the patterns that PEFT looks up: a name, or a regular expression for its end."""
    told = _look_up(settings.get("rank_pattern") or {}, module, settings.get("r", 8))
    alpha = _look_up(settings.get("alpha_pattern") or {}, module, settings.get("lora_alpha", 8))
    if told != rank:  # a pattern may have been converted with the weights; the tensors are what is true
        alpha = alpha * rank / told
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def _look_up(patterns: dict[str, Any], module: str, default: Any) -> Any:
    fits: Callable[[str], Any] = lambda p: re.fullmatch(rf"(.*\.)?({p})", module)  # noqa: E731
    return next((value for pattern, value in patterns.items() if fits(pattern)), default)
