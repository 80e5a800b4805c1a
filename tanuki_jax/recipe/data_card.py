"""What a data card says of the sources of a stage: how much, from where, what was dropped, under which licences."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from tanuki_jax import files
from tanuki_jax.config.schema import Recipe
from tanuki_jax.data import sources
from tanuki_jax.data.prepare import open_store
from tanuki_jax.errors import UserError
from tanuki_jax.recipe.artifacts import Artifacts
from tanuki_jax.recipe.source_files import SourceFiles

SAMPLES = 3  # rows of each source that the card shows


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
        "dropped": _dropped(located.files),
        "licenses": _licenses(located.files),
        "samples": _samples(located),
    }


def _dropped(path: str) -> dict[str, int]:
    """Rows that filters or the making left out, by reason, from the counts beside the rows."""
    count: Counter[str] = Counter()
    if Path(path).name == "rows.jsonl":
        for name, key in (("summary.json", "dropped"), ("report.json", "dropped"), ("report.json", "filtered")):
            with contextlib.suppress(OSError, KeyError, UserError):
                count.update(files.read_json(Path(path).with_name(name))[key])
    return dict(count)


def _licenses(path: str) -> dict[str, int]:
    """Rows by what their provenance names as the licence of the models and seeds that they come from."""
    count: Counter[str] = Counter()
    if Path(path).name == "rows.jsonl":
        with Path(path).open(encoding="utf-8") as lines:
            for line in lines:
                calls = json.loads(line).get("provenance") or []
                count[", ".join(sorted({call.get("license") or "not named" for call in calls})) or "not named"] += 1
    return dict(count)


def _samples(located: SourceFiles) -> list[Any]:
    if located.files.endswith(".bin"):
        return []
    rows = sources.read_rows(located.files, located.fields, sources.skip_silently)
    return [row.fields for row in itertools.islice(rows, SAMPLES)]
