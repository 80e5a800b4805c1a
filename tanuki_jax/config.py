"""Configs made, read and checked against the schema, with the fix in every message.

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
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_flags

from tanuki_jax import origins
from tanuki_jax.checks import check_mixture, check_names, check_recipe, check_upcycle
from tanuki_jax.errors import UserError
from tanuki_jax.schema import (
    CHOICES,
    COMPUTED,
    MIXTURE,
    PREFERENCES,
    RESUMABLE,
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
    is_mixture,
    mixture_layers,
    model_of,
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


class Group(ConfigDict):
    """Keys at their defaults, which knows those that a config has set since, be it to the value that they had."""

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__(*values, **options)
        object.__setattr__(self, "_set", set())

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, Mapping | ConfigDict) and key in self and isinstance(self[key], Group):
            given, value = value, Group(value)
            value.update(given)
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
        """For copies, which config_flags makes."""
        super().__setstate__(state)
        object.__setattr__(self, "_set", set(state["_set"]))


def defaults(schema: Any) -> ConfigDict:
    """The schema's defaults as a ConfigDict (nested dataclasses become nested ConfigDicts)."""
    return ConfigDict(to_dict(schema()))


def recipe(**overrides: Any) -> ConfigDict:
    """A recipe with every key at its default, then `overrides` (values, or dicts for nested keys).

    What is left out of its model is the checkpoint's own in a recipe that starts from one (origins.py).
    """
    made, model = Group(to_dict(Recipe())), Group(to_dict(Model()))
    with made.ignore_type():
        made.model = model
    return _override(made, overrides)


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
    check_names(result)
    result = dataclasses.replace(result, stages=_ordered(result.stages))
    result = origins.completed(result, _left_out(config.get("model", {})))
    check_recipe(result)
    return result


def _left_out(model: ConfigDict | Mapping[str, Any]) -> set[str]:
    """Keys of a model that a config does not set."""
    return {f.name for f in dataclasses.fields(Model)} - set(model) | (model.left_out() if isinstance(model, Group) else set())


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
