"""Configs made, read and checked against the schema, with the fix in every message.

A config file in `configs/` defines `get_config()` and returns an `ml_collections.ConfigDict` made by `recipe()` and
`stage()` below, so that every key exists, has its type, and can be overridden as `--config.a.b=value`.  `resolve`
turns it into the frozen dataclasses that the rest of the package reads.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_flags

from tanuki_jax.errors import UserError
from tanuki_jax.schema import (
    CHOICES,
    COMPUTED,
    MIXTURE,
    PREFERENCES,
    PROJECTED,
    RESUMABLE,
    ROUTED,
    Guard,
    Lora,
    Loss,
    Mesh,
    Model,
    Optimizer,
    Recipe,
    Rules,
    Scoring,
    Source,
    Stage,
    Tokenizer,
    Upcycle,
    Validation,
)

__all__ = [
    "CHOICES",
    "COMPUTED",
    "MIXTURE",
    "PREFERENCES",
    "RESUMABLE",
    "Guard",
    "Lora",
    "Loss",
    "Mesh",
    "Model",
    "Optimizer",
    "Recipe",
    "Rules",
    "Scoring",
    "Source",
    "Stage",
    "Tokenizer",
    "Upcycle",
    "Validation",
    "changed",
    "check_mixture",
    "check_upcycle",
    "defaults",
    "from_dict",
    "is_mixture",
    "load",
    "mixture_layers",
    "model_of",
    "recipe",
    "resolve",
    "stage",
    "to_dict",
]

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
    free = path in ("mixture", "data", "stages", "shares", "preference", "targets")  # dictionaries of the user's own names
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
        if kind is Source and isinstance(value, str):
            value = {"files": value}
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
        ready = [n for n in waiting if not {stages[n].init_from, *stages[n].upcycle.experts_from}.intersection(waiting)]
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


def mixture_layers(model: Model) -> tuple[int, ...]:
    """The layers whose FFN is a mixture, in order; none of a dense model."""
    first = model.first_dense + model.moe_every - 1
    return tuple(range(first, model.n_layers, model.moe_every)) if model.n_experts else ()


def check_mixture(model: Model, where: str) -> None:
    """An error, that begins with `where`, about a mixture that cannot be."""
    for name, least in (("first_dense", 0), ("moe_every", 1), ("expert_d_ff", 0)):
        if getattr(model, name) < least:
            raise UserError(f"{where}{name} is {getattr(model, name)}; it must be at least {least}")
    if not 0 < model.gate_scale < math.inf:
        raise UserError(f"{where}gate_scale is {model.gate_scale}; it must be above 0")
    if not model.n_experts:
        return
    if not 1 <= model.top_k <= model.n_experts:
        raise UserError(f"{where}top_k {model.top_k} must lie between 1 and n_experts {model.n_experts}")
    if model.normalized_gate and model.n_experts < 2:
        raise UserError(f"{where}normalized_gate: the normalised gate needs two experts, not n_experts 1; use the plain gate")
    if not mixture_layers(model):
        raise UserError(
            f"{where}first_dense {model.first_dense} and moe_every {model.moe_every} leave no mixture "
            f"in {model.n_layers} layers"
        )


def check_upcycle(model: Model, options: Upcycle, where: str) -> None:
    """An error, that begins with `where`, about settings with which no dense model becomes the mixture `model`."""
    for name in ("noise_std", "router_std"):
        if not 0 <= getattr(options, name) < math.inf:
            raise UserError(f"{where}{name} is {getattr(options, name)}; a standard deviation is a number and not negative")
    if not 0 <= options.drop_ratio <= 1:
        raise UserError(f"{where}drop_ratio {options.drop_ratio} must lie between 0 and 1")
    width = model.expert_d_ff or model.d_ff
    if options.strategy != "groups" and width != model.d_ff:
        raise UserError(f"{where}an expert_d_ff {width} other than d_ff {model.d_ff} needs the strategy groups")
    if model.d_ff % width:
        raise UserError(f"{where}d_ff {model.d_ff} is not a multiple of expert_d_ff {width}; the FFN cannot be split evenly")
    if model.n_experts % (model.d_ff // width):
        raise UserError(
            f"{where}n_experts {model.n_experts} is not a multiple of the {model.d_ff // width} parts of the FFN "
            f"(d_ff {model.d_ff} / expert_d_ff {width})"
        )


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
    check_mixture(model, "config: model.")
    if not recipe.stages:
        raise UserError("config: the recipe has no stages; add one, for example c.stages.pretrain = config.stage('pretrain')")
    for field, least in (("prompts", 0), ("pairs", 0), ("max_new_tokens", 1), ("batch_size", 1)):
        if getattr(recipe.scoring, field) < least:
            raise UserError(f"config: scoring.{field} is {getattr(recipe.scoring, field)}; it must be at least {least}")
    if recipe.validation.tokens < 0 or recipe.validation.every < 1:
        raise UserError("config: validation.tokens must not be negative, validation.every must be at least 1")
    _validate_shares(recipe)
    for name in recipe.tokenizer.sources:
        if name not in recipe.data:
            raise UserError(f"config: tokenizer.sources names {name!r}, which is not in data ({', '.join(recipe.data)})")
    for name, this in recipe.stages.items():
        _validate_stage(recipe, name, this)


def _validate_shares(recipe: Recipe) -> None:
    shares = recipe.tokenizer.shares
    languages = {recipe.data[name].language for name in recipe.tokenizer.sources or recipe.data if name in recipe.data}
    if shares and (set(shares) != languages or min(shares.values()) <= 0):
        raise UserError(
            f"config: tokenizer.shares {shares} must give a share above 0 to each language of its sources "
            f"({', '.join(map(repr, sorted(languages)))}; set data.NAME.language)"
        )


def _validate_stage(recipe: Recipe, name: str, this: Stage) -> None:
    where = f"config: stages.{name}"
    parent = this.init_from in recipe.stages
    if this.init_from and not parent and not Path(this.init_from).exists():
        known = ", ".join(n for n in recipe.stages if n != name)
        raise UserError(f"{where}.init_from {this.init_from!r} is neither a stage ({known}) nor a checkpoint directory")
    if is_mixture(recipe, name) and not recipe.model.n_experts:
        raise UserError(f"{where} is a mixture of experts, but model.n_experts is 0")
    if this.kind == "upcycle":
        if this.lora.rank:
            raise UserError(f"{where}.lora.rank: nothing is trained when a model is upcycled; set it in a later stage")
        if not this.init_from or (parent and is_mixture(recipe, this.init_from)):
            raise UserError(f"{where}.init_from must name a dense stage or checkpoint to upcycle")
        check_upcycle(recipe.model, this.upcycle, f"{where}.upcycle: ")
        for other in this.upcycle.experts_from:
            if other in recipe.stages and is_mixture(recipe, other):
                raise UserError(f"{where}.upcycle.experts_from names {other!r}, which is a mixture; it must be dense")
            if other not in recipe.stages and not Path(other).exists():
                raise UserError(f"{where}.upcycle.experts_from {other!r} is neither a stage nor a checkpoint directory")
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
    for loss, weight in this.loss.preference.items():
        if loss not in PREFERENCES or weight <= 0:
            known = ", ".join(PREFERENCES)
            raise UserError(
                f"{where}.loss.preference: {loss!r} has weight {weight:g}; it needs a name of {known} and one above 0"
            )
    for key in ("router_aux_loss", "router_aux_adaptive", "router_z_loss", "router_bias_rate"):
        if not 0 <= getattr(this.loss, key) < math.inf:
            raise UserError(f"{where}.loss.{key} is {getattr(this.loss, key)}; it must be a number and not negative")
    smoothed = {"cdpo", "robust"}.intersection(this.loss.preference)
    if this.loss.label_smoothing and not smoothed:
        raise UserError(f"{where}.loss.label_smoothing is for cdpo and robust; set loss.preference to {{'cdpo': 1.0}}")
    if not 0 <= this.loss.label_smoothing < 0.5:
        raise UserError(f"{where}.loss.label_smoothing {this.loss.label_smoothing} must lie between 0 and 0.5")
    for key in ("skip_limit", "spike", "spike_steps", "rollbacks", "hang_seconds"):
        if not 0 <= getattr(this.guard, key) < math.inf:
            raise UserError(f"{where}.guard.{key} is {getattr(this.guard, key)}; it must be a number and not negative")
    if not 0 < this.guard.rollback_rate <= 1:
        raise UserError(f"{where}.guard.rollback_rate is {this.guard.rollback_rate}; it must be above 0 and at most 1")
    _validate_lora(recipe, name, this)
    if this.epochs and this.kind == "pretrain":
        raise UserError(f"{where}.epochs is for sft and dpo; give a pretraining stage tokens or steps")
    _validate_mixture(recipe, where, this)


def _validate_lora(recipe: Recipe, name: str, this: Stage) -> None:
    where, options = f"config: stages.{name}", this.lora
    if options.rank < 0:
        raise UserError(f"{where}.lora.rank is {options.rank}; it must not be negative, and 0 trains all parameters")
    if not options.rank:
        if this.carry == "adapter":
            raise UserError(f"{where}.carry is adapter, but lora.rank is 0; set the rank of the adapter in init_from")
        return
    if not this.init_from:
        raise UserError(f"{where}.lora: adapters need a model in init_from")
    if not 0 < options.alpha < math.inf or not 0 <= options.dropout < 1:
        raise UserError(f"{where}.lora: alpha must be above 0, dropout at least 0 and below 1")
    model = model_of(recipe, name)
    mixtures = len(mixture_layers(model))
    known = [n for n in PROJECTED if mixtures < model.n_layers or not n.startswith("mlp/")] + [*ROUTED][: 4 * bool(mixtures)]
    for pattern, rank in options.patterns().items():
        fits = fnmatch.filter(known, pattern)
        if not fits or rank < 0:
            raise UserError(
                f"{where}.lora.targets: {pattern!r} with rank {rank} fits nothing; the matrices are {', '.join(known)}, a rank "
                "is at least 0"
            )
        if options.dropout and set(fits) & set(ROUTED):
            raise UserError(f"{where}.lora.dropout is for attention and dense FFN; set it to 0 for {pattern!r}")


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
