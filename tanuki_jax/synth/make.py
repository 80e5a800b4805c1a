"""Makes the rows of a recipe's `synth`: seeds to items, items through a chain to rows, rows through filters to a file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tanuki_jax import endpoint, files
from tanuki_jax.config.schema import Recipe
from tanuki_jax.config.synthesis import Endpoint, Filters, Synth
from tanuki_jax.data.filters import filter_files, filter_rows
from tanuki_jax.errors import Preempted, UserError
from tanuki_jax.synth import methods, report, seeds, templates, weak_fields
from tanuki_jax.synth.asking import Context
from tanuki_jax.synth.seeds import Item

ROWS, SKIPPED, REPORT, TEXT = "rows.jsonl", "skipped.jsonl", "report.json", "report.txt"
ASKED, FILTERED = "asked", "filtered"  # directories: all answers with the rows before filters, and what these leave
OF_ROWS = ("complete", "rows", "dropped", "rows_sha256")  # the runner's counts that this file makes itself
# Shares of the items that may have failed at each attempt; what has failed is tried again by the next one.
MAX_FAILED = (0.0, 0.0, 0.02)


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
class Items:
    """Pairs (id, item) of all different seeds' combinations; every iteration starts from the beginning."""

    loaded: seeds.Seeds

    def __iter__(self) -> Iterator[tuple[str, Item]]:
        used: set[str] = set()
        for item in self.loaded.items():
            if item["id"] not in used:
                used.add(item["id"])
                yield item["id"], item


def make_all(recipe: Recipe, root: Path, name: str = "", dry_run: bool = False) -> list[Summary]:
    """Makes every entry of `synth`, or one and those whose rows are its seeds, each in a directory of `root`.

    An entry of which not one row is left is an error: its settings hardly fit its model.
    """
    if not recipe.synth:
        raise UserError(
            "config: the recipe has no `synth`; add one, for example c.synth.dialogues = config.synth('persona', ...)"
        )
    if name and name not in recipe.synth:
        raise UserError(f"--name: synth has no {name!r}; it has {', '.join(recipe.synth)}")
    sources: dict[str, Path] = {}
    result = []
    for entry in ordered(recipe, [name] if name else list(recipe.synth)):
        waits_for = [other for other, rows in sources.items() if f"{seeds.SYNTH}{other}" in recipe.synth[entry].seeds.values()]
        if dry_run and not all(sources[other].is_file() for other in waits_for):
            sources[entry] = root / entry / ROWS
            result.append(Summary(sources[entry], {"name": entry, "waits_for": ", ".join(waits_for)}))
            continue
        summary = make(recipe, entry, root / entry, sources=sources, dry_run=dry_run)
        sources[entry] = summary.rows
        result.append(summary)
        if summary.report.get("rows") == 0:
            skipped = [(str(row["outcome"]), row) for row in _read(root / entry / SKIPPED)]
            raise UserError(f"synth {entry}: {report.no_rows(skipped)}; correct the settings and remove {root / entry}")
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
    context = context_of(synth)
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
    begun = {
        "name": name,
        "method": synth.method,
        "gives": method.gives,
        "fingerprint": fingerprint,
        "weak_fields": list(weak),
        "items": loaded.count,
        "combinations": loaded.combinations,
        "invalid_seeds": loaded.skipped,
    }
    if dry_run:
        return Summary(directory / ROWS, {**begun, "at_most": _estimate(context, loaded, endpoints)})
    filters = recipe.filters.get(synth.filters)
    if filters is not None:
        deque(filter_rows([], filters), maxlen=0)  # so that what cannot work is known before anything is asked
    label = f"synth {name}"
    with files.disk_errors(directory, label, (OSError,)):
        asked = _ask(context, loaded, endpoints, directory / ASKED, fingerprint, label)
        counts = {field: value for field, value in asked.to_json().items() if field not in OF_ROWS}
        judge = recipe.endpoints.get(filters.judge) if filters else None
        return _write(context, filters, judge, directory, {**begun, "asked": counts})


def context_of(synth: Synth) -> Context:
    """An entry with its templates."""
    return Context(synth, templates.load(synth.method, synth.language, synth.templates))


def _ask(
    context: Context,
    loaded: seeds.Seeds,
    endpoints: Mapping[str, Endpoint],
    directory: Path,
    fingerprint: str,
    label: str,
) -> endpoint.Summary:
    """Asks all there is to ask; what has failed is tried again, and in the end left out where it is little."""
    synth = context.synth
    names = methods.roles(synth)
    chain = methods.METHODS[synth.method].chain(context)
    budget = endpoint.Budget(synth.max_calls, synth.max_tokens, synth.max_cost)
    for share in MAX_FAILED:
        summary = endpoint.run(
            Items(loaded),
            chain,
            {role: endpoint.Client(value, names[role] or role) for role, value in endpoints.items()},
            directory,
            recipe=fingerprint,
            budget=budget,
            label=label,
            total=loaded.count,
            max_failed=share,
        )
        if summary.complete:
            return summary
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.failed.most_common())
    raise Preempted(f"{label}: {summary.failed.total():,} of {summary.items:,} items have failed ({reasons}); see {directory}")


def _estimate(context: Context, loaded: seeds.Seeds, endpoints: Mapping[str, Endpoint]) -> dict[str, Any]:
    """Requests, tokens and money, as if every answer were as long as it may be."""
    other = {"ja": "en", "en": "ja"}[context.synth.language]
    words = {"ja": "あ", "en": "word"}

    def reply(job: endpoint.Job) -> str:
        language = other if job.step == "translation" else context.synth.language
        tokens = int(job.settings(endpoints[job.role])["max_tokens"])
        return f"{words[language] * 8} {job.step} {job.sample} {words[language] * tokens}"

    chain = methods.METHODS[context.synth.method].chain(context)
    return dataclasses.asdict(endpoint.estimate(Items(loaded), chain, endpoints, reply=reply))


def _write(
    context: Context, filters: Filters | None, judge: Endpoint | None, directory: Path, summary: dict[str, Any]
) -> Summary:
    """Writes rows, skipped rows and report; the rows last, for where they are, all is done."""
    rows = directory / ASKED / ROWS
    dropped = [(str(record["reason"]), record.get("row") or {}) for record in _read(directory / ASKED / "dropped.jsonl")]
    summary["dropped"] = dict(Counter(reason for reason, _ in dropped).most_common())
    if methods.METHODS[context.synth.method].gives == methods.PAIRS:
        summary["preferences"] = report.preferences([*_read(rows)], dropped)
    if filters is not None:
        output = directory / FILTERED
        if not output.is_dir():
            filter_files(str(rows), filters, output, judge=judge)
        rows = output / ROWS
        filtered = [(str(record["reason"]), record.get("row") or {}) for record in _read(output / "dropped.jsonl")]
        summary["filtered"] = dict(Counter(reason for reason, _ in filtered).most_common())
        dropped += filtered
    summary["rows"] = sum(1 for _ in _read(rows))
    files.write_jsonl(directory / SKIPPED, ({"outcome": reason, **row} for reason, row in dropped))
    files.write_json(directory / REPORT, summary)
    files.write_text(directory / TEXT, report.text(summary) + "\n")
    with files.atomic_path(directory / ROWS) as temporary:
        shutil.copyfile(rows, temporary)
    return Summary(directory / ROWS, summary)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as f:
        yield from (json.loads(line) for line in f)


def _endpoints(recipe: Recipe, synth: Synth, generator_url: str) -> dict[str, Endpoint]:
    """Role -> endpoint; the generator of a synth stage is the server at `generator_url`, with the endpoint's sampling."""
    result = {}
    for role, name in methods.roles(synth).items():
        settings = recipe.endpoints[name] if name else Endpoint()
        if role == "generator" and generator_url:
            settings = dataclasses.replace(settings, base_url=generator_url)
        if not settings.base_url:
            raise UserError(f"config: endpoints.{name}.base_url is empty; give the address of its API")
        result[role] = settings
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
