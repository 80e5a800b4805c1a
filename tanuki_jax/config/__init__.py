"""The face of the configs: the schema's groups, and how a config is made, read and checked."""

import importlib
from typing import TYPE_CHECKING, Any

from tanuki_jax.config.ranges import Range
from tanuki_jax.config.schema import (
    CHOICES,
    MIXTURE,
    PREFERENCES,
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
    kinds,
    mixture_layers,
    model_of,
    steps_of,
)
from tanuki_jax.config.validate import check_mixture, check_upcycle, lora_ranks, unreached

if TYPE_CHECKING:
    from tanuki_jax.config.build import changed, defaults, from_dict, load, recipe, resolve, stage, to_dict

__all__ = [
    "CHOICES",
    "MIXTURE",
    "PREFERENCES",
    "Guard",
    "Lora",
    "Loss",
    "Mesh",
    "Model",
    "Optimizer",
    "Range",
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
    "kinds",
    "load",
    "lora_ranks",
    "mixture_layers",
    "model_of",
    "recipe",
    "resolve",
    "stage",
    "steps_of",
    "to_dict",
    "unreached",
]

# Of build.py, which imports ml_collections.
LAZY = ("changed", "defaults", "from_dict", "load", "recipe", "resolve", "stage", "to_dict")


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module("tanuki_jax.config.build"), name)
    raise AttributeError(name)
