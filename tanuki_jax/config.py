"""The schema of every config: typed defaults, one documentation line per key, validation with the fix in the message.

A config file in `configs/` defines `get_config()` and returns an `ml_collections.ConfigDict` made by `recipe()` and
`stage()` below, so that every key exists, has its type, and can be overridden as `--config.a.b=value`.  `resolve`
turns it into the frozen dataclasses that the rest of the package reads.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_flags

from tanuki_jax.errors import UserError


def key(default: Any, doc: str) -> Any:
    """A config key: its default (a dict or class means a fresh one each time) and its documentation."""
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Model:
    """Shape of the transformer and how it is computed.  Letters as in every docstring: V D L N K H F E."""

    vocab_size: int = key(65_024, "V: rows of the embedding; the tokenizer's pieces padded to a multiple of 128")
    n_layers: int = key(32, "L")
    d_model: int = key(4096, "D: width of the residual stream")
    d_ff: int = key(14_336, "F: inner width of the SwiGLU block, and of each expert")
    n_heads: int = key(32, "N: query heads")
    n_kv_heads: int = key(8, "K: key and value heads, shared by N/K query heads each")
    head_dim: int = key(128, "H")
    rope_theta: float = key(10_000.0, "base of the rotary position encoding; a stage may set its own")
    norm_eps: float = key(1e-5, "epsilon of RMSNorm")
    init_std: float = key(0.008, "standard deviation of the initial weights; residual outputs are divided by sqrt(2L)")
    n_experts: int = key(0, "E: experts per block of the mixture; 0 where there is none (dense stages ignore it)")
    top_k: int = key(2, "experts that a token visits")
    normalized_gate: bool = key(True, "router logits are z-scored over experts (Tanuki, Skywork-MoE) or plain (Mixtral)")
    param_dtype: str = key("float32", "dtype of the stored parameters")
    dtype: str = key("auto", "dtype of matrix products: float32, bfloat16, or auto (bfloat16 except on CPU)")
    capacity_factor: float = key(0.0, "room of an expert relative to an even load, tokens beyond it are dropped; 0 = dropless")
    attention: str = key("auto", "auto (by platform), splash (TPU), cudnn (GPU), xla or reference")
    experts: str = key("auto", "auto (by platform), pallas (TPU), megablox (TPU), ragged, blocked, padded or reference")
    remat: str = key(
        "none", "kept for the backward pass: none = everything, dots = matrix products, attention, ffn, full = nothing, offload"
    )
    unroll: int = key(1, "blocks that one pass of the compiled loop over layers holds")
    logits_chunk: int = key(512, "most positions of a row whose float32 logits exist at one time")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh; their product is the number of devices."""

    slices: int = key(1, "TPU slices joined by the data-centre network; each holds whole replicas")
    data: int = key(1, "replicas of the model in a slice")
    fsdp: int = key(-1, "devices that share one replica's parameters; -1 = all that are left")
    expert: int = key(1, "devices that share the experts; tokens travel to them by all-to-all")
    context: int = key(1, "devices that share the tokens of a row")
    tensor: int = key(1, "devices that share heads, F and vocabulary")


@dataclass(frozen=True)
class Tokenizer:
    """An existing tokenizer, or how to train one."""

    path: str = key("", "directory with tokenizer.json; empty = train one as below")
    vocab_size: int = key(65_000, "pieces, special tokens and the 256 bytes included")
    sources: tuple[str, ...] = key((), "names in `data` to train on; empty = all")
    character_coverage: float = key(0.9995, "share of characters that get a piece; the rest is spelt in bytes")
    max_bytes: int = key(1_000_000_000, "text read of each source, in UTF-8 bytes; what is left out is reported")


@dataclass(frozen=True)
class Rules:
    """How many rows of rule-made data to make for the `rules:` sources (synth/rules.py)."""

    documents: int = key(40_000, "documents per language")
    dialogues: int = key(60_000, "dialogues per language")
    pairs: int = key(8_000, "preference pairs")


@dataclass(frozen=True)
class Scoring:
    """Held-out rule-made prompts answered after every stage."""

    prompts: int = key(0, "held-out prompts per stage; 0 = no scoring")
    pairs: int = key(0, "held-out preference pairs per stage")
    max_new_tokens: int = key(48, "longest answer")
    batch_size: int = key(256, "prompts decoded together")


@dataclass(frozen=True)
class Optimizer:
    """AdamW with decoupled weight decay on matrices (not on norms), global-norm clipping and a schedule with a floor."""

    learning_rate: float = key(1e-4, "peak")
    learning_rate_floor: float = key(0.0, "final value of the schedule")
    schedule: str = key("cosine", "cosine, wsd (warm-up, stable, linear decay) or constant")
    warmup_steps: int = key(0, "steps of linear warm-up from 0")
    warmup_ratio: float = key(0.0, "the same as a share of the stage's steps, where warmup_steps is 0")
    decay_steps: int = key(
        0, "cosine: step at which the floor is reached; wsd: length of the decay; 0 = stage's end; a tenth of it"
    )
    schedule_start: int = key(0, "step of the schedule at which the stage begins, where it goes on with an earlier stage's")
    beta1: float = key(0.9, "decay of Adam's first moment")
    beta2: float = key(0.95, "decay of Adam's second moment")
    eps: float = key(1e-8, "Adam's epsilon")
    moment_dtype: str = key("float32", "dtype in which both moments are stored; they are computed in float32")
    weight_decay: float = key(0.1, "decoupled decay, multiplied by the learning rate")
    clip_norm: float = key(1.0, "largest global gradient norm; 0 = no clipping")


@dataclass(frozen=True)
class Loss:
    """What is added to, or replaces, the token cross entropy."""

    z_loss: float = key(0.0, "coefficient of (log Z)^2 of the output softmax")
    router_aux_loss: float = key(0.02, "coefficient of the Switch load-balancing loss, mixture only")
    router_z_loss: float = key(0.0, "coefficient of (logsumexp of the router logits)^2, mixture only")
    beta: float = key(0.1, "DPO: strength of the tie to the reference model")
    label_smoothing: float = key(0.0, "DPO: probability that a preference label is wrong (cDPO)")


@dataclass(frozen=True)
class Upcycle:
    """How a dense model becomes a mixture."""

    strategy: str = key("noise", "copy: experts equal the dense FFN; noise: plus N(0, noise_std) on its weights (Tanuki)")
    noise_std: float = key(1e-3, "absolute standard deviation of the noise")
    router_std: float = key(0.02, "standard deviation of the fresh router (Tanuki drew N(0, 1))")


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.  Stages run in the order that `init_from` gives."""

    kind: str = key("pretrain", "pretrain, upcycle, sft or dpo")
    init_from: str = key("", "an earlier stage, a checkpoint directory, or empty: random weights")
    carry: str = key("params", "what is taken from init_from: params, or all (Adam's moments too)")
    mixture_of_experts: bool = key(
        False, "a stage that starts from random weights or from a checkpoint directory: whether that is a mixture"
    )
    mixture: dict[str, tuple[float, ...]] = key(dict, "name in `data` -> its weight in each phase of the stage")
    mixture_starts: tuple[int, ...] = key((0,), "tokens after which each phase of the mixture begins")
    seq_len: int = key(2048, "S: tokens of a row")
    batch_size: int = key(256, "B: rows of a global batch")
    microbatches: int = key(1, "parts of the batch that are computed one after another (gradient accumulation)")
    steps: int = key(0, "budget in optimizer steps; set exactly one of steps, tokens, epochs")
    tokens: int = key(0, "budget in tokens, B*S per step")
    epochs: float = key(0.0, "budget in passes over the packed rows (sft and dpo)")
    reset_attention: bool = key(True, "attention and positions start anew at each document (Tanuki's pretraining: no)")
    rope_theta: float = key(0.0, "RoPE base of this stage; 0 = the model's")
    optimizer: Optimizer = key(Optimizer, "AdamW and its schedule")
    loss: Loss = key(Loss, "loss options")
    upcycle: Upcycle = key(Upcycle, "kind upcycle only")
    save_every: int = key(500, "steps between checkpoints; the last step is always saved")
    keep: int = key(1, "newest checkpoints kept")
    log_every: int = key(10, "steps between lines of metrics.jsonl")


@dataclass(frozen=True)
class Recipe:
    """Everything: model, data and the stages of one run."""

    name: str = key("", "title of the report")
    seed: int = key(0, "root of every random choice")
    model: Model = key(Model, "shape of the transformer")
    mesh: Mesh = key(Mesh, "devices")
    tokenizer: Tokenizer = key(Tokenizer, "text to ids")
    data: dict[str, str] = key(dict, "source name -> comma-separated globs of .txt, .jsonl or .jsonl.gz files, or rules:NAME")
    rules: Rules = key(Rules, "amount of rule-made data")
    stages: dict[str, Stage] = key(dict, "stage name -> stage")
    scoring: Scoring = key(Scoring, "held-out prompts answered after every stage")
    tensorboard: bool = key(True, "write TensorBoard files beside metrics.jsonl")


CHOICES = {
    "kind": ("pretrain", "upcycle", "sft", "dpo"),
    "carry": ("params", "all"),
    "schedule": ("cosine", "wsd", "constant"),
    "strategy": ("copy", "noise"),
    "dtype": ("auto", "float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "attention", "ffn", "full", "offload"),
    "attention": ("auto", "splash", "cudnn", "xla", "reference"),
    "experts": ("auto", "pallas", "megablox", "ragged", "blocked", "padded", "reference"),
    "moment_dtype": ("float32", "bfloat16"),
}
# Keys that may differ between two runs of one workdir: they change neither the data nor the weights.
COMPUTED = ("mesh", "remat", "unroll", "logits_chunk", "attention", "experts", "microbatches")
RESUMABLE = (*COMPUTED, "tensorboard", "save_every", "keep", "log_every")


# --- making a config ------------------------------------------------------------------------------------------------


def defaults(schema: Any) -> ConfigDict:
    """The schema's defaults as a ConfigDict (nested dataclasses become nested ConfigDicts)."""
    return ConfigDict(to_dict(schema()))


def recipe(**overrides: Any) -> ConfigDict:
    """A recipe with every key at its default, then `overrides` (values, or dicts for nested keys)."""
    return _override(defaults(Recipe), overrides)


def stage(kind: str, **overrides: Any) -> ConfigDict:
    """A stage with every key at its default, then `overrides`."""
    return _override(defaults(Stage), {"kind": kind, **overrides})


def _override(config: ConfigDict, values: Mapping[str, Any], path: str = "") -> ConfigDict:
    free = path in ("mixture", "data", "stages")  # dictionaries of the user's own names
    for name, value in values.items():
        if not free and name not in config:
            raise UserError(_unknown(f"{path}.{name}".lstrip("."), config.keys()))
        if isinstance(value, Mapping) and name in config and isinstance(config[name], ConfigDict):
            _override(config[name], value, name)
        else:
            config[name] = value
    return config


def _unknown(path: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(path.rsplit(".", 1)[-1], list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
    return f"config: unknown key {path!r}; {hint}"


# --- reading a config -----------------------------------------------------------------------------------------------


def load(arguments: Sequence[str]) -> Recipe:
    """Reads `--config=FILE.py[:argument]` and `--config.a.b=value` overrides into a validated recipe."""
    from absl import flags

    paths = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    if not paths:
        raise UserError("--config is missing; for example --config=configs/nano.py")
    file = paths[-1].split(":", 1)[0]
    if not Path(file).is_file():
        raise UserError(f"--config: no such file {file!r}; the shipped ones are in configs/")
    sys.modules.pop("config_config", None)  # ml_collections loads every config under this name, over the one before
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["tanuki", *arguments])
    try:
        values(["tanuki", *arguments])
    except UserError:
        raise
    except Exception as error:  # the file is the user's program: it can fail in any way
        raise UserError(f"config {file}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    return resolve(holder.value)


def resolve(config: ConfigDict | Mapping[str, Any]) -> Recipe:
    """The typed, validated recipe of a config (a ConfigDict, or the nested dict that `to_dict` wrote)."""
    result = _typed(Recipe, config, "")
    result = dataclasses.replace(result, stages=_ordered(result.stages))
    _validate(result)
    return result


def from_dict(schema: type, values: Mapping[str, Any]) -> Any:
    """Reads one dataclass of the schema back from `to_dict` (a checkpoint's model, say)."""
    return _typed(schema, values, "")


def to_dict(value: Any) -> Any:
    """Nested plain dicts, lists and scalars of a schema instance; JSON-serialisable."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}
    return value


def changed(value: Any, default: Any = None, path: str = "") -> list[str]:
    """`key = value` for each key of a recipe that is not at its default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        base = default if default is not None else type(value)()
        return [
            line
            for f in dataclasses.fields(value)
            for line in changed(getattr(value, f.name), getattr(base, f.name), f"{path}.{f.name}".lstrip("."))
        ]
    if isinstance(value, Mapping) and any(dataclasses.is_dataclass(v) for v in value.values()):
        return [line for name, v in value.items() for line in changed(v, None, f"{path}.{name}")]
    return [] if value == default else [f"{path} = {value}"]


def _typed(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind`, or a UserError that names the key."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    where = path or "config"
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping | ConfigDict):
            raise UserError(f"config: {where} must be a group of keys, not {value!r}")
        fields = {f.name: f for f in dataclasses.fields(kind)}
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in fields:
                raise UserError(_unknown(f"{path}.{name}".lstrip("."), list(fields)))
        typed = {n: _typed(hints[n], value[n], f"{path}.{n}".lstrip(".")) for n in fields if n in value}
        for name, item in typed.items():
            if name in CHOICES and item not in CHOICES[name]:
                raise UserError(f"config: {path}.{name} is {item!r}; it must be one of {', '.join(CHOICES[name])}")
        return kind(**typed)
    if origin is dict:
        if not isinstance(value, Mapping | ConfigDict):
            raise UserError(f"config: {where} must be a dictionary, not {value!r}")
        return {name: _typed(arguments[1], value[name], f"{where}.{name}") for name in value}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"config: {where} must be a tuple of {arguments[0].__name__}, not {value!r}")
        return tuple(_typed(arguments[0], item, where) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"config: {where} must be {kind.__name__}, not {type(value).__name__} {value!r}")
    return value


def _ordered(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """Stages in the order of `init_from`; branches by name."""
    order: dict[str, Stage] = {}
    waiting = sorted(stages)
    while waiting:
        ready = [n for n in waiting if stages[n].init_from not in waiting]
        if not ready:
            raise UserError(f"config: stages {', '.join(waiting)} start from each other in a circle; mend init_from")
        # Follow the newest branch first, so that a chain is not interrupted by another one.
        newest = list(order)[-1] if order else ""
        name = next((n for n in ready if stages[n].init_from == newest), ready[0])
        order[name] = stages[name]
        waiting.remove(name)
    return order


def is_mixture(recipe: Recipe, name: str) -> bool:
    """Whether stage `name` ends as a mixture of experts."""
    this = recipe.stages[name]
    if this.kind == "upcycle" or this.mixture_of_experts:
        return True
    return this.init_from in recipe.stages and is_mixture(recipe, this.init_from)


def model_of(recipe: Recipe, name: str) -> Model:
    """The model that stage `name` ends with: dense or mixture, with the stage's RoPE base."""
    experts = recipe.model.n_experts if is_mixture(recipe, name) else 0
    theta = recipe.stages[name].rope_theta or recipe.model.rope_theta
    return dataclasses.replace(recipe.model, n_experts=experts, rope_theta=theta)


def _validate(recipe: Recipe) -> None:
    model = recipe.model
    sizes = ("vocab_size", "n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim", "unroll", "logits_chunk")
    for name in sizes:
        if getattr(model, name) < 1:
            raise UserError(f"config: model.{name} is {getattr(model, name)}; it must be at least 1")
    if model.capacity_factor < 0:
        raise UserError(f"config: model.capacity_factor is {model.capacity_factor}; it must be 0 (dropless) or more")
    if model.n_heads % model.n_kv_heads:
        raise UserError(f"config: model.n_heads {model.n_heads} is not a multiple of model.n_kv_heads {model.n_kv_heads}")
    if model.head_dim % 2:
        raise UserError(f"config: model.head_dim {model.head_dim} must be even, rotary position encoding turns pairs")
    if model.n_experts and not 1 <= model.top_k <= model.n_experts:
        raise UserError(f"config: model.top_k {model.top_k} must lie between 1 and model.n_experts {model.n_experts}")
    if not recipe.stages:
        raise UserError("config: the recipe has no stages; add one, for example c.stages.pretrain = config.stage('pretrain')")
    for field, least in (("prompts", 0), ("pairs", 0), ("max_new_tokens", 1), ("batch_size", 1)):
        if getattr(recipe.scoring, field) < least:
            raise UserError(f"config: scoring.{field} is {getattr(recipe.scoring, field)}; it must be at least {least}")
    for name in recipe.tokenizer.sources:
        if name not in recipe.data:
            raise UserError(f"config: tokenizer.sources names {name!r}, which is not in data ({', '.join(recipe.data)})")
    for name, this in recipe.stages.items():
        _validate_stage(recipe, name, this)


def _validate_stage(recipe: Recipe, name: str, this: Stage) -> None:
    where = f"config: stages.{name}"
    parent = this.init_from in recipe.stages
    if this.init_from and not parent and not Path(this.init_from).exists():
        known = ", ".join(n for n in recipe.stages if n != name)
        raise UserError(f"{where}.init_from {this.init_from!r} is neither a stage ({known}) nor a checkpoint directory")
    if is_mixture(recipe, name) and not recipe.model.n_experts:
        raise UserError(f"{where} is a mixture of experts, but model.n_experts is 0")
    if this.kind == "upcycle":
        if not this.init_from or (parent and is_mixture(recipe, this.init_from)):
            raise UserError(f"{where}.init_from must name a dense stage or checkpoint to upcycle")
        return
    if this.mixture_of_experts and parent:
        raise UserError(f"{where}.mixture_of_experts follows from stage {this.init_from!r} that it starts from; leave it out")
    if this.kind in ("sft", "dpo") and not this.init_from:
        raise UserError(f"{where}.init_from is empty; a {this.kind} stage must start from a trained model")
    if sum(bool(b) for b in (this.steps, this.tokens, this.epochs)) != 1:
        raise UserError(
            f"{where}: set exactly one of steps, tokens and epochs (now {this.steps}, {this.tokens}, {this.epochs})"
        )
    for field in ("steps", "tokens", "epochs"):
        if getattr(this, field) < 0:
            raise UserError(f"{where}.{field} is {getattr(this, field)}; it must not be negative")
    for field in ("seq_len", "batch_size", "microbatches", "save_every", "keep", "log_every"):
        if getattr(this, field) < 1:
            raise UserError(f"{where}.{field} is {getattr(this, field)}; it must be at least 1")
    if this.batch_size % this.microbatches:
        raise UserError(f"{where}.batch_size {this.batch_size} is not a multiple of microbatches {this.microbatches}")
    if this.epochs and this.kind == "pretrain":
        raise UserError(f"{where}.epochs is for sft and dpo; give a pretraining stage tokens or steps")
    _validate_mixture(recipe, where, this)


def _validate_mixture(recipe: Recipe, where: str, this: Stage) -> None:
    if not this.mixture:
        raise UserError(f"{where}.mixture is empty; give each source a weight, for example {{'ja': (1.0,)}}")
    starts = this.mixture_starts
    if not starts or starts[0] != 0 or list(starts) != sorted(set(starts)):
        raise UserError(f"{where}.mixture_starts {starts} must begin with 0 and rise")
    for source, weights in this.mixture.items():
        if source not in recipe.data:
            raise UserError(f"{where}.mixture names {source!r}, which is not in data ({', '.join(recipe.data)})")
        if len(weights) != len(starts):
            raise UserError(f"{where}.mixture.{source} has {len(weights)} weights for {len(starts)} phases (mixture_starts)")
        if min(weights) < 0:
            raise UserError(f"{where}.mixture.{source} has a negative weight: {weights}")
    for phase, total in enumerate(map(sum, zip(*this.mixture.values(), strict=True))):
        if total <= 0:
            raise UserError(f"{where}.mixture: the weights of phase {phase} sum to 0; give at least one source a weight")
    if this.kind in ("sft", "dpo") and len(starts) > 1:
        raise UserError(f"{where}.mixture_starts: only a pretraining mixture may change inside a stage")
