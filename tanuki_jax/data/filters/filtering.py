"""Rows through the filters of a config: every drop has one reason, and is counted and kept."""

from __future__ import annotations

import collections
import json
import shutil
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tanuki_jax import files
from tanuki_jax.config.synthesis import Endpoint, Filters
from tanuki_jax.data import paths, sources
from tanuki_jax.data.filters import evaluation, language, leaks, near_duplicates, personal, repetition
from tanuki_jax.data.filters.texts import Texts, change_texts, texts_of
from tanuki_jax.data.sources import Row
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tanuki_jax.progress import Progress

# In the order in which they are applied; the first that a row fails is its reason.
REASONS = (
    *("invalid", "min_characters", "max_characters", "language", "leaks", "repetition", "evaluation", "pii"),
    *("near_duplicates", "dependent_turns", "min_quality", "no_verdict"),
)
Check: TypeAlias = tuple[str, Callable[[Texts], str]]  # a reason, and what says why a text is dropped for it; empty = it is not
OnDrop: TypeAlias = Callable[[Row, str, str], None]  # called with a row, the reason, and a detail of it
LANGUAGES = ("", "ja", "en")


def ignore_drop(row: Row, reason: str, detail: str) -> None:
    """An OnDrop that does nothing."""


@dataclass
class Summary:
    """What filters did to the rows of files."""

    rows: int = 0
    passed: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # by reason, in the order of REASONS
    masked: dict[str, int] = field(default_factory=dict)  # pieces of personal information, by kind
    filters: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{'rows':18s} {self.rows:10,d}"]
        lines += [f"  {reason:16s} {count:10,d} {count / max(1, self.rows):7.1%}" for reason, count in self.dropped.items()]
        lines += [f"{'passed':18s} {self.passed:10,d} {self.passed / max(1, self.rows):7.1%}"]
        lines += [f"masked {kind:11s} {count:10,d}" for kind, count in self.masked.items()]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The fields, and the share of rows that passed."""
        return {**asdict(self), "share_passed": self.passed / max(1, self.rows)}


def check_settings(filters: Filters) -> None:
    """Refuses filters that cannot work as they are set."""
    if filters.language not in LANGUAGES:
        raise UserError(f"filters: language is {filters.language!r}; it must be ja or en, or empty for any")
    if filters.max_characters and filters.max_characters < filters.min_characters:
        raise UserError(f"filters: max_characters {filters.max_characters} is below min_characters {filters.min_characters}")
    if filters.pii not in ("none", "mask", "drop"):
        raise UserError(f"filters: pii is {filters.pii!r}; it must be none, mask or drop")
    if (filters.min_quality or filters.dependent_turns) and not filters.judge:
        raise UserError("filters: min_quality and dependent_turns ask a judge; name one of `endpoints` as judge (--judge)")


def make_checks(filters: Filters) -> list[Check]:
    """The checks of single rows that a config switches on, cheap ones first."""
    checks: list[Check] = []
    if filters.min_characters:
        checks.append(("min_characters", lambda texts: _too_short(texts, filters.min_characters)))
    if filters.max_characters:
        checks.append(("max_characters", lambda texts: _too_long(texts, filters.max_characters)))
    if filters.language:
        check_language = language.make_check(filters.language)
        checks.append(("language", lambda texts: _first(map(check_language, texts.answers))))
    if filters.leaks:
        checks.append(("leaks", lambda texts: _first(map(leaks.find_leak, texts.answers))))
    if filters.repetition:
        checks.append(("repetition", lambda texts: _first(repetition.find_repetition(a.text) for a in texts.answers)))
    if filters.evaluation:
        index = evaluation.open_index(filters.evaluation, filters.evaluation_ngram)
        checks.append(("evaluation", lambda texts: evaluation.find_prompt(texts, index)))
    if filters.pii == "drop":
        find = personal.make_finder()
        checks.append(("pii", lambda texts: ", ".join(sorted({f.kind for part in texts.parts for f in find(part)}))))
    return checks


def _first(details: Iterable[str]) -> str:
    return next(filter(None, details), "")


def _too_short(texts: Texts, minimum: int) -> str:
    shortest = min((len(answer.text.strip()) for answer in texts.answers), default=0)
    return f"{shortest} characters" if shortest < minimum else ""


def _too_long(texts: Texts, maximum: int) -> str:
    longest = max((len(answer.text.strip()) for answer in texts.answers), default=0)
    return f"{longest} characters" if longest > maximum else ""


def filter_rows(
    rows: Iterable[Row],
    filters: Filters,
    on_drop: OnDrop = ignore_drop,
    against: Iterable[Row] = (),
    masked: collections.Counter[str] | None = None,
) -> Iterator[Row]:
    """The rows that pass every filter but those that ask a judge (`judged` has them), one by one, in order.

    on_drop: called once for each other row.
    against: rows of other sets; near-duplicates of them are dropped, too.
    masked: counts pieces of personal information by kind, where `pii` is mask.

    Raises:
      UserError: a setting is wrong, a library of the extra `quality` is missing, or a row holds tokens.
    """
    check_settings(filters)
    checks = make_checks(filters)
    find = personal.make_finder() if filters.pii == "mask" else None
    counts = collections.Counter[str]() if masked is None else masked
    index = near_duplicates.Index(filters.near_duplicates) if filters.near_duplicates else None

    def mask(text: str) -> str:
        return personal.mask(text, find(text), counts) if find else text

    for row in against if index else ():
        index.find(texts_of(change_texts(row, mask) if find else row).whole, row.where)  # type: ignore[union-attr]
    if find:
        counts.clear()
    for row in rows:
        texts = texts_of(row)
        reason, detail = next(((reason, detail) for reason, check in checks if (detail := check(texts))), ("", ""))
        if reason:
            on_drop(row, reason, detail)
            continue
        if find:
            row = change_texts(row, mask)
            texts = texts_of(row)
        if index and (duplicate := index.find(texts.whole, row.where)):
            on_drop(row, "near_duplicates", duplicate)
            continue
        yield row


def filter_files(
    patterns: str,
    filters: Filters,
    output: Path,
    *,
    against: str = "",
    fields: sources.Fields = sources.PLAIN,
    skip_invalid: bool = False,
    judge: Endpoint | None = None,
    quiet: bool = False,
) -> Summary:
    """Filters the rows of files into output/rows.jsonl, with output/dropped.jsonl and output/summary.json beside it.

    against: globs of other sets; near-duplicates of their rows are dropped, too.
    skip_invalid: rows that cannot be read are dropped as `invalid`; otherwise they are an error.
    judge: the endpoint that `filters.judge` names, where min_quality or dependent_turns is set; its answers are recorded in a
      hidden directory beside `output` until that is whole, then in output/judge.

    The directory appears whole or not at all.  dropped.jsonl has a line {"reason", "detail", "where", "row"} for each row.
    """
    check_settings(filters)
    asks = filters.min_quality > 0 or filters.dependent_turns
    if asks and judge is None:
        raise UserError(
            f"filters: there is no endpoint {filters.judge!r} to judge; add it to `endpoints`, or name it (--judge)"
        )
    output = Path(output)
    summary = Summary(filters=asdict(filters))
    dropped: collections.Counter[str] = collections.Counter()
    masked: collections.Counter[str] = collections.Counter()
    progress = Progress("filter", sum(map(paths.bytes_of, sources.matching_files(patterns))), "MB", 1e6, quiet)
    with lock.output(output), files.disk_errors(output, "data"), files.atomic_path(output) as temporary:
        temporary.mkdir()
        rows_path = temporary / "rows.jsonl"
        with rows_path.open("w", encoding="utf-8") as f, (temporary / "dropped.jsonl").open("w", encoding="utf-8") as g:

            def write_dropped(where: str, reason: str, detail: str, row: object) -> None:
                dropped[reason] += 1
                g.write(_line({"reason": reason, "detail": detail, "where": where, "row": row}))

            def on_drop(row: Row, reason: str, detail: str) -> None:
                write_dropped(row.where, reason, detail, row.fields)

            def on_bad_row(where: str, reason: str) -> None:
                summary.rows += 1
                write_dropped(where, "invalid", reason, None)

            def read() -> Iterator[Row]:
                for row in sources.read_rows(patterns, fields, on_bad_row if skip_invalid else None):
                    summary.rows += 1
                    progress.show(row.bytes_read)
                    yield row

            others = sources.read_rows(against, fields, sources.skip_silently) if against else ()
            places: list[str] = []
            for row in filter_rows(read(), filters, on_drop, others, masked):
                f.write(_line(row.fields))
                if asks:
                    places.append(row.where)
                summary.passed += 1
            f.flush()
            if asks and judge:
                from tanuki_jax.data.filters import judged

                directory = output.with_name(f".{output.name}.judge")
                drops = judged.judge_file(rows_path, summary.passed, filters, judge, directory, quiet)
                _remove(rows_path, drops, lambda number, row: write_dropped(places[number], *drops[number], row))
                summary.passed -= len(drops)
                shutil.copytree(directory, temporary / "judge", ignore=shutil.ignore_patterns(".lock"))
        summary.dropped = {reason: dropped[reason] for reason in REASONS if dropped[reason]}
        summary.masked = {kind: masked[kind] for kind in personal.LABELS if masked[kind]}
        files.write_json(temporary / "summary.json", summary.as_json())
    if asks:
        shutil.rmtree(output.with_name(f".{output.name}.judge"), ignore_errors=True)
    return summary


def _remove(path: Path, numbers: Container[int], on_row: Callable[[int, object], None]) -> None:
    """Takes lines out of a file of JSON lines; each is handed to `on_row`."""
    with files.atomic_path(path) as temporary, path.open(encoding="utf-8") as f, temporary.open("w", encoding="utf-8") as g:
        for number, line in enumerate(f):
            if number in numbers:
                on_row(number, json.loads(line))
            else:
                g.write(line)


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
