"""Makes the rows of a recipe's `synth`: seeds to items, items through a chain to rows, rows through filters to a file."""

from __future__ import annotations

import dataclasses
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


@dataclass(frozen=True)
class Asked:
    """What the runner came back with: rows in the order of the items, and its counts."""

    rows: list[Row]
    report: Mapping[str, Any]


def make_all(recipe: Recipe, root: Path, name: str = "", dry_run: bool = False) -> list[Summary]:
    """Makes every entry of `synth`, or one and those whose rows are its seeds, each in a directory of `root`."""
    if not recipe.synth:
        raise UserError(
            "config: the recipe has no `synth`; add one, for example c.synth.dialogues = config.synth('persona', ...)"
        )
    if name and name not in recipe.synth:
        raise UserError(f"--name: synth has no {name!r}; it has {', '.join(recipe.synth)}")
    sources: dict[str, Path] = {}
    result = []
    for entry in ordered(recipe, [name] if name else list(recipe.synth)):
        summary = make(recipe, entry, root / entry, sources=sources, dry_run=dry_run)
        sources[entry] = summary.rows
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
    sources: Mapping[str, Path] | None = None,
    generator_url: str = "",
    scores: Path | None = None,
    dry_run: bool = False,
) -> Summary:
    """Makes the rows of one entry in `directory`; rows that are there are not made again.

    Args:
      sources: files of the rows of other entries, for seeds synth:NAME.
      generator_url: address of a server of a synth stage's own model, which takes the place of the generator's address; a
        generator in `endpoints` then gives the sampling alone.
      scores: a file of scores by category, in place of the entry's `scores`.
      dry_run: only look at the seeds and count what would be asked.

    Raises:
      UserError: bad settings, seeds or templates, or rows that were made with other settings.
      Preempted: the budget is spent or a signal came; the same call goes on.
    """
    synth = methods.check(recipe, name, bool(generator_url))
    context = Context(synth, templates.load(synth.method, synth.language, synth.templates))
    methods.check_styles(context, f"config: synth.{name}")
    scores = scores or (Path(synth.scores) if synth.scores else None)
    weak = weak_fields.weakest(scores, synth.weakest) if scores else ()
    endpoints = _endpoints(recipe, synth, generator_url)
    fingerprint = _fingerprint(recipe, name, context, endpoints, weak)
    if not dry_run and (directory / ROWS).is_file():
        return _made_before(directory, name, fingerprint)
    origin = seeds.Origin(recipe.seed, synth.items or recipe.rules.dialogues, sources or {})
    method = methods.METHODS[synth.method]
    loaded = seeds.load(method.seeds, synth.seeds, synth.items, f"{recipe.seed} {name}", origin, weak)
    summary = {
        "name": name,
        "method": synth.method,
        "gives": method.gives,
        "fingerprint": fingerprint,
        "weak_fields": list(weak),
        "items": loaded.count,
        "combinations": loaded.combinations,
        "invalid_seeds": loaded.skipped,
    }
    asked = _run(context, loaded, endpoints, directory, dry_run)
    if dry_run:
        return Summary(directory / ROWS, {**summary, **asked.report})
    return _write(context, recipe.filters.get(synth.filters), directory, asked, summary)


def different(items: Iterable[Item]) -> Iterator[Item]:
    """The items without those that are the same as an earlier one."""
    used: set[str] = set()
    for item in items:
        if item["id"] not in used:
            used.add(item["id"])
            yield item


def apply_filters(rows: list[Row], filters: Filters) -> tuple[list[Row], list[Row]]:
    """The rows that pass the filters, and the others with the reason as their `outcome`."""
    # TO WIRE: call the filters of tanuki_jax.data here once they are there; nothing else in this package knows them.
    raise UserError("config: synth filters cannot be applied yet; leave synth.NAME.filters empty")


def _write(context: Context, filters: Filters | None, directory: Path, asked: Asked, summary: dict[str, Any]) -> Summary:
    """Writes rows, skipped rows and report; the rows last, for where they are, all is done."""
    rows, skipped = report.by_outcome(asked.rows)
    filtered: list[Row] = []
    unfiltered = len(rows)
    counts = report.preferences(rows, skipped) if methods.METHODS[context.synth.method].gives == methods.PAIRS else None
    if filters is not None:
        rows, filtered = apply_filters(rows, filters)
    summary = {
        **summary,
        **asked.report,
        "without_row": report.outcomes(skipped),
        "rows_before_filters": unfiltered,
        "filtered": report.outcomes(filtered),
        "rows": len(rows),
    }
    if counts:
        summary["preferences"] = counts
    files.write_jsonl(directory / SKIPPED, [*skipped, *filtered])
    files.write_json(directory / REPORT, summary)
    files.write_text(directory / TEXT, report.text(summary) + "\n")
    files.write_jsonl(directory / ROWS, rows)
    return Summary(directory / ROWS, summary)


def _endpoints(recipe: Recipe, synth: Synth, generator_url: str) -> dict[str, Endpoint]:
    """Role -> endpoint; the generator of a synth stage is the server at `generator_url`, with the endpoint's sampling."""
    result = {}
    for role, name in methods.roles(synth).items():
        endpoint = recipe.endpoints[name] if name else Endpoint()
        if role == "generator" and generator_url:
            endpoint = dataclasses.replace(endpoint, base_url=generator_url)
        if not endpoint.base_url:
            raise UserError(f"config: endpoints.{name}.base_url is empty; give the address of its API")
        result[role] = endpoint
    return result


def _fingerprint(recipe: Recipe, name: str, context: Context, endpoints: Mapping[str, Endpoint], weak: tuple[str, ...]) -> str:
    """A hash of all settings that the rows depend on; keys that may change in a resumed run are none of them."""
    groups: dict[str, Any] = {"synth": context.synth, **endpoints}
    if context.synth.filters:
        groups["filters"] = recipe.filters[context.synth.filters]
    settings = {
        group: {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if not f.metadata["resumable"]}
        for group, value in groups.items()
    }
    return files.fingerprint(name, recipe.seed, settings, context.templates.version, list(weak))


def _made_before(directory: Path, name: str, fingerprint: str) -> Summary:
    stored = files.read_json(directory / REPORT)
    if stored["fingerprint"] != fingerprint:
        raise UserError(
            f"synth: {directory / ROWS} was made with other settings; rows are never made again: give the new ones another name "
            f"than {name}, or remove {directory}"
        )
    return Summary(directory / ROWS, stored)


def _run(context: Context, loaded: seeds.Seeds, endpoints: Mapping[str, Endpoint], directory: Path, dry_run: bool) -> Asked:
    raise NotImplementedError
