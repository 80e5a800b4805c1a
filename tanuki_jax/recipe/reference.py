"""Log-probabilities of every pair under the model that a preference stage starts from, computed once and cached."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import numpy as np

from tanuki_jax import checkpoint, config, files, model, multihost
from tanuki_jax.data import layouts, loader
from tanuki_jax.progress import Progress
from tanuki_jax.recipe.dataset import StageDataset
from tanuki_jax.recipe.initial_state import InitialState
from tanuki_jax.recipe.workdir import Workdir
from tanuki_jax.train.contract import Params
from tanuki_jax.train.preference import pair_scores

logger = logging.getLogger(__name__)


def add_reference(data: StageDataset, start: InitialState, frozen: Params, workdir: Workdir) -> StageDataset:
    """The pairs with their reference log-probabilities; frozen: what `start.load_frozen` gave."""
    assert start.init_checkpoint is not None  # config/validate.py
    meta = checkpoint.read_meta(*checkpoint.locate(start.init_checkpoint))
    path = workdir.data / f"reference-{files.fingerprint(data.fingerprint, meta)}.npy"
    if not _is_whole(path, sum(len(rows.ref_logprobs) for rows in data.pairs)):
        params, batch_size = {**frozen, **start.load_params()}, start.recipe.stages[start.stage].batch_size
        with jax.set_mesh(start.mesh):
            logprobs = np.concatenate(
                [_source_logprobs(start.cfg, params, rows, batch_size, start.mesh) for rows in data.pairs]
            )
        multihost.first_then_all(lambda: _save(path, logprobs), "reference log-probabilities")
    return data.with_reference(np.load(path))


def _is_whole(path: Path, pairs: int) -> bool:
    """Whether there is a whole file with the log-probabilities of that many pairs; says so where it is a damaged one."""
    if not path.is_file():
        return False
    try:
        if np.load(path, mmap_mode="r").shape == (pairs, 2):
            return True
    except (ValueError, EOFError, OSError):
        pass
    logger.warning("%s is damaged or of other pairs; reference log-probabilities are computed anew", path)
    return False


def _source_logprobs(
    cfg: config.ModelConfig, params: Params, rows: layouts.PackedPairs, batch_size: int, mesh: jax.sharding.Mesh
) -> np.ndarray:
    """Log-probabilities [pairs, 2] of one source; the rows are walked in order, the last batch filled up with repetitions."""
    compute = jax.jit(lambda p, batch: pair_scores(model.dropless(cfg), p, batch)[0].logprobs)
    result = np.zeros((len(rows.ref_logprobs), 2), np.float32)
    progress = Progress("reference log-probabilities", len(rows), "rows", quiet=jax.process_index() != 0)
    for first in range(0, len(rows), batch_size):
        multihost.enter_phase(f"reference log-probabilities, row {first}")
        numbers = [min(r, len(rows) - 1) for r in range(first, first + batch_size)]
        batch = loader.stack([rows[r] for r in numbers])
        logprobs = multihost.to_host(compute(params, loader.on_devices(batch, mesh, batch_size)))
        for r, values in zip(numbers, logprobs, strict=True):
            pairs = rows.pairs(r)
            result[pairs] = values[: len(pairs)]
        progress.show(min(first + batch_size, len(rows)))
    return result


def _save(path: Path, array: np.ndarray) -> None:
    with files.atomic_path(path) as temporary, temporary.open("wb") as f:
        np.save(f, array)
