"""The rows of a stage: its sources opened, packed, put in order and mixed; where each source goes on; what is held out."""

from __future__ import annotations

import functools
import math
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grain
import numpy as np

from tanuki_jax import files
from tanuki_jax.config.schema import Recipe, Stage
from tanuki_jax.data import loader, packing
from tanuki_jax.data.mixture import ORDER, StagedMixture
from tanuki_jax.data.prepare import Manifest, open_store
from tanuki_jax.data.store import Store
from tanuki_jax.errors import UserError
from tanuki_jax.recipe.artifacts import Artifacts

MIN_BLOCKS = 16  # least runs of a source; fewer would hardly be an order of their own
ROW_KINDS = {"pretrain": ("text", "dialogue", "tokens"), "sft": ("dialogue",), "dpo": ("pair",)}


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
    def sources(self) -> tuple[Any, ...]:
        """The rows of each source."""
        return tuple(source.rows for source in self.order)

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
        ends = np.cumsum([len(rows.ref_logprobs) for rows in self.sources])[:-1]
        parts = np.split(logprobs, ends)
        order = [
            source._replace(rows=replace(source.rows, ref_logprobs=part))
            for source, part in zip(self.order, parts, strict=True)
        ]
        return replace(self, order=tuple(order))


def sources_of(stage: Stage) -> tuple[str, ...]:
    """The names of the sources that a stage reads, in the order of their numbers."""
    return tuple(name for name, weights in stage.mixture.items() if any(weights))


def make_dataset(recipe: Recipe, name: str, inputs: Artifacts, cache: Path) -> StageDataset:
    """Opens the sources of a stage and mixes them; pairs come without the reference model's log-probabilities."""
    this = recipe.stages[name]
    names = sources_of(this)
    contents, opened = zip(*(_open_source(recipe, name, source, inputs, cache) for source in names), strict=True)
    if this.kind == "dpo":  # one shape for all
        widest = max(rows.max_pairs for rows in opened)
        opened = tuple(replace(rows, max_pairs=widest) for rows in opened)
    held = this.kind == "pretrain" and recipe.validation.tokens
    held_out = {source: packing.HeldOutRows(rows) for source, rows in zip(names, opened, strict=True)} if held else {}

    sizes = [len(rows) for rows in opened]
    steps = max(1, round(this.epochs * sum(sizes) / this.batch_size)) if this.epochs else _budget_steps(recipe, name)
    # In pretraining a weight is a share of tokens; dialogues and pairs are weighted by how many there are.
    scale = [1.0] * len(names) if this.kind == "pretrain" else [float(size) for size in sizes]
    weights = [
        [this.mixture[n][phase] * s for n, s in zip(names, scale, strict=True)] for phase in range(len(this.phase_start_tokens))
    ]
    starts = [tokens // this.seq_len for tokens in this.phase_start_tokens]
    if this.kind == "pretrain":
        before = tokens_consumed_before(recipe, name)
        first = [-(-before.get(n, 0) // this.seq_len) for n in names]
        runs = [_shuffle_block(recipe, n, this.seq_len, size) for n, size in zip(names, sizes, strict=True)]
        seeds = [_seed(recipe.seed, n) for n in names]
    else:  # packed rows differ from stage to stage, and so does their order
        first, runs, seeds = [0] * len(names), [1] * len(names), [_seed(recipe.seed, name, n) for n in names]
    mixture = StagedMixture(weights, starts, loader.MAX_ROWS, first)  # a run that leaves batches out reads further
    order = tuple(loader.Source(rows, seed, run) for rows, seed, run in zip(opened, seeds, runs, strict=True))
    fingerprint = files.fingerprint(
        contents,
        inputs.tokenizer.fingerprint,
        weights,
        starts,
        [this.seq_len, this.batch_size, this.reset_attention, this.kind, recipe.validation.tokens],
        [first, runs, seeds],
        *([ORDER] if len(names) > 1 or any(size % run for size, run in zip(sizes, runs, strict=True)) else []),
    )
    return StageDataset(names, order, mixture, steps, this.batch_size, fingerprint, held_out)


def _open_source(recipe: Recipe, name: str, source: str, inputs: Artifacts, cache: Path) -> tuple[str, Any]:
    """The hash of a source's content, and the source as rows of the stage's kind and length."""
    this = recipe.stages[name]
    manifest, tokens, mask = open_store(inputs.stores[source])
    if manifest.kind not in ROW_KINDS[this.kind]:
        raise UserError(
            f"stage {name}: source {source!r} holds {manifest.kind} rows; "
            f"a {this.kind} stage needs {' or '.join(ROW_KINDS[this.kind])} rows"
        )
    if this.kind == "pretrain":
        held_out = recipe.validation.tokens
        if 0 < held_out < this.seq_len:
            raise UserError(
                f"config: validation.tokens is {held_out}, less than one row of stage {name} ({this.seq_len} tokens); "
                "raise it, or set it to 0"
            )
        windows = packing.Windows(tokens, this.seq_len, this.reset_attention, recipe.model.vocab_size, held_out)
        if not len(windows):
            raise UserError(
                f"stage {name}: source {source!r} has too little text for one row of {this.seq_len} tokens"
                f"{' beside validation.tokens' if held_out else ''}; add data or lower seq_len"
            )
        print(f"stage {name}: {windows.describe(source)}", file=sys.stderr)
        return manifest.content, windows
    assert mask is not None
    packed = _load_packing(name, source, this.kind, tokens, mask, manifest, this.seq_len, cache)
    if not len(packed.units):
        raise UserError(
            f"stage {name}: no {'pair' if this.kind == 'dpo' else 'answer'} of source {source!r} fits into {this.seq_len} "
            "tokens; raise seq_len"
        )
    if this.kind == "sft":
        return manifest.content, packing.PackedDialogues(tokens, mask, packed, this.seq_len)
    reference = np.zeros((manifest.documents // 2, 2), np.float32)
    most = int(np.diff(packed.starts).max())
    return manifest.content, packing.PackedPairs(tokens, mask, packed, this.seq_len, most, reference)


def tokens_consumed_before(recipe: Recipe, name: str) -> dict[str, int]:
    """Tokens of each source that the stages from which `name` descends have trained on; it goes on from there.

    Exact where those stages have the same seq_len, or this one's divides theirs; else less than one row is passed over.
    """
    used: dict[str, int] = {}
    chain = []
    parent = recipe.stages[name].init_from
    while parent in recipe.stages:
        chain.append(parent)
        parent = recipe.stages[parent].init_from
    for parent in reversed(chain):
        stage = recipe.stages[parent]
        if stage.kind == "pretrain":
            names = sources_of(stage)
            weights = [[stage.mixture[n][phase] for n in names] for phase in range(len(stage.phase_start_tokens))]
            starts = [tokens // stage.seq_len for tokens in stage.phase_start_tokens]
            rows = _budget_steps(recipe, parent) * stage.batch_size
            for n, count in zip(names, StagedMixture(weights, starts, rows).used(rows).tolist(), strict=True):
                first = -(-used.get(n, 0) // stage.seq_len)
                used[n] = (first + count) * stage.seq_len
    return used


def _budget_steps(recipe: Recipe, name: str) -> int:
    """Steps of a stage whose budget is in steps or tokens."""
    this = recipe.stages[name]
    return this.steps or max(1, this.tokens // (this.seq_len * this.batch_size))


def _shuffle_block(recipe: Recipe, source: str, seq_len: int, rows: int) -> int:
    """Rows of a source that stay together when it is shuffled: those of the longest row that any stage reads from it.

    So a stage with longer or shorter rows goes on in the same order of the source's text.  A source is shuffled row by row
    where that would leave little to shuffle, or more than a per cent of it for the end of each epoch.
    """
    lengths = [s.seq_len for s in recipe.stages.values() if s.kind == "pretrain" and any(s.mixture.get(source, ()))]
    run = math.lcm(*lengths) // seq_len
    return run if rows >= run * MIN_BLOCKS and rows % run <= rows // 100 else 1


def _seed(seed: int, *names: str) -> int:
    return zlib.crc32(" ".join(map(str, (seed, *names))).encode())


def _load_packing(
    stage: str, source: str, kind: str, tokens: Store, mask: Store, manifest: Manifest, seq_len: int, cache: Path
) -> packing.Packing:
    """The pack index of dialogues or pairs, from the cache where it is there; says what it wastes."""
    lengths, pairs = tokens.lengths, kind == "dpo"
    units = len(lengths) // 2 if pairs else len(lengths)
    path = cache / f"pack-{files.fingerprint(manifest.content, kind, seq_len, units)}.npz"
    packed = _read_packing(path, units)
    if packed is None:
        packed = packing.pack(tokens, mask, seq_len, pairs)
        with files.disk_errors(cache, "data"), files.atomic_path(path) as temporary, temporary.open("wb") as f:
            np.savez(f, starts=packed.starts, units=packed.units, dropped=packed.dropped)
    print(f"stage {stage}: {packing.describe_packing(packed, lengths, seq_len, pairs, source)}", file=sys.stderr)
    return packed


def _read_packing(path: Path, units: int) -> packing.Packing | None:
    """A pack index from the cache; none where it is not there or damaged, which is told."""
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
