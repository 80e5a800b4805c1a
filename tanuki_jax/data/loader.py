"""The batch of a step: a pure function of (recipe, seed, step), the same for any number of hosts and devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from tanuki_jax import parallel
from tanuki_jax.data.mixture import StagedMixture
from tanuki_jax.data.packing import Example

PREFETCH = 4  # batches read ahead


def mixed_rows(sources: Sequence[Any], mixture: StagedMixture, seed: int) -> grain.MapDataset[Example]:
    """Row i of the stage: every source shuffled anew in each of its epochs, repeated for ever, and mixed."""
    shuffled = [grain.MapDataset.source(s).seed(seed + k).shuffle().repeat() for k, s in enumerate(sources)]
    return grain.MapDataset.select_from_datasets(shuffled, mixture)


def batches(
    rows: grain.MapDataset[Example], mesh: Mesh, batch_size: int, first_step: int, steps: int
) -> Iterator[dict[str, jax.Array]]:
    """Global batches of the steps from `first_step`; each host reads only the rows of its own devices.

    Batch `n` holds the rows n*B to (n+1)*B in order.
    """
    mine = _host_rows(mesh, batch_size)
    local = (
        grain.MapDataset.range(first_step * len(mine), steps * len(mine))
        .map(lambda i: rows[i // len(mine) * batch_size + mine[i % len(mine)]])
        .batch(len(mine), batch_fn=stack)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH))
    )
    for batch in local:
        yield on_devices(batch, mesh, batch_size, mine[0])


def on_devices(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int, first_row: int = 0) -> dict[str, jax.Array]:
    """This host's rows as global arrays, split over the batch axes of the mesh."""
    result: dict[str, jax.Array] = {}
    for name, value in batch.items():
        axes = parallel.sharding(mesh, "B" + "." * (value.ndim - 1))

        def part(index: Any, value: np.ndarray = value) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return value[start - first_row : stop - first_row]

        result[name] = jax.make_array_from_callback((batch_size, *value.shape[1:]), axes, part)
    return result


def stack(rows: Sequence[Example]) -> Example:
    """Rows as one batch of arrays with a leading axis."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _host_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of the global batch that this process's devices hold (they lie together, as the mesh is by process)."""
    held = parallel.sharding(mesh, "B").addressable_devices_indices_map((batch_size,)).values()
    spans = {index[0].indices(batch_size)[:2] for index in held if index}
    return list(range(min(a for a, _ in spans), max(b for _, b in spans)))
