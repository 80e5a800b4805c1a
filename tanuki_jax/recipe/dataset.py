"""The rows of a stage: its sources opened, packed, put in order and mixed; where each source goes on; what is held out."""

from __future__ import annotations

import functools
import math
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import grain
import numpy as np

from tanuki_jax import config, files
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.config.schema import Recipe, Stage
from tanuki_jax.data import loader, packing
from tanuki_jax.data.mixture import ORDER, StagedMixture
from tanuki_jax.data.prepare import Manifest, open_store
from tanuki_jax.data.store import Store
from tanuki_jax.errors import UserError
from tanuki_jax.recipe.artifacts import Artifacts

MIN_BLOCKS = 16  # least blocks of a source; fewer would hardly be an order of their own
Rows: TypeAlias = packing.Windows | packing.PackedDialogues | packing.PackedPairs


@dataclass(frozen=True)
class StageDataset:
    """The rows of a stage, how many steps they are for, and the fingerprint that a resumed run must match."""

    names: tuple[str, ...]
    order: tuple[loader.Source, ...]  # of each source its rows and how they are shuffled
    mixture: StagedMixture
    steps: int
    rows_per_step: int
    fingerprint: str
    held_out: Mapping[str, packing.HeldOutRows]  # rows for validation

    @property
    def sources(self) -> tuple[Rows, ...]:
        """The rows of each source."""
        return tuple(source.rows for source in self.order)

    @property
    def pairs(self) -> tuple[packing.PackedPairs, ...]:
        """The rows of each source of a preference stage."""
        return tuple(rows for rows in self.sources if isinstance(rows, packing.PackedPairs))

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
        name: packing.HeldOutRows(r)
        for name, r in zip(names, rows, strict=True)
        if isinstance(r, packing.Windows) and recipe.validation.tokens
    }
    return StageDataset(names, order, mixture, steps, options.batch_size, fingerprint, held_out)


def _of_one_shape(rows: Sequence[Rows]) -> list[Rows]:
    """The rows of all sources, with room for as many pairs as any row of any of them holds."""
    max_pairs = max((r.max_pairs for r in rows if isinstance(r, packing.PackedPairs)), default=0)
    return [replace(r, max_pairs=max_pairs) if isinstance(r, packing.PackedPairs) else r for r in rows]


# --- layouts: how rows of S tokens are made of a source -------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A token store, and the stage that reads it."""

    name: str
    stage: str
    options: Stage
    manifest: Manifest
    tokens: Store
    mask: Store | None  # None for text


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
    source = _Source(name, stage, options, manifest, tokens, mask)
    return SourceRows(manifest.content, LAYOUTS[kind.layout](source, recipe, cache))


def _open_windows(source: _Source, recipe: Recipe, cache: Path) -> packing.Windows:
    options, held_out = source.options, recipe.validation.tokens
    if 0 < held_out < options.seq_len:
        raise UserError(
            f"config: validation.tokens is {held_out}, less than one row of stage {source.stage} ({options.seq_len} tokens); "
            "raise it, or set it to 0"
        )
    windows = packing.Windows(source.tokens, options.seq_len, options.reset_attention, recipe.model.vocab_size, held_out)
    if not len(windows):
        raise UserError(
            f"stage {source.stage}: source {source.name!r} has too little text for one row of {options.seq_len} tokens"
            f"{' beside validation.tokens' if held_out else ''}; add data or lower seq_len"
        )
    print(f"stage {source.stage}: {windows.describe(source.name)}", file=sys.stderr)
    return windows


def _open_dialogues(source: _Source, recipe: Recipe, cache: Path) -> packing.PackedDialogues:
    assert source.mask is not None
    packed = _load_packing(source, cache, pairs=False)
    return packing.PackedDialogues(source.tokens, source.mask, packed, source.options.seq_len)


def _open_pairs(source: _Source, recipe: Recipe, cache: Path) -> packing.PackedPairs:
    assert source.mask is not None
    packed = _load_packing(source, cache, pairs=True)
    reference = np.zeros((source.manifest.documents // 2, 2), np.float32)
    max_pairs = int(np.diff(packed.starts).max())
    return packing.PackedPairs(source.tokens, source.mask, packed, source.options.seq_len, max_pairs, reference)


LAYOUTS: Mapping[str, Callable[[_Source, Recipe, Path], Rows]] = {
    "windows": _open_windows,
    "dialogues": _open_dialogues,
    "pairs": _open_pairs,
}


def _load_packing(source: _Source, cache: Path, pairs: bool) -> packing.Packing:
    """The pack index of dialogues or pairs, from the cache where it is there; says what it wastes."""
    stage, name, options, lengths = source.stage, source.name, source.options, source.tokens.lengths
    assert source.mask is not None
    units = len(lengths) // 2 if pairs else len(lengths)
    fingerprint = files.fingerprint(source.manifest.content, options.kind, options.seq_len, units)
    path = cache / f"pack-{fingerprint}.npz"
    packed = _read_packing(path, units)
    if packed is None:
        packed = packing.pack(source.tokens, source.mask, options.seq_len, pairs)
        with files.disk_errors(cache, "data"), files.atomic_path(path) as temporary, temporary.open("wb") as f:
            np.savez(f, starts=packed.starts, units=packed.units, dropped=packed.dropped)
    print(f"stage {stage}: {packing.describe_packing(packed, lengths, options.seq_len, pairs, name)}", file=sys.stderr)
    if not len(packed.units):
        raise UserError(
            f"stage {stage}: no {'pair' if pairs else 'answer'} of source {name!r} fits into {options.seq_len} "
            "tokens; raise seq_len"
        )
    return packed


def _read_packing(path: Path, units: int) -> packing.Packing | None:
    """A pack index from the cache; none where it is not there or damaged, which is said."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as saved:
            packed = packing.Packing(saved["starts"], saved["units"], int(saved["dropped"]))
        sound = packed.starts[0] == 0 and packed.starts[-1] == len(packed.units) == units - packed.dropped
        if sound and np.array_equal(np.unique(packed.units), np.sort(packed.units)) and (packed.units < units).all():
            return packed
        reason = "its numbers do not fit the data"
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error) or type(error).__name__
    print(f"data: {path} is damaged ({reason}) and made anew", file=sys.stderr)
    return None


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
