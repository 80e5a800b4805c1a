"""A uniform sample of a corpus, its labels, and what they say of the whole.

The output directory holds audit.json (settings), sample.jsonl, labels.jsonl (a line for each label, the last one of a row
counts), page.html, and result.json.  The same command goes on with it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tanuki_jax import files
from tanuki_jax.data import paths, sources
from tanuki_jax.data.audit import shares
from tanuki_jax.data.audit.categories import Category
from tanuki_jax.data.filters.texts import texts_of
from tanuki_jax.endpoint.log import LineLog, read_rows
from tanuki_jax.errors import UserError
from tanuki_jax.progress import Progress

MAX_CHARACTERS = 20_000  # of a sampled row; the rest of it is cut off


class Sampled(NamedTuple):
    """A row of the sample."""

    number: int
    where: str
    text: str


@dataclass(frozen=True)
class Audit:
    """A sample on disk, to be labelled."""

    directory: Path
    categories: tuple[Category, ...]
    sample: tuple[Sampled, ...]
    rows: int  # of the corpus

    @property
    def names(self) -> list[str]:
        """The categories' names."""
        return [category.name for category in self.categories]

    def labels(self) -> dict[int, str]:
        """Number -> category, of the rows that have been labelled."""
        return {number: str(label["category"]) for number, label in self.last_labels().items()}

    def last_labels(self) -> dict[int, dict[str, Any]]:
        """Number -> the last line of labels.jsonl about it, with its category and who set it (`by`)."""
        path = self.directory / "labels.jsonl"
        result: dict[int, dict[str, Any]] = {}
        for _, label in read_rows(path) if path.is_file() else ():
            number, category = label.get("number"), label.get("category")
            if isinstance(number, int) and 0 <= number < len(self.sample) and category in self.names:
                result[number] = label
        return result

    def add_label(self, number: int, category: str, by: str = "hand") -> None:
        """Appends a label as a whole line; by: hand, or the judge's model."""
        if category not in self.names or not 0 <= number < len(self.sample):
            raise UserError(f"audit: no row {number} or no category {category!r}")
        with contextlib.closing(LineLog(self.directory / "labels.jsonl")) as log:
            log.append({"number": number, "category": category, "by": by})

    def finish(self) -> dict[str, Any]:
        """The shares of the labels so far, written to result.json and returned."""
        labels = self.labels()
        result = {
            "rows": self.rows,
            "sample": len(self.sample),
            "labelled": len(labels),
            "shares": shares.shares(labels.values(), self.names),
        }
        files.write_json(self.directory / "result.json", result)
        return result


def open_audit(
    patterns: str,
    directory: Path,
    size: int,
    seed: int,
    categories: Sequence[Category],
    fields: sources.Fields = sources.PLAIN,
    quiet: bool = False,
) -> Audit:
    """The audit in `directory`: a sample of `size` rows of the files, drawn there where it is not there yet.

    The sample is a pure function of the rows, `size` and `seed`, in random order: its beginning is a smaller sample.
    """
    directory = Path(directory)
    settings = {
        "input": patterns,
        "identity": sources.identity(patterns),
        "size": size,
        "seed": seed,
        "fields": list(fields),
        "categories": [list(category) for category in categories],
    }
    path, sample = directory / "audit.json", directory / "sample.jsonl"
    stored = files.read_json(path) if path.is_file() else {}
    for name, value in settings.items() if stored else ():
        if stored.get(name) != value:
            difference = "the files have changed" if name == "identity" else f"{name} differs"
            raise UserError(f"--output: {directory} holds another audit ({difference}); name a new directory")
    if not stored:
        files.remove_unfinished(path)
        if directory.exists() and any(directory.iterdir()):
            raise UserError(f"--output: {directory} is there already, and holds no audit; name a new directory or remove it")
    if not stored or not sample.is_file():  # a kill may have come between the two
        drawn, rows = draw_sample(patterns, size, seed, fields, quiet)
        if not drawn:
            raise UserError(f"audit: {patterns} holds no rows")
        stored = {**settings, "rows": rows}
        files.write_json(path, stored)
        files.write_jsonl(sample, (row._asdict() for row in drawn))
    return Audit(directory, tuple(categories), tuple(Sampled(**row) for row in files.read_jsonl(sample)), stored["rows"])


def draw_sample(patterns: str, size: int, seed: int, fields: sources.Fields, quiet: bool = True) -> tuple[list[Sampled], int]:
    """A uniform sample of the rows of files without replacement, in random order, and how many rows there are.

    One pass, in the memory of the sample (algorithm R of Vitter, 1985).
    """
    progress = Progress("sample", sum(map(paths.bytes_of, sources.matching_files(patterns))), "MB", 1e6, quiet)
    random_numbers = random.Random(seed)
    reservoir: list[sources.Row] = []
    count = 0
    for count, row in enumerate(_rows(patterns, fields, progress), 1):
        if len(reservoir) < size:
            reservoir.append(row)
        elif (place := random_numbers.randrange(count)) < size:
            reservoir[place] = row
    random_numbers.shuffle(reservoir)
    return [Sampled(i, row.where, texts_of(row).whole[:MAX_CHARACTERS]) for i, row in enumerate(reservoir)], count


def _rows(patterns: str, fields: sources.Fields, progress: Progress) -> Iterator[sources.Row]:
    for row in sources.read_rows(patterns, fields, sources.skip_silently):
        progress.show(row.bytes_read)
        yield row
