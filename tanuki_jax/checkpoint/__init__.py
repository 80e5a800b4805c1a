"""Checkpoints: the only package that imports Orbax.

A stage's directory holds `checkpoints/<step>/{params, optimizer, meta}` and `tokenizer/`.  `meta` has the step, the resolved
model and stage, and the fingerprint of the data, so that resume, export and serving need nothing else (`meta.py`).  Saves are
asynchronous and atomic (Orbax writes to a temporary name and renames); a checkpoint restores on any mesh.  A checkpoint of
adapters holds them alone and names the checkpoint that they lie on.  What came from files has an `id` in its meta, a new one
each time, so that results that were cached for one import are not taken for another's.
"""

import importlib
from typing import TYPE_CHECKING

from tanuki_jax.checkpoint.identity import fingerprint
from tanuki_jax.checkpoint.lazy import Block, LazyArray, LazyCheckpoint, block_indices, open_lazy
from tanuki_jax.checkpoint.meta import AdapterMeta, Meta, inherited_meta, lineage, max_seq_len
from tanuki_jax.checkpoint.restore import (
    Adapters,
    adapters_meta,
    check_architecture,
    check_sums,
    load,
    load_adapters,
    load_for,
    read_meta,
    save_params,
)
from tanuki_jax.checkpoint.sharding import parameter_shardings, replicated, sharded_like
from tanuki_jax.config.checkpoint_paths import locate

if TYPE_CHECKING:
    from tanuki_jax.checkpoint.manager import KEEP_ALL, Checkpoints
    from tanuki_jax.checkpoint.streaming import save_streaming

__all__ = [
    "AdapterMeta",
    "Adapters",
    "Block",
    "Checkpoints",
    "KEEP_ALL",
    "LazyArray",
    "LazyCheckpoint",
    "Meta",
    "adapters_meta",
    "block_indices",
    "check_architecture",
    "check_sums",
    "fingerprint",
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
]

LAZY_MODULES = {  # of what needs Orbax, whose import takes a tenth of a second
    "KEEP_ALL": "manager",
    "Checkpoints": "manager",
    "save_streaming": "streaming",
}


def __getattr__(name: str) -> object:
    """Imports what needs Orbax when it is first asked for."""
    if name in LAZY_MODULES:
        return getattr(importlib.import_module(f"{__name__}.{LAZY_MODULES[name]}"), name)
    raise AttributeError(name)
