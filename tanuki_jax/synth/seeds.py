"""What the items of made rows begin with: personas, tasks, topics, documents and prompts, of files, of lists of ours, or made.

An item is one combination of seeds (a persona and a task).  Items are drawn from all combinations without replacement, by
arithmetic alone: memory holds the drawn ones, not the millions that were not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import blake2b
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tanuki_jax import files
from tanuki_jax.config.synthesis import BUILTIN_PREFIX, LANGUAGES, RULES_PREFIX, SYNTH_PREFIX
from tanuki_jax.errors import UserError
from tanuki_jax.synth import rules
from tanuki_jax.synth.draw import draw

logger = logging.getLogger(__name__)

Item: TypeAlias = dict[str, Any]  # id, the seeds by their field, and where they have them: category, meta, license
Seed: TypeAlias = dict[str, Any]  # one row of a list of seeds
OnBadRow: TypeAlias = Callable[[str, str], None]

FIELDS = {"personas": "persona", "tasks": "task", "topics": "topic", "documents": "document", "prompts": "messages"}
LISTS = {f"{kind}_{lang}": (kind, lang) for kind in ("personas", "tasks", "topics") for lang in LANGUAGES}
MORE = ("category", "family", "license", "meta")  # fields that come along
_LISTS = Path(__file__).parent / "lists"
REPEATS = 20  # rule-made prompts that are looked at for each different one


class Makers(NamedTuple):
    """What a name in `seeds` refers to where it names no files: the rules' settings, and rows that models have written."""

    seed: int = 0  # of the recipe
    prompts: int = 0  # the number that rules make
    rows: Mapping[str, Path] = {}  # files, by their name in `synth`


@dataclass
class BadRows:
    """Rows of seed files that could not be read, and the first of them."""

    count: int = 0
    first: str = ""

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        self.first = self.first or f"{where} {reason}"


@dataclass
class Axis:
    """One list of seeds: `read` gives its rows in order, from the beginning at every call."""

    kind: str
    name: str
    read: Callable[[OnBadRow], Iterator[Seed]]
    invalid: BadRows = field(default_factory=BadRows)
    count: int = 0

    def look(self) -> None:
        """Counts the rows, and those that cannot be read."""
        self.invalid = BadRows()
        self.count = sum(1 for _ in self.read(self.invalid.add))

    def pick(self, numbers: Collection[int]) -> dict[int, Seed]:
        """The rows of these numbers."""
        if not numbers:
            return {}
        rows = islice(self.read(lambda where, reason: None), max(numbers) + 1)
        return {number: row for number, row in enumerate(rows) if number in numbers}


@dataclass(frozen=True)
class Seeds:
    """The lists of seeds of made rows, looked through once."""

    axes: tuple[Axis, ...]
    key: str  # of the random order
    limit: int  # of items; 0 = all

    @property
    def combinations(self) -> int:
        """How many items there could be."""
        return prod(axis.count for axis in self.axes) if self.axes else self.limit

    @property
    def count(self) -> int:
        """How many items there are."""
        return min(self.limit or self.combinations, self.combinations)

    @property
    def invalid(self) -> int:
        """Rows that could not be read."""
        return sum(axis.invalid.count for axis in self.axes)

    def items(self) -> Iterator[Item]:
        """The items, always the same ones in the same order; all combinations come in the order of the lists."""
        if not self.axes:
            yield from (_item({"number": number}) for number in range(self.count))
            return
        if self.count < self.combinations:
            places, rows = self._draws
            yield from (_item(*(rows[i][n] for i, n in enumerate(place))) for place in places)
            return
        first, *others = self.axes
        lists = [axis.pick(range(axis.count)) for axis in others]
        per_row = prod(len(rows) for rows in lists)
        for row in first.read(lambda where, reason: None):
            for number in range(per_row):
                place = self._places(number)[1:]
                yield _item(row, *(lists[i][n] for i, n in enumerate(place)))

    @cached_property
    def _draws(self) -> tuple[list[tuple[int, ...]], list[dict[int, Seed]]]:
        """The combinations that are drawn, and the rows of each list that they need; the files are read for them once."""
        places = [self._places(number) for number in draw(self.count, self.combinations, self.key)]
        return places, [axis.pick({place[i] for place in places}) for i, axis in enumerate(self.axes)]

    def _places(self, number: int) -> tuple[int, ...]:
        """A combination's row in each list."""
        places = []
        for axis in reversed(self.axes):
            number, place = divmod(number, axis.count)
            places.append(place)
        return tuple(reversed(places))


def load(
    kinds: Collection[str], names: Mapping[str, str], limit: int, key: str, makers: Makers, weak: Collection[str] = ()
) -> Seeds:
    """The lists of seeds `kinds`, each where `names` says.

    Args:
      limit: number of items; 0 = every combination.
      key: of the random order in which items are drawn.
      weak: categories; rows of the lists with categories that have none of these are left out.

    Raises:
      UserError: a list is missing, has no row that can be read, or none of the weak categories.
    """
    axes = tuple(_axis(kind, names[kind], makers, weak) for kind in kinds)
    if not axes and not limit:
        raise UserError("synth: without seeds there is no end; set items to the number of rows")
    for axis in axes:
        try:
            axis.look()
        except UserError as error:
            if str(error).startswith("synth:"):
                raise
            raise UserError(f"synth: seeds.{axis.kind}: {str(error).removeprefix('data: ')}") from error
        if axis.invalid.count:
            logger.warning("synth: %s: %d rows are left out; %s", axis.name, axis.invalid.count, axis.invalid.first)
        if not axis.count:
            raise _no_row(axis, axis.invalid)
    return Seeds(_only_weak(axes, weak) if weak else axes, key, limit)


def _no_row(axis: Axis, invalid: BadRows) -> UserError:
    reason = f": {invalid.first}" if invalid.first else ""
    return UserError(f"synth: seeds.{axis.kind} {axis.name!r} has no row that can be read{reason}")


def _only_weak(axes: tuple[Axis, ...], weak: Collection[str]) -> tuple[Axis, ...]:
    """The lists without the rows of other categories."""
    present: set[str] = set()
    for axis in axes:
        categories = {category_of(row) for row in axis.read(lambda where, reason: None)} - {""}
        present |= categories
        if categories:
            axis.read = partial(_select, axis.read, frozenset(weak))
            axis.look()
    if not present.intersection(weak):
        shown = ", ".join(sorted(present)) or "none: give each row a `category`"
        raise UserError(f"synth: no seed is of the weakest categories ({', '.join(weak)}); the seeds' categories: {shown}")
    return axes


def _select(read: Callable[[OnBadRow], Iterator[Seed]], weak: frozenset[str], on_bad: OnBadRow) -> Iterator[Seed]:
    return (row for row in read(on_bad) if category_of(row) in weak)


def category_of(row: Mapping[str, Any]) -> str:
    """The category of a seed or item: its `category` or `family`, or that in its `meta`; empty where it has none."""
    meta = row.get("meta")
    for group in (row, meta if isinstance(meta, Mapping) else {}):
        for name in ("category", "family"):
            if isinstance(group.get(name), str):
                return str(group[name])
    return ""


def _item(*rows: Seed) -> Item:
    merged: Item = {}
    for row in rows:
        merged |= row
    licenses = sorted({str(row["license"]) for row in rows if "license" in row})
    merged |= {"license": ", ".join(licenses)} if licenses else {}
    text = json.dumps(merged, ensure_ascii=False, sort_keys=True)
    return {"id": blake2b(text.encode(), digest_size=8).hexdigest(), **merged}


# --- where seeds come from --------------------------------------------------------------------------------------------


def check(kind: str, name: str) -> None:
    """A UserError where a list that no stage makes is not there, or no row of it can be read; little of a file is read."""
    invalid = BadRows()
    axis = _axis(kind, name, Makers(prompts=1), ())
    if next(axis.read(invalid.add), None) is None:
        raise _no_row(axis, invalid)


def identity(name: str, makers: Makers) -> str:
    """A fingerprint of what a list of seeds holds: of files as they lie there, of lists and rules as this version has them."""
    from tanuki_jax.data import sources

    if name.startswith(BUILTIN_PREFIX):
        paths = [path for path in (_LISTS / f"{name.removeprefix(BUILTIN_PREFIX)}{end}" for end in (".txt", ".jsonl"))]
        return files.fingerprint(*(path for path in paths if path.is_file()))
    if name.startswith(RULES_PREFIX):
        return files.fingerprint(makers.seed, makers.prompts, *rules.code_files())
    if name.startswith(SYNTH_PREFIX):
        return files.fingerprint(makers.rows[name.removeprefix(SYNTH_PREFIX)])
    return sources.identity(name)


def _axis(kind: str, name: str, makers: Makers, weak: Collection[str]) -> Axis:
    where = f"synth: seeds.{kind}"
    if name.startswith(BUILTIN_PREFIX):
        return Axis(kind, name, partial(_builtin, kind, name.removeprefix(BUILTIN_PREFIX)))
    if name.startswith(RULES_PREFIX):
        if (kind, name) != ("prompts", f"{RULES_PREFIX}{rules.PROMPTS}"):
            raise UserError(f"{where} is {name!r}; the only one that rules make is prompts = {RULES_PREFIX + rules.PROMPTS!r}")
        return Axis(kind, name, partial(_rule_prompts, makers, frozenset(weak)))
    if name.startswith(SYNTH_PREFIX):
        source = name.removeprefix(SYNTH_PREFIX)
        if source not in makers.rows:
            raise UserError(f"{where} is {name!r}, which is not made yet; known here: {', '.join(makers.rows) or 'none'}")
        return Axis(kind, name, partial(_of_files, kind, str(makers.rows[source])))
    if not name:
        raise UserError(
            f"{where} is empty; name files, {BUILTIN_PREFIX}NAME, {RULES_PREFIX}{rules.PROMPTS} or {SYNTH_PREFIX}NAME"
        )
    return Axis(kind, name, partial(_of_files, kind, name))


def _builtin(kind: str, name: str, on_bad: OnBadRow) -> Iterator[Seed]:
    if LISTS.get(name, ("", ""))[0] != kind:
        options = (
            ", ".join(BUILTIN_PREFIX + other for other, (of_kind, _) in LISTS.items() if of_kind == kind) or "none of this kind"
        )
        raise UserError(f"synth: seeds.{kind}: there is no list {BUILTIN_PREFIX + name!r}; there is {options}")
    field_name = FIELDS[kind]
    if kind == "topics":
        lines = (_LISTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        yield from (json.loads(line) | {"license": "apache-2.0"} for line in lines)
    else:
        lines = (_LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        yield from ({field_name: line, "license": "apache-2.0"} for line in lines)


def _rule_prompts(makers: Makers, weak: frozenset[str], on_bad: OnBadRow) -> Iterator[Seed]:
    """Different prompts of the training side of the rules, of the weak families where any is weak; none is held out."""
    families = weak.intersection(rules.FAMILIES) or rules.FAMILIES.keys()
    used: set[str] = set()
    for row in rules.rows(rules.PROMPTS, REPEATS * makers.prompts, makers.seed):
        text = json.dumps(row["messages"])
        if text not in used and row["meta"]["family"] in families:
            used.add(text)
            yield row | {"license": "apache-2.0"}
        if len(used) == makers.prompts:
            return


def _of_files(kind: str, patterns: str, on_bad: OnBadRow) -> Iterator[Seed]:
    from tanuki_jax.data import conversation, sources

    field_name = FIELDS[kind]
    names = conversation.Columns(field_name, *MORE, "text", "messages", "prompt")
    for where, record in sources.read_records(patterns, names, on_bad):
        lines = record["text"].splitlines() if where.endswith(".txt") and kind != "documents" else None
        if lines is not None:
            yield from (_seed(kind, {"text": line.strip()}) for line in lines if line.strip())
            continue
        try:
            yield _seed(kind, record)
        except UserError as error:
            on_bad(where, str(error))


def _seed(kind: str, record: Mapping[str, Any]) -> Seed:
    """The seed in a record; a UserError where there is none."""
    more = {name: record[name] for name in MORE if record.get(name)}
    field_name = FIELDS[kind]
    if kind == "prompts":
        return {field_name: _prompt(record), **more}
    value = record.get(field_name, record.get("text"))
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"has no text in {field_name!r} or 'text' (fields: {', '.join(map(str, record))})")
    return {field_name: value.strip(), **more}


def _prompt(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a prompt, up to the last of the user's; of a dialogue the last answer is left out."""
    from tanuki_jax.data import conversation

    if "prompt" in record:
        messages = conversation.as_messages(record["prompt"], "user")
    elif set(record) - set(MORE) == {"text"}:
        messages = conversation.as_messages(record["text"], "user")
    else:
        fields = conversation.read_fields(record)
        if "messages" not in fields:
            raise UserError(f"is no prompt (fields: {', '.join(map(str, record))})")
        messages = [*fields["messages"]]
    conversation.check_messages(messages)
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages or not all(isinstance(message["content"], str) and message["content"].strip() for message in messages):
        raise UserError("has no question of the user that is text")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
