"""Hugging Face directories as checkpoints of ours; streamed, exact, whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tanuki_jax import checkpoint, config, files, lock, model
from tanuki_jax.data.tokenizer import copy_tokenizer
from tanuki_jax.interop.huggingface import open_huggingface
from tanuki_jax.interop.vocabulary import resized
from tanuki_jax.progress import Progress


def import_huggingface(path: Path, output: Path, vocab_size: int = 0) -> str:
    """Writes a Llama, Mixtral or Tanuki directory as step 0 of a stage and says what it is."""
    opened, exact = resized(open_huggingface(path), vocab_size, "import")
    cfg = opened.cfg
    total, active = model.count_parameters(cfg)
    progress = Progress("import", total * np.dtype(cfg.param_dtype).itemsize, "MB", 1e6)

    def blocks() -> Iterator[checkpoint.Block]:
        done = 0
        for name, stored in opened.tree.items():
            for at in checkpoint.block_indices(name, stored.shape):
                array = stored.read(*at).astype(model.parameter_dtype(cfg, name), copy=False)
                yield name, at, array
                done += array.nbytes
                progress.show(done)

    with lock.output(output), files.disk_errors(output), files.atomic_path(output) as temporary:
        meta = {**opened.meta, "stage": "import", "model": config.to_dict(cfg), "data_fingerprint": "", "id": uuid.uuid4().hex}
        checkpoint.save_streamed(temporary, cfg, blocks(), meta)
        copy_tokenizer(path, temporary / "tokenizer")
    counts = f"{total:,} parameters" + (f", {active:,} active" if active != total else "")
    return f"{output}: {counts}, {cfg.param_dtype}, {exact}"
