"""What a data card says of the sources of a stage: how much, from where, what was dropped, under which licences."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from tanuki_jax import files
from tanuki_jax.config.schema import Recipe
from tanuki_jax.data import sources
from tanuki_jax.data.prepare import open_store
from tanuki_jax.recipe.artifacts import Artifacts
from tanuki_jax.recipe.source_files import SourceFiles

SAMPLES = 3  # rows of each source that the card shows
NOT_NAMED = "not named"


def describe_sources(recipe: Recipe, artifacts: Artifacts) -> dict[str, dict[str, Any]]:
    """Of each source that was prepared: `files`, `kind`, `rows`, `tokens`, `rejected`, `dropped`, `licenses`, `samples`."""
    return {
        name: _describe(recipe.data[name].files, artifacts.stores[name], located) for name, located in artifacts.sources.items()
    }


def _describe(address: str, store: Path, located: SourceFiles) -> dict[str, Any]:
    manifest, _, _ = open_store(store)
    return {
        "files": address,
        "kind": manifest.kind,
        "rows": manifest.rows,
        "tokens": manifest.tokens,
        "rejected": manifest.rejected,
        "dropped": _dropped(located),
        "licenses": _licenses(located),
        "samples": _samples(located),
    }


def _dropped(located: SourceFiles) -> dict[str, int]:
    """Rows that the making and filters left out, by reason."""
    count: Counter[str] = Counter()
    for path in located.counts:
        counts = files.read_json(path)
        count.update(counts["dropped"])
        count.update(counts.get("filtered", {}))
    return dict(count)


def _licenses(located: SourceFiles) -> dict[str, int]:
    """Rows by the licences of the models and seeds that they come from; only rows that a model has made name them."""
    count: Counter[str] = Counter()
    for row in sources.read_rows(located.files, located.fields, sources.skip_silently) if located.generated else ():
        calls = row.fields.get("provenance") or [{}]
        names = {call.get("license") or NOT_NAMED for call in calls} | {call.get("seed_license", "") for call in calls}
        count[", ".join(sorted(names - {""}))] += 1
    return dict(count)


def _samples(located: SourceFiles) -> list[Any]:
    if located.files.endswith(".bin"):
        return []
    rows = sources.read_rows(located.files, located.fields, sources.skip_silently)
    return [row.fields for row in itertools.islice(rows, SAMPLES)]
