"""The batch of a step: a pure function of (recipe, seed, step), the same for any number of hosts and devices."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from tanuki_jax import parallel
from tanuki_jax.data.layouts import Example
from tanuki_jax.data.mixture import StagedMixture

PREFETCH = 4  # batches read ahead
ON_DEVICE = 2  # batches that are transferred to the devices ahead of the step
MAX_ROWS = 1 << 62


class Source(NamedTuple):
    """Rows with an order: in each epoch runs of `run` neighbouring rows are shuffled again."""

    rows: Any  # layouts.Rows; stages also read the fields of the kind that theirs are
    seed: int
    run: int = 1

    def ordered(self) -> grain.MapDataset[Example]:
        """Row i of the endless order.  The rows that fill no run are a shorter run at the end of each epoch."""
        runs = len(self.rows) // self.run
        order = grain.MapDataset.range(runs).seed(self.seed).shuffle().repeat()

        def row(i: int) -> Example:
            epoch, place = divmod(i, len(self.rows))
            run, inside = divmod(place, self.run)
            return self.rows[(order[epoch * runs + run] if run < runs else run) * self.run + inside]

        return grain.MapDataset.range(MAX_ROWS).map(row)


def mixed_rows(sources: Sequence[Source], mixture: StagedMixture) -> grain.MapDataset[Example]:
    """Row i of the stage: every source in its order, repeated endlessly, and mixed.

    With several sources, the field `sources` of a row is the number of the row's source.
    """
    if len(sources) == 1:
        return grain.MapDataset.select_from_datasets([sources[0].ordered()], mixture)

    def numbered(number: int, source: Source) -> grain.MapDataset[Example]:
        return source.ordered().map(lambda row: {**row, "sources": np.int32(number)})

    return grain.MapDataset.select_from_datasets([numbered(k, source) for k, source in enumerate(sources)], mixture)


def batches(
    rows: grain.MapDataset[Example],
    mesh: Mesh,
    batch_size: int,
    first_step: int,
    steps: int,
    number: Callable[[int], int] = lambda step: step,
) -> Iterator[dict[str, jax.Array]]:
    """Global batches of the steps from `first_step`; each host reads only the rows of its own devices.

    Batch `n` holds the rows n*B to (n+1)*B in order; the batch of a step is the one of its `number`, by default the step
    itself.  A few batches are transferred to the devices ahead of their step.
    """
    host_rows = _host_rows(mesh, batch_size)
    waiting: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in host_batches(rows, batch_size, host_rows, first_step, steps, number):
        waiting.append(on_devices(batch, mesh, batch_size, host_rows[0]))
        if len(waiting) > ON_DEVICE:
            yield waiting.popleft()
    yield from waiting


def host_batches(
    rows: grain.MapDataset[Example],
    batch_size: int,
    host_rows: Sequence[int],
    first_step: int,
    steps: int,
    number: Callable[[int], int] = lambda step: step,
) -> Iterator[Example]:
    """The rows `host_rows` of each global batch, stacked; a thread reads ahead."""
    local = (
        grain.MapDataset.range(first_step, steps)
        .map(lambda step: stack([rows[number(step) * batch_size + row] for row in host_rows]))
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH))
    )
    yield from local


def on_devices(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int, first_row: int = 0) -> dict[str, jax.Array]:
    """This host's rows as global arrays, split over the batch axes of the mesh."""
    result: dict[str, jax.Array] = {}
    for name, value in batch.items():
        axes = parallel.sharding(mesh, "B" + "." * (value.ndim - 1))

        def part(index: tuple[slice, ...] | None, value: np.ndarray = value) -> np.ndarray:
            start, stop, _ = (index[0] if index else slice(None)).indices(batch_size)
            return value[start - first_row : stop - first_row]

        result[name] = jax.make_array_from_callback((batch_size, *value.shape[1:]), axes, part)
    return result


def stack(rows: Sequence[Example]) -> Example:
    """Rows as one batch of arrays with a leading axis."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _host_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of the global batch on this process's devices (neighbours, as the mesh is ordered by process)."""
    held = parallel.sharding(mesh, "B").addressable_devices_indices_map((batch_size,)).values()
    spans = {index[0].indices(batch_size)[:2] for index in held if index}
    return list(range(min(a for a, _ in spans), max(b for _, b in spans)))
