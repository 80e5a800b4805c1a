"""Configs made, read and checked against the schema, with the fix in every message.

A config file in `configs/` defines `get_config()` and returns an `ml_collections.ConfigDict` made by `recipe()` and
`stage()` below, so that every key exists, has its type, and can be overridden as `--config.a.b=value`.  `resolve`
turns it into the frozen dataclasses that the rest of the package reads.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tanuki_jax.config import config_file, init_from
from tanuki_jax.config.derived import stages_before
from tanuki_jax.config.ranges import Range
from tanuki_jax.config.schema import CHOICES, Compute, Model, ModelConfig, Recipe, Source, Stage, key_types
from tanuki_jax.config.synthesis import Endpoint, Filters, Synth
from tanuki_jax.config.validate import check_names, check_recipe
from tanuki_jax.errors import UserError

# --- making a config ------------------------------------------------------------------------------------------------


class Group(ConfigDict):
    """Keys at their defaults, which knows those that a config has set since, be it to the value that they had."""

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__(*values, **options)
        object.__setattr__(self, "_set", set())

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, Mapping | ConfigDict) and key in self and isinstance(self[key], Group):
            values, value = value, Group(value)
            value.update(values)
        super().__setitem__(key, value)
        self.__dict__.get("_set", set()).add(key)

    def update(self, *others: Any, **values: Any) -> None:
        """Sets what another group has set, and every key of anything else."""
        before = set(self._set)
        super().update(*others, **values)
        unset = {key for other in others if isinstance(other, Group) for key in other.left_out()}
        self._set.difference_update(unset - before - values.keys())

    def left_out(self) -> set[str]:
        """The keys that are at their defaults."""
        return set(self) - self._set

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies."""
        super().__setstate__(state)
        object.__setattr__(self, "_set", set(state["_set"]))


def defaults(schema: Any) -> ConfigDict:
    """The schema's defaults as a ConfigDict (nested dataclasses become nested ConfigDicts)."""
    return ConfigDict(to_dict(schema()))


def recipe(**overrides: Any) -> ConfigDict:
    """A recipe with every key at its default, then `overrides` (values, or dicts for nested keys).

    What is left out of its model is the checkpoint's own in a recipe that starts from one (init_from.py).
    """
    result, model = Group(to_dict(Recipe())), Group(to_dict(Model()))
    with result.ignore_type():
        result.model = model
    return _override(result, overrides)


def stage(kind: str, **overrides: Any) -> ConfigDict:
    """A stage with every key at its default, then `overrides`."""
    return _override(defaults(Stage), {"kind": kind, **overrides}, Stage)


def filters(**overrides: Any) -> ConfigDict:
    """What a source or made rows are filtered by, every key at its default, then `overrides`."""
    return _override(defaults(Filters), overrides, Filters)


def endpoint(base_url: str = "", **overrides: Any) -> ConfigDict:
    """A model behind an OpenAI-compatible server, every key at its default, then `overrides`."""
    return _override(defaults(Endpoint), {"base_url": base_url, **overrides}, Endpoint)


def synth(method: str, **overrides: Any) -> ConfigDict:
    """Rows that a model makes, every key at its default, then `overrides`."""
    return _override(defaults(Synth), {"method": method, **overrides}, Synth)


def _override(config: ConfigDict, values: Mapping[str, Any], schema: Any = Recipe, path: str = "") -> ConfigDict:
    types = key_types(schema)
    for name, value in values.items():
        if name not in types:
            raise UserError(f"config: {config_file.unknown(f'{path}{name}', list(types))}")
        if dataclasses.is_dataclass(types[name]) and isinstance(value, Mapping):
            _override(config[name], value, types[name], f"{path}{name}.")
        else:
            config[name] = value
    return config


# --- reading a config -----------------------------------------------------------------------------------------------


def load(arguments: Sequence[str], needs_stages: bool = True) -> Recipe:
    """Reads `--config=FILE.py[:argument]` and `--config.a.b=value` overrides into a validated recipe."""
    result = resolve(config_file.read(arguments))
    if needs_stages and not result.stages:
        raise UserError("config: the recipe has no stages, only rows to make; tanuki synth makes them")
    return result


def resolve(config: ConfigDict | Mapping[str, Any]) -> Recipe:
    """The typed, validated recipe of a config (a ConfigDict, or the nested dict that `to_dict` wrote)."""
    result = _typed(Recipe, config, "")
    check_names(result)
    result = dataclasses.replace(result, stages=_ordered(result))
    result = init_from.inherit(result, _left_out(config.get("model", {})))
    check_recipe(result)
    return result


def _left_out(model: ConfigDict | Mapping[str, Any]) -> set[str]:
    """Keys of a model that a config does not set."""
    return {f.name for f in dataclasses.fields(Model)} - set(model) | (model.left_out() if isinstance(model, Group) else set())


def from_dict(schema: type, values: Mapping[str, Any]) -> Any:
    """Reads one dataclass of the schema back from `to_dict` (a checkpoint's model, say)."""
    return _typed(schema, values, "")


# Keys of Compute that stood in the model of earlier checkpoints, by their names there.
MOVED = {
    **{"dtype": "dtype", "attention": "attention_impl", "experts": "expert_impl"},
    **{"remat": "remat", "unroll": "scan_unroll", "logits_chunk": "logits_chunk"},
}


def read_model(meta: Mapping[str, Any]) -> ModelConfig:
    """The model of a checkpoint's meta, computed as in the recipe that trained it."""
    architecture = from_dict(Model, {name: value for name, value in meta["model"].items() if name not in MOVED})
    moved = {MOVED[name]: value for name, value in meta["model"].items() if name in MOVED}
    compute = from_dict(Compute, {**moved, **meta.get("recipe", {}).get("compute", {})})
    return ModelConfig(**vars(architecture), compute=compute)


def to_dict(value: Any) -> Any:
    """Nested plain dicts, lists and scalars of a schema instance; JSON-serialisable."""
    if isinstance(value, ModelConfig):
        value = value.architecture  # which is all that a checkpoint records of it
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}
    return value


def non_default(value: Any, default: Any = None, path: str = "") -> list[str]:
    """`key = value` for each key of a recipe that is not at its default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        base = default if default is not None else type(value)()
        return [
            line
            for f in dataclasses.fields(value)
            for line in non_default(getattr(value, f.name), getattr(base, f.name), f"{path}.{f.name}".lstrip("."))
        ]
    if isinstance(value, Mapping) and any(dataclasses.is_dataclass(v) for v in value.values()):
        return [line for name, v in value.items() for line in non_default(v, None, f"{path}.{name}")]
    return [] if value == default else [f"{path} = {value}"]


def _typed(kind: Any, value: Any, path: str, allowed: Range | None = None) -> Any:
    """`value` as `kind`, its numbers in the range that the schema allows, or a UserError that names the key."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    where = path or "config"
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _group(kind, value, path)
    if origin is dict:
        if not isinstance(value, Mapping | ConfigDict):
            raise UserError(f"config: {where} must be a dictionary, not {_shown(value)}")
        if wrong := [name for name in value if not isinstance(name, str)]:
            raise UserError(f"config: {where} must have names, not {_shown(wrong[0])}")
        return {name: _typed(arguments[1], value[name], f"{where}.{name}", allowed) for name in value}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"config: {where} must be a tuple of {arguments[0].__name__}, not {_shown(value)}")
        return tuple(_typed(arguments[0], item, where, allowed) for item in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole if kind is int else isinstance(value, kind) or (kind is float and whole)):
        raise UserError(f"config: {where} must be {kind.__name__}, not {type(value).__name__} {_shown(value)}")
    if allowed is not None and value not in allowed:
        raise UserError(f"config: {where} is {_shown(value)}; it must be {allowed.describe()}")
    return float(value) if kind is float else value


def _group(kind: Any, value: Any, path: str) -> Any:
    """`value` as a dataclass of the schema; what it leaves out has its default."""
    if kind is Source and isinstance(value, str):
        value = {"files": value}
    if not isinstance(value, Mapping | ConfigDict):
        raise UserError(f"config: {path or 'config'} must be a group of keys, not {_shown(value)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise UserError(f"config: {config_file.unknown(f'{path}.{name}'.lstrip('.'), list(fields))}")
    typed = {
        name: _typed(key_types(kind)[name], value[name], f"{path}.{name}".lstrip("."), field.metadata["range"])
        for name, field in fields.items()
        if name in value
    }
    for name, item in typed.items():
        if name in CHOICES and item not in CHOICES[name]:
            raise UserError(f"config: {path}.{name} is {item!r}; it must be one of {', '.join(CHOICES[name])}")
    return kind(**typed)


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def _ordered(recipe: Recipe) -> dict[str, Stage]:
    """Stages in the order of what they start from and read; branches by name."""
    stages = recipe.stages
    before = {name: stages_before(recipe, name) for name in stages}
    order: dict[str, Stage] = {}
    waiting = sorted(stages)
    while waiting:
        ready = [n for n in waiting if not before[n].intersection(waiting)]
        if not ready:
            raise UserError(
                f"config: stages {', '.join(waiting)} start from each other, or read what they make, in a circle; mend "
                "init_from, or the sources"
            )
        # Follow the newest branch first, so that a chain is not interrupted by another one.
        newest = list(order)[-1] if order else ""
        name = next((n for n in ready if newest and newest in before[n]), ready[0])
        order[name] = stages[name]
        waiting.remove(name)
    return order
