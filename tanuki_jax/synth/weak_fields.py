"""Which categories a model is weak in, by a file of its scores (section 4.4 of the paper: make data for what is weak)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tanuki_jax.errors import UserError

GROUPS = ("categories", "families", "scores")  # where files of ours and of others have the scores


def weakest(path: Path, count: int) -> tuple[str, ...]:
    """The `count` categories with the lowest scores, the lowest first; equal ones by name.

    The file is JSON: {category: score}, or such an object under `categories`, `families` or `scores`, as the done.json of a
    stage has it.  What is no number is passed over.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"synth: scores {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"synth: scores {path} is not JSON: {error}") from error
    scores = _scores(document)
    if not scores:
        raise UserError(
            f"synth: scores {path} has no scores by category; write {{'category': score}}, or that under `families`"
        )
    return tuple(sorted(scores, key=lambda name: (scores[name], name))[:count])


def _scores(document: object) -> dict[str, float]:
    if not isinstance(document, Mapping):
        return {}
    for group in GROUPS:
        if isinstance(document.get(group), Mapping):
            return _scores(document[group])
    return {
        str(name): float(value)
        for name, value in document.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
