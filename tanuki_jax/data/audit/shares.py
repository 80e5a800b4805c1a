"""Shares of categories in a sample, with intervals."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from typing import TypedDict

Z = 1.959963984540054  # of 95 %


class Share(TypedDict):
    """A category's part of a corpus, with a Wilson interval of 95 %."""

    category: str
    count: int
    share: float
    low: float
    high: float


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `count` of `total` were seen (Wilson, 1927); (0, 1) where none was."""
    if not total:
        return 0.0, 1.0
    share, square = count / total, Z * Z / total
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square * square / 4) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def shares(labels: Iterable[str], categories: Sequence[str]) -> list[Share]:
    """The share of each category among labels, the largest first."""
    counts = collections.Counter(labels)
    total = sum(counts.values())
    result = []
    for category in categories:
        low, high = wilson(counts[category], total)
        count = counts[category]
        result.append(Share(category=category, count=count, share=count / total if total else 0.0, low=low, high=high))
    return sorted(result, key=lambda share: -share["count"])


def table(result: Sequence[Share], sample: int) -> str:
    """The shares as lines of text; sample: rows of the sample, labelled or not."""
    total = sum(share["count"] for share in result)
    lines = [f"{'category':24s} {'rows':>6s} {'share':>7s}   95 % interval"]
    lines += [f"{s['category']:24s} {s['count']:6d} {s['share']:7.1%}   {s['low']:.1%} to {s['high']:.1%}" for s in result]
    return "\n".join([*lines, f"{total} of {sample} sampled rows are labelled"])
