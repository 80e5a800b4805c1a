"""The face of the configs: the schema's groups, and how a config is made, read and checked."""

import importlib
from typing import TYPE_CHECKING, Any

from tanuki_jax.config.derived import is_moe, model_config, moe_layers, settings, stage_sources, stage_steps, tokens_per_step
from tanuki_jax.config.kinds import STAGE_KINDS
from tanuki_jax.config.schema import (
    CHOICES,
    MOE_KEYS,
    PREFERENCES,
    Compute,
    Guard,
    Lora,
    Loss,
    Mesh,
    Model,
    ModelConfig,
    Optimizer,
    Recipe,
    Source,
    Stage,
    Tokenizer,
    Upcycle,
    key_types,
)
from tanuki_jax.config.synthesis import Endpoint, Filters, Synth
from tanuki_jax.config.validate import check_moe, check_upcycle, lora_ranks, unreached_schedule

if TYPE_CHECKING:
    from tanuki_jax.config.build import (
        endpoint,
        filters,
        from_dict,
        load,
        non_default,
        read_model,
        recipe,
        resolve,
        stage,
        synth,
        to_dict,
    )

__all__ = [
    "STAGE_KINDS",
    "stage_sources",
    "tokens_per_step",
    "CHOICES",
    "Guard",
    "Lora",
    "Loss",
    "MOE_KEYS",
    "Mesh",
    "Model",
    "ModelConfig",
    "Compute",
    "Endpoint",
    "Filters",
    "Optimizer",
    "PREFERENCES",
    "Recipe",
    "Source",
    "Stage",
    "Synth",
    "Tokenizer",
    "Upcycle",
    "check_moe",
    "check_upcycle",
    "endpoint",
    "filters",
    "from_dict",
    "is_moe",
    "key_types",
    "load",
    "lora_ranks",
    "model_config",
    "moe_layers",
    "non_default",
    "read_model",
    "recipe",
    "resolve",
    "settings",
    "stage",
    "stage_steps",
    "synth",
    "to_dict",
    "unreached_schedule",
]

# Of build.py, which imports ml_collections.
LAZY = (
    *("non_default", "from_dict", "load", "read_model", "resolve", "to_dict"),
    *("recipe", "stage", "endpoint", "filters", "synth"),
)


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module("tanuki_jax.config.build"), name)
    raise AttributeError(name)
