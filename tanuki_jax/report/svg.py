"""Pictures as SVG: the backend of matplotlib, and what all pictures of the report share."""

from __future__ import annotations

import io
import unicodedata
from typing import Any, NotRequired, TypeAlias, TypedDict

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

matplotlib.use("svg")
import matplotlib.pyplot as plt

__all__ = ["WIDTH", "Rows", "Scores", "StageEntry", "plt", "shorten", "to_svg"]

Rows: TypeAlias = list[dict[str, Any]]  # of metrics.jsonl
WIDTH = 7.2  # inches of a picture: 690 pixels, which a phone shows in two screens, with letters of 12 pixels


class Scores(TypedDict, total=False):
    """Scores of a stage; those that were not asked for are absent."""

    exact_match: float
    pair_accuracy: float
    families: dict[str, float]


class StageEntry(TypedDict):
    """What the pictures read of a stage in summary.json."""

    name: str
    kind: str
    tokens: int
    scores: Scores
    learning_rate_range: NotRequired[dict[str, float]]
    synth: NotRequired[dict[str, Any]]  # counts of the rows that the stage generated


def to_svg(figure: Figure) -> Markup:
    """The <svg> element of a figure, which is closed."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])


def shorten(name: str, width: int = 20) -> str:
    """A name whose middle is left out where it is wider than `width` letters; a Japanese letter counts as two."""
    widths = [1 + (unicodedata.east_asian_width(letter) in "WF") for letter in name]
    if sum(widths) <= width:
        return name
    begin, end = 0, len(name)
    while sum(widths[: begin + 1]) + sum(widths[end - 1 :]) < width:  # one letter more at each end, as long as they fit
        begin, end = begin + 1, end - 1
    return f"{name[:begin]}…{name[end:]}"
