"""Makes the rows of a recipe's `synth`: seeds to items, items through a chain to rows, rows through filters to a file."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tanuki_jax import endpoint, files
from tanuki_jax.config.derived import made_seeds, making_order
from tanuki_jax.config.schema import Recipe
from tanuki_jax.config.synthesis import METHODS, PAIRS, Endpoint, Filters, Synth, has_prices, roles
from tanuki_jax.data.filters import filter_files
from tanuki_jax.data.filters.filtering import make_checks
from tanuki_jax.errors import UserError
from tanuki_jax.synth import identity, methods, report, seeds, weak_fields
from tanuki_jax.synth.asking import Context
from tanuki_jax.synth.seeds import Item

ROWS, SKIPPED, REPORT, TEXT = "rows.jsonl", "skipped.jsonl", "report.json", "report.txt"
ANSWERS, FILTERS = "answers", "filters"  # directories: all answers with the rows before filters, and what these leave
DROPPED, JUDGE = "dropped.jsonl", "judge"  # in those directories; judge: what a filter's judge has said
ROW_COUNTS = ("complete", "rows", "dropped", "rows_sha256")  # counts of endpoint.run that a report has of its own
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

    def check_rows(self) -> None:
        """An error, with the reasons, where not one row is left."""
        if self.report.get("rows") == 0:
            directory = self.rows.parent
            skipped = [(str(row["outcome"]), row) for row in _read(directory / SKIPPED)]
            raise UserError(
                f"synth {self.report['name']}: {report.no_rows(skipped)}; correct the settings and remove {directory}"
            )


@dataclass(frozen=True)
class Items:
    """Pairs (id, item) of all different seeds' combinations; every iteration starts from the beginning."""

    seeds: seeds.Seeds

    def __iter__(self) -> Iterator[tuple[str, Item]]:
        used: set[str] = set()
        for item in self.seeds.items():
            if item["id"] not in used:
                used.add(item["id"])
                yield item["id"], item


@dataclass(frozen=True)
class Work:
    """One entry, ready to be asked for: its endpoints by role, its items, and the two fingerprints of identity.py."""

    name: str
    context: Context
    endpoints: Mapping[str, Endpoint]
    items: Items
    requests_id: str
    rows_id: str

    @property
    def label(self) -> str:
        return f"synth {self.name}"


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
    order = making_order(recipe, [name] if name else recipe.synth)
    for entry in order:
        methods.check(recipe, entry)
    for entry in order:
        waits_for = [other for other in made_seeds(recipe.synth[entry]) if not sources[other].is_file()]
        if waits_for:  # in a dry run
            sources[entry] = root / entry / ROWS
            result.append(Summary(sources[entry], {"name": entry, "waits_for": ", ".join(waits_for)}))
            continue
        summary = make(recipe, entry, root / entry, sources=sources, dry_run=dry_run)
        sources[entry] = summary.rows
        result.append(summary)
        summary.check_rows()
    return result


def make(
    recipe: Recipe,
    name: str,
    directory: Path,
    *,
    sources: Mapping[str, Path] | None = None,
    generator_url: str = "",
    generator_id: str = "",
    scores: Path | None = None,
    dry_run: bool = False,
) -> Summary:
    """Makes the rows of one entry in `directory`; rows that are there are not made again.

    Args:
      sources: files of the rows of other entries, for seeds synth:NAME.
      generator_url: address of a server of a synth stage's own model, which takes the place of the generator's address; a
        generator in `endpoints` then gives the sampling alone.
      generator_id: fingerprint of that model's weights: another model is asked anew.
      scores: a file of scores by category, in place of the entry's `scores`.
      dry_run: only look at the seeds and count what would be asked.

    Raises:
      UserError: bad settings, seeds or templates, rows that were made with other settings, too many failures, or a budget that
        is spent; after the last two the same call goes on.
      Preempted: a signal came; the same call goes on.
    """
    synth = recipe.synth[name]
    context = methods.context_of(synth, name)
    endpoints = _endpoints(recipe, name, generator_url)
    filters = recipe.filters.get(synth.filters)
    scores = scores or (Path(synth.scores) if synth.scores else None)
    weak = weak_fields.weakest(scores, synth.weakest) if scores else ()
    makers = seeds.Makers(recipe.seed, synth.items or recipe.rules.dialogues, sources or {})
    rows_id = identity.of_rows(recipe, name, context, endpoints, makers, weak, generator_id)
    if not dry_run and (directory / ROWS).is_file():
        return _read_report(directory, name, rows_id)
    loaded = seeds.load(METHODS[synth.method].seeds, synth.seeds, synth.items, f"{recipe.seed} {name}", makers, weak)
    requests_id = identity.of_requests(recipe, name, generator_id)
    work = Work(name, context, endpoints, Items(loaded), requests_id, rows_id)
    plan = {
        "name": name,
        "method": synth.method,
        "gives": METHODS[synth.method].gives,
        "fingerprint": rows_id,
        "weak_fields": list(weak),
        "items": loaded.count,
        "combinations": loaded.combinations,
        "invalid_seeds": loaded.invalid,
    }
    if dry_run:
        return Summary(directory / ROWS, {**plan, "at_most": _estimate(work)})
    if filters is not None:
        make_checks(filters)  # so that what cannot work is known before anything is asked
    with files.disk_errors(directory, work.label, (OSError,)):
        requests = _ask(work, directory / ANSWERS).to_json()
        plan["requests"] = {field: value for field, value in requests.items() if field not in ROW_COUNTS}
        return _write(synth, filters, recipe.endpoints.get(filters.judge) if filters else None, directory, plan)


def _endpoints(recipe: Recipe, name: str, generator_url: str) -> dict[str, Endpoint]:
    """Role -> endpoint; the generator of a synth stage is the server at `generator_url`, with the endpoint's sampling."""
    result = {}
    for role, choice in roles(recipe.synth[name]).items():
        settings = recipe.endpoints[choice] if choice else Endpoint()
        if role == "generator" and generator_url:
            settings = dataclasses.replace(settings, base_url=generator_url)
        if not settings.base_url:
            raise UserError(
                f"config: synth.{name}.{role} is {choice!r}, which has no address; name an endpoint with a base_url: only a "
                "stage of kind synth has a model of its own"
            )
        result[role] = settings
    return result


def _ask(work: Work, directory: Path) -> endpoint.Summary:
    """Asks all there is to ask; what has failed is tried again, and in the end left out where it is little."""
    synth = work.context.synth
    names = roles(synth)
    chain = methods.CHAINS[synth.method](work.context)
    for share in MAX_FAILED:
        summary = endpoint.run(
            work.items,
            chain,
            {role: endpoint.Client(value, names[role] or role) for role, value in work.endpoints.items()},
            directory,
            recipe=work.requests_id,
            version=work.rows_id,
            budget=endpoint.Budget(synth.max_calls, synth.max_tokens, synth.max_cost),
            label=work.label,
            total=work.items.seeds.count,
            max_failed=share,
        )
        if summary.complete:
            return summary
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.failed.most_common())
    raise UserError(
        f"{work.label}: {summary.failed.total():,} of {summary.items:,} items have failed ({reasons}), more than "
        f"{MAX_FAILED[-1]:.0%}; {directory / 'failed.jsonl'} has the reasons. All answers are saved: look at the server, and the "
        "same command goes on"
    )


def _estimate(work: Work) -> dict[str, Any]:
    """Requests, tokens and money (None where no price is set), as if every answer were as long as it may be."""

    def reply(job: endpoint.Job) -> str:
        tokens = int(job.settings(work.endpoints[job.role])["max_tokens"])
        return f"{job.step} {job.sample} " + "あ" * tokens

    chain = methods.CHAINS[work.context.synth.method](dataclasses.replace(work.context, dry_run=True))
    estimate = dataclasses.asdict(endpoint.estimate(work.items, chain, work.endpoints, reply=reply))
    return estimate if has_prices(work.endpoints.values()) else {**estimate, "cost": None}


def _write(synth: Synth, filters: Filters | None, judge: Endpoint | None, directory: Path, plan: dict[str, Any]) -> Summary:
    """Writes skipped rows, report and rows; the rows last, for where they are, all is done."""
    answers, rows = directory / ANSWERS, directory / ANSWERS / ROWS
    summary = dict(plan)
    if METHODS[synth.method].gives == PAIRS:
        summary["preferences"] = report.preferences(_prompts(answers))
    if filters is not None:
        rows = _filter(rows, filters, judge, directory / FILTERS) / ROWS
    places = {"dropped": answers} | ({"filtered": directory / FILTERS} if filters else {})
    counts: dict[str, Counter[str]] = {part: Counter() for part in places}
    files.write_jsonl(directory / SKIPPED, (row for part in places for row in _read_drops(places[part], counts[part])))
    summary |= {part: dict(count.most_common()) for part, count in counts.items()}
    with rows.open("rb") as f:
        summary["rows"] = sum(1 for _ in f)
    files.write_json(directory / REPORT, summary)
    files.write_text(directory / TEXT, report.text(summary) + "\n")
    with files.atomic_path(directory / ROWS) as temporary:
        _link(rows, temporary)
    return Summary(directory / ROWS, summary)


def _filter(rows: Path, filters: Filters, judge: Endpoint | None, directory: Path) -> Path:
    """What the filters leave, in `directory`; what a run left there that did not come to its end is filtered again.

    The settings may be others than that run's; what its judge has said is found by what it was asked, and used again.
    """
    if directory.is_dir():
        answers = directory.with_name(f".{directory.name}.{JUDGE}")
        if (directory / JUDGE).is_dir() and not answers.exists():
            (directory / JUDGE).rename(answers)
        shutil.rmtree(directory)
    filter_files(str(rows), filters, directory, judge=judge)
    return directory


def _prompts(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each prompt why it gave no pair, or nothing, and what was written of it."""
    yield from (("", row) for row in _read(directory / ROWS))
    yield from ((record["reason"], record.get("row") or {}) for record in _read(directory / DROPPED))


def _read_drops(directory: Path, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """What was dropped, with the reason, which is counted."""
    for record in _read(directory / DROPPED):
        counts[record["reason"]] += 1
        yield {"outcome": record["reason"], **(record.get("row") or {})}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as f:
        yield from (json.loads(line) for line in f)


def _link(source: Path, target: Path) -> None:
    """A second name of a file that nobody writes to again, or a copy where the disk has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _read_report(directory: Path, name: str, rows_id: str) -> Summary:
    stored = files.read_json(directory / REPORT)
    if stored["fingerprint"] != rows_id:
        raise UserError(
            f"synth: {directory / ROWS} was made with other settings or seeds; rows are never made again: give the new ones "
            f"another name than {name}, or remove {directory}"
        )
    return Summary(directory / ROWS, stored)
