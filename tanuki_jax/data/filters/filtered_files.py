"""Files through the filters of a config: what passes, what is dropped with its reason, and how much of each."""

from __future__ import annotations

import collections
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tanuki_jax import files
from tanuki_jax.config.synthesis import Endpoint, Filters
from tanuki_jax.config.validate_synth import check_filters
from tanuki_jax.data import paths, sources
from tanuki_jax.data.filters.filtering import REASONS, filter_rows
from tanuki_jax.data.filters.personal import LABELS
from tanuki_jax.data.sources import Row
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tanuki_jax.progress import Progress

ROWS, DROPPED, SUMMARY, JUDGE = "rows.jsonl", "dropped.jsonl", "summary.json", "judge"


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

    Raises:
      UserError: input, settings or endpoint are wrong, or rows have no verdict yet; the same call asks for theirs alone.
      Preempted: a signal came while the judge was asked; its answers are recorded.
    """
    check_filters(filters)
    if against and not filters.near_duplicates:
        raise UserError("filters: --against is for near-duplicates; give --near_duplicates, 0.8 for example, too")
    asks = filters.min_quality > 0 or filters.dependent_turns
    if asks and judge is None:
        raise UserError(
            f"filters: there is no endpoint {filters.judge!r} to judge; add it to `endpoints`, or name it (--judge)"
        )
    output = Path(output)
    answers = output.with_name(f".{output.name}.{JUDGE}")
    with lock.output(output), files.disk_errors(output, "data", (OSError,)), files.atomic_path(output) as temporary:
        temporary.mkdir()
        with _Writer(temporary, filters) as writer:
            total = sum(map(paths.bytes_of, sources.matching_files(patterns)))
            rows = _read(patterns, fields, writer, skip_invalid, Progress("filter", total, "MB", 1e6, quiet))
            others = sources.read_rows(against, fields, sources.skip_silently) if against else ()
            for row in filter_rows(rows, filters, writer.drop, others, writer.masked):
                writer.write(row)
            if asks and judge:
                _judge(temporary, writer, filters, judge, answers, quiet)
        files.write_json(temporary / SUMMARY, writer.finish().as_json())
    if asks:
        shutil.rmtree(answers, ignore_errors=True)
    return writer.summary


class _Writer(contextlib.ExitStack):
    """The files of an output, and the counts."""

    def __init__(self, directory: Path, filters: Filters) -> None:
        super().__init__()
        self.summary = Summary(filters=asdict(filters))
        self.masked: collections.Counter[str] = collections.Counter()
        self._dropped: collections.Counter[str] = collections.Counter()
        self._rows, self._drops = (self.enter_context((directory / name).open("wb")) for name in (ROWS, DROPPED))
        self._places = self.enter_context(tempfile.TemporaryFile(dir=directory))  # of the rows, for those that a judge drops

    def write(self, row: Row) -> None:
        self._rows.write(files.json_line(row.fields))
        self._places.write(files.json_line(row.where))
        self.summary.passed += 1

    def drop(self, row: Row, reason: str, detail: str) -> None:
        self._drop(row.where, reason, detail, row.fields)

    def drop_invalid(self, where: str, reason: str) -> None:
        """A row that cannot be read."""
        self.summary.rows += 1
        self._drop(where, "invalid", reason, None)

    def flush(self) -> None:
        """Makes the rows readable for others."""
        self._rows.flush()

    def take_out(self, path: Path, reasons: Iterable[tuple[str, str]]) -> None:
        """Drops rows that are written: `reasons` has the reason and detail of each row of `path`; empty = it stays."""
        self._places.seek(0)
        with files.atomic_path(path) as temporary, path.open("rb") as f, temporary.open("wb") as g:
            for line, where, (reason, detail) in zip(f, self._places, reasons, strict=True):
                if reason:
                    self._drop(json.loads(where), reason, detail, json.loads(line))
                    self.summary.passed -= 1
                else:
                    g.write(line)

    def _drop(self, where: str, reason: str, detail: str, row: object) -> None:
        self._dropped[reason] += 1
        self._drops.write(files.json_line({"reason": reason, "detail": detail, "where": where, "row": row}))

    def finish(self) -> Summary:
        """The counts in their order."""
        self.summary.dropped = {reason: self._dropped[reason] for reason in REASONS if self._dropped[reason]}
        self.summary.masked = {kind: self.masked[kind] for kind in LABELS if self.masked[kind]}
        return self.summary


def _read(patterns: str, fields: sources.Fields, writer: _Writer, skip_invalid: bool, progress: Progress) -> Iterator[Row]:
    for row in sources.read_rows(patterns, fields, writer.drop_invalid if skip_invalid else None):
        writer.summary.rows += 1
        progress.show(row.bytes_read)
        yield row


def _judge(directory: Path, writer: _Writer, filters: Filters, judge: Endpoint, answers: Path, quiet: bool) -> None:
    """Takes the rows out of rows.jsonl that the judge does not pass."""
    from tanuki_jax.data.filters import judged

    writer.flush()
    path = directory / ROWS
    writer.take_out(path, judged.judge_file(path, writer.summary.passed, filters, judge, answers, quiet))
    shutil.copytree(answers, directory / JUDGE, ignore=shutil.ignore_patterns(".*"))
