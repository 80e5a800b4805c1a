"""Checkpoints: the only room that imports Orbax.

A stage's directory holds `checkpoints/<step>/{params, optimizer, meta}` and `tokenizer/`.  `meta` has the step, the resolved
model and stage, and the fingerprint of the data, so that resume, export and serving need nothing else.  Saves are
asynchronous and atomic (Orbax writes to a temporary name and renames); a checkpoint restores on any mesh.  One of adapters
holds them alone and names the checkpoint that they lie on.  What came from files has an `id` in its meta, a new one each time,
so that nothing that was computed from it is taken for another's.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tanuki_jax.checkpoint.lazy import Block, LazyArray, LazyCheckpoint, block_indices, open_lazy
from tanuki_jax.checkpoint.restore import (
    Adapters,
    Loaded,
    adapters_meta,
    check_architecture,
    check_sums,
    inherited_meta,
    lineage,
    load,
    load_adapters,
    load_for,
    max_seq_len,
    parameter_shardings,
    read_meta,
    replicated,
    save_params,
    sharded_like,
    single_device,
)
from tanuki_jax.config.init_from import locate

if TYPE_CHECKING:
    from tanuki_jax.checkpoint.manager import KEEP_ALL, Checkpoints
    from tanuki_jax.checkpoint.streaming import save_streaming

__all__ = [
    "Adapters",
    "Block",
    "Checkpoints",
    "KEEP_ALL",
    "LazyArray",
    "LazyCheckpoint",
    "Loaded",
    "adapters_meta",
    "block_indices",
    "check_architecture",
    "check_sums",
    "inherited_meta",
    "lineage",
    "load",
    "load_adapters",
    "load_for",
    "locate",
    "max_seq_len",
    "open_lazy",
    "parameter_shardings",
    "read_meta",
    "replicated",
    "save_params",
    "save_streaming",
    "sharded_like",
    "single_device",
]

LATER = {
    "KEEP_ALL": "manager",
    "Checkpoints": "manager",
    "save_streaming": "streaming",
}  # whose import takes a tenth of a second


def __getattr__(name: str) -> Any:
    """What needs Orbax, imported when it is first asked for."""
    if name in LATER:
        return getattr(importlib.import_module(f"{__name__}.{LATER[name]}"), name)
    raise AttributeError(name)
