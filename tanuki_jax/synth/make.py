"""Makes the rows of a recipe's `synth`: seeds to items, items through a chain to rows, rows through filters to a file."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tanuki_jax import files
from tanuki_jax.config.schema import Recipe
from tanuki_jax.config.synthesis import Endpoint, Filters, Synth
from tanuki_jax.errors import UserError
from tanuki_jax.synth import methods, report, seeds, templates, weak_fields
from tanuki_jax.synth.asking import Context, Row
from tanuki_jax.synth.seeds import Item

ROWS, SKIPPED, REPORT, TEXT = "rows.jsonl", "skipped.jsonl", "report.json", "report.txt"


@dataclass(frozen=True)
class Summary:
    """What came of one entry: the file of its rows (in a dry run not there), and the counts."""

    rows: Path
    report: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The report as lines."""
        return report.text(self.report)


def make_all(recipe: Recipe, root: Path, name: str = "", dry_run: bool = False) -> list[Summary]:
    """Makes every entry of `synth`, or one and those whose rows are its seeds, each in a directory of `root`."""
    if not recipe.synth:
        raise UserError("config: the recipe has no `synth`; add one, for example c.synth.dialogues = config.synth('persona', ...)")
    if name and name not in recipe.synth:
        raise UserError(f"--name: synth has no {name!r}; it has {', '.join(recipe.synth)}")
    made: dict[str, Path] = {}
    result = []
    for entry in ordered(recipe, [name] if name else list(recipe.synth)):
        summary = make(recipe, entry, root / entry, made=made, dry_run=dry_run)
        made[entry] = summary.rows
        result.append(summary)
    return result


def ordered(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """Entries, each after those whose rows it reads."""
    result: list[str] = []

    def add(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise UserError(f"config: synth: {' -> '.join((*path, name))} read each other's rows in a circle; mend their seeds")
        for value in recipe.synth[name].seeds.values():
            other = value.removeprefix(seeds.SYNTH)
            if value.startswith(seeds.SYNTH) and other in recipe.synth:
                add(other, (*path, name))
        if name not in result:
            result.append(name)

    for name in names:
        add(name, ())
    return result


def make(
    recipe: Recipe,
    name: str,
    directory: Path,
    *,
    made: Mapping[str, Path] | None = None,
    generator_url: str = "",
    scores: Path | None = None,
    dry_run: bool = False,
) -> Summary:
    """Makes the rows of one entry in `directory`; rows that are there are not made again.

    Args:
      made: files of the rows of other entries, for seeds synth:NAME.
      generator_url: address of a server of a synth stage's own model, for an entry without a generator.
      scores: a file of scores by category, in place of the entry's `scores`.
      dry_run: only look at the seeds and count what would be asked.

    Raises:
      UserError: bad settings, seeds or templates, or rows that were made with other settings.
      Preempted: the budget is spent or a signal came; the same call goes on.
    """
    synth = methods.check(recipe, name, bool(generator_url))
    context = Context(synth, templates.load(synth.method, synth.language, synth.templates))
    methods.check_styles(context, f"config: synth.{name}")
    file = scores or (Path(synth.scores) if synth.scores else None)
    weak = weak_fields.weakest(file, synth.weakest) if file else ()
    endpoints = _endpoints(recipe, synth, generator_url)
    fingerprint = _fingerprint(recipe, context, endpoints, weak)
    if not dry_run and (directory / ROWS).is_file():
        return _made_before(directory, name, fingerprint)
    loaded = _load_seeds(recipe, name, synth, made or {}, weak)
    head = {
        "name": name,
        "method": synth.method,
        "fingerprint": fingerprint,
        "weak_fields": list(weak),
        "items": loaded.count,
        "combinations": loaded.combinations,
        "invalid_seeds": loaded.skipped,
    }
    raise NotImplementedError(head)


def _load_seeds(
    recipe: Recipe, name: str, synth: Synth, made: Mapping[str, Path], weak: tuple[str, ...]
) -> seeds.Seeds:
    prompts = synth.items or recipe.rules.dialogues
    origin = seeds.Origin(recipe.seed, prompts, made)
    kinds = methods.METHODS[synth.method].seeds
    return seeds.load(kinds, synth.seeds, synth.items, f"{recipe.seed} {name}", origin, weak)
