"""The rows of a stage: its sources opened, packed, put in order and mixed; where each source goes on; what is held out."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from tanuki_jax import config, files
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.config.schema import Recipe
from tanuki_jax.data import layouts, loader
from tanuki_jax.data.layouts import LAYOUTS, Rows, StageSource
from tanuki_jax.data.mixture import ORDER, StagedMixture
from tanuki_jax.data.prepare import open_store
from tanuki_jax.errors import UserError
from tanuki_jax.recipe.artifacts import Artifacts

MIN_BLOCKS = 16  # least blocks of a source; fewer would hardly be an order of their own


@dataclass(frozen=True)
class StageDataset:
    """The rows of a stage, how many steps they are for, and the fingerprint that a resumed run must match."""

    names: tuple[str, ...]
    order: tuple[loader.Source, ...]  # of each source its rows and how they are shuffled
    mixture: StagedMixture
    steps: int
    rows_per_step: int
    fingerprint: str
    held_out: Mapping[str, layouts.HeldOutRows]  # rows for validation

    @property
    def sources(self) -> tuple[Rows, ...]:
        """The rows of each source."""
        return tuple(source.rows for source in self.order)

    @property
    def pairs(self) -> tuple[layouts.PackedPairs, ...]:
        """The rows of each source of a preference stage."""
        return tuple(rows for rows in self.sources if isinstance(rows, layouts.PackedPairs))

    @functools.cached_property
    def rows(self) -> grain.MapDataset:
        """Row i of the stage."""
        return loader.mixed_rows(self.order, self.mixture)

    def counters(self, step: int) -> dict[str, float]:
        """What each source has given up to the end of a step, earlier stages of its chain included: tokens and epochs."""
        result: dict[str, float] = {}
        used = self.mixture.first + self.mixture.used(step * self.rows_per_step)
        for name, rows, count in zip(self.names, self.sources, used.tolist(), strict=True):
            result[f"data/{name}/tokens"] = count * rows.seq_len
            result[f"data/{name}/epoch"] = round(count / len(rows), 4)
        return result

    def with_reference(self, logprobs: np.ndarray) -> StageDataset:
        """The same pairs with the reference model's log-probabilities, float32 [pairs, 2] over all sources in order."""
        ends = np.cumsum([len(rows.ref_logprobs) for rows in self.pairs])[:-1]
        parts = np.split(logprobs, ends)
        order = [
            source._replace(rows=replace(rows, ref_logprobs=part))
            for source, rows, part in zip(self.order, self.pairs, parts, strict=True)
        ]
        return replace(self, order=tuple(order))


class SourceRows(NamedTuple):
    """A source as a stage reads it."""

    content: str  # fingerprint of what it holds
    rows: Rows


def make_dataset(recipe: Recipe, stage: str, artifacts: Artifacts, cache: Path) -> StageDataset:
    """Opens the sources of a stage and mixes them; pairs come without the reference model's log-probabilities."""
    options = recipe.stages[stage]
    kind, names = STAGE_KINDS[options.kind], config.stage_sources(options)
    sources = [_open_source(recipe, stage, name, artifacts, cache) for name in names]
    rows = _of_one_shape([source.rows for source in sources])
    sizes = [len(r) for r in rows]
    if options.epochs:
        steps = max(1, round(options.epochs * sum(sizes) / options.batch_size))
    else:
        steps = max(1, config.stage_steps(options))
    # In a stream a weight is a share of tokens; dialogues and pairs are weighted by how many there are.
    scale = [1.0] * len(names) if kind.streams else [float(size) for size in sizes]
    phases = range(len(options.phase_start_tokens))
    weights = [[options.mixture[n][phase] * s for n, s in zip(names, scale, strict=True)] for phase in phases]
    starts = [tokens // options.seq_len for tokens in options.phase_start_tokens]
    if kind.streams:
        consumed = tokens_consumed_before(recipe, stage)
        first = [-(-consumed.get(n, 0) // options.seq_len) for n in names]
        blocks = [_shuffle_block(recipe, n, options.seq_len, size) for n, size in zip(names, sizes, strict=True)]
        seeds = [_seed(recipe.seed, n) for n in names]
    else:  # packed rows differ from stage to stage, and so does their order
        first, blocks, seeds = [0] * len(names), [1] * len(names), [_seed(recipe.seed, stage, n) for n in names]
    mixture = StagedMixture(weights, starts, loader.MAX_ROWS, first)  # a run that leaves batches out reads further
    order = tuple(loader.Source(r, seed, block) for r, seed, block in zip(rows, seeds, blocks, strict=True))
    depends_on_order = len(names) > 1 or any(size % block for size, block in zip(sizes, blocks, strict=True))
    fingerprint = files.fingerprint(
        tuple(source.content for source in sources),
        artifacts.tokenizer.fingerprint,
        weights,
        starts,
        [options.seq_len, options.batch_size, options.reset_attention, options.kind, recipe.validation.tokens],
        [first, blocks, seeds],
        *([ORDER] if depends_on_order else []),
    )
    held_out = {
        name: layouts.HeldOutRows(r)
        for name, r in zip(names, rows, strict=True)
        if isinstance(r, layouts.Windows) and recipe.validation.tokens
    }
    return StageDataset(names, order, mixture, steps, options.batch_size, fingerprint, held_out)


def _of_one_shape(rows: Sequence[Rows]) -> list[Rows]:
    """The rows of all sources, with room for as many pairs as any row of any of them holds."""
    max_pairs = max((r.max_pairs for r in rows if isinstance(r, layouts.PackedPairs)), default=0)
    return [replace(r, max_pairs=max_pairs) if isinstance(r, layouts.PackedPairs) else r for r in rows]


def _open_source(recipe: Recipe, stage: str, name: str, artifacts: Artifacts, cache: Path) -> SourceRows:
    """A source as rows of the stage's layout and length."""
    options = recipe.stages[stage]
    kind = STAGE_KINDS[options.kind]
    manifest, tokens, mask = open_store(artifacts.stores[name])
    if manifest.kind not in kind.rows:
        raise UserError(
            f"stage {stage}: source {name!r} holds {manifest.kind} rows; "
            f"a {options.kind} stage needs {' or '.join(kind.rows)} rows"
        )
    source = StageSource(
        name=name,
        stage=stage,
        kind=options.kind,
        content=manifest.content,
        documents=manifest.documents,
        tokens=tokens,
        mask=mask,
        seq_len=options.seq_len,
        reset_attention=options.reset_attention,
        vocab_size=recipe.model.vocab_size,
        held_out=recipe.validation.tokens,
        cache=cache,
    )
    return SourceRows(manifest.content, LAYOUTS[kind.layout](source))


# --- where a source goes on, and in which order ---------------------------------------------------------------------


def tokens_consumed_before(recipe: Recipe, stage: str) -> dict[str, int]:
    """Tokens of each source that the stages from which `stage` descends have trained on; it goes on from there.

    Exact where those stages have the same seq_len, or this one's divides theirs; else less than one row is passed over.
    """
    consumed: dict[str, int] = {}
    ancestors = []
    parent = recipe.stages[stage].init_from
    while parent in recipe.stages:
        ancestors.append(recipe.stages[parent])
        parent = recipe.stages[parent].init_from
    for options in reversed(ancestors):
        if not STAGE_KINDS[options.kind].streams:
            continue
        names, phases = config.stage_sources(options), range(len(options.phase_start_tokens))
        weights = [[options.mixture[n][phase] for n in names] for phase in phases]
        starts = [tokens // options.seq_len for tokens in options.phase_start_tokens]
        rows = max(1, config.stage_steps(options)) * options.batch_size
        for n, count in zip(names, StagedMixture(weights, starts, rows).used(rows).tolist(), strict=True):
            first = -(-consumed.get(n, 0) // options.seq_len)
            consumed[n] = (first + count) * options.seq_len
    return consumed


def _shuffle_block(recipe: Recipe, source: str, seq_len: int, rows: int) -> int:
    """Rows of a source that stay together when it is shuffled: those of the longest row that any stage reads from it.

    So a stage with longer or shorter rows goes on in the same order of the source's text.  A source is shuffled row by row
    where that would leave little to shuffle, or more than a per cent of it for the end of each epoch.
    """
    readers = [s for s in recipe.stages.values() if STAGE_KINDS[s.kind].streams and any(s.mixture.get(source, ()))]
    block = math.lcm(*(s.seq_len for s in readers)) // seq_len
    return block if rows >= block * MIN_BLOCKS and rows % block <= rows // 100 else 1


def _seed(seed: int, *names: str) -> int:
    return zlib.crc32(" ".join(map(str, (seed, *names))).encode())
