"""Rows through the filters of a config, one by one: every drop has one reason."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from tanuki_jax.config.synthesis import Filters
from tanuki_jax.config.validate_synth import check_filters
from tanuki_jax.data.filters import evaluation, language, leaks, near_duplicates, personal, repetition
from tanuki_jax.data.filters.texts import Texts, change_texts, texts_of
from tanuki_jax.data.sources import Row

# In the order in which they are applied; the first that a row fails is its reason.
REASONS = (
    *("invalid", "empty", "min_characters", "max_characters", "language", "leaks", "repetition", "evaluation", "pii"),
    *("near_duplicates", "dependent_turns", "min_quality", "no_verdict"),
)
Check: TypeAlias = tuple[str, Callable[[Texts], str]]  # a reason, and what says why a text is dropped for it; empty = it is not
OnDrop: TypeAlias = Callable[[Row, str, str], None]  # called with a row, the reason, and a detail of it


def ignore_drop(row: Row, reason: str, detail: str) -> None:
    """An OnDrop that does nothing."""


def make_checks(filters: Filters) -> list[Check]:
    """The checks of single rows: whether there is anything, and what a config switches on, cheap ones first."""
    checks: list[Check] = [("empty", lambda texts: "" if texts.trains else "nothing in it is trained on")]
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
    check_filters(filters)
    checks = make_checks(filters)
    mask = _make_mask(collections.Counter() if masked is None else masked) if filters.pii == "mask" else None
    index = near_duplicates.Index(filters.near_duplicates) if filters.near_duplicates else None
    if index:
        mask_other = _make_mask(collections.Counter()) if mask else None
        for row in against:
            index.find(texts_of(change_texts(row, mask_other) if mask_other else row).whole, row.where)
    for row in rows:
        texts = texts_of(row)
        reason, detail = next(((reason, detail) for reason, check in checks if (detail := check(texts))), ("", ""))
        if reason:
            on_drop(row, reason, detail)
            continue
        if mask:
            row = change_texts(row, mask)
            texts = texts_of(row)
        if index and (duplicate := index.find(texts.whole, row.where)):
            on_drop(row, "near_duplicates", duplicate)
            continue
        yield row


def _make_mask(counts: collections.Counter[str]) -> Callable[[str], str]:
    find = personal.make_finder()
    return lambda text: personal.mask(text, find(text), counts)
