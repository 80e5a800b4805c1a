"""What came of made rows: what was left out and why, and of preferences how the judge behaved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tanuki_jax.synth import verdicts
from tanuki_jax.synth.asking import Row


def preferences(pairs: Sequence[Row], dropped: Sequence[tuple[str, Row]]) -> dict[str, Any]:
    """Counts of prompts and of verdicts, position bias and length bias.

    Every share is of what stands beside it, and None where that is nothing: `retention` of the prompts, `agreement` and
    `position_bias` of the comparisons that could be read in both orders, `chosen_longer` of the pairs.

    Args:
      pairs: rows to train on.
      dropped: the reasons of the prompts that gave no pair, and what was written of them.
    """
    compared = [record for row in (*pairs, *(row for _, row in dropped)) for record in row.get("meta", {}).get("verdicts", ())]
    counts = {name: 0 for name in verdicts.OUTCOMES} | dict(Counter(record["outcome"] for record in compared))
    readable = len(compared) - counts[verdicts.UNPARSABLE] - counts[verdicts.FAILED]
    lengths = [(_characters(row["chosen"]), _characters(row["rejected"])) for row in pairs]
    biased = counts[verdicts.FIRST] + counts[verdicts.SECOND]
    return {
        "prompts": len(pairs) + len(dropped),
        "pairs": len(pairs),
        "retention": _share(len(pairs), len(pairs) + len(dropped)),
        "without_pair": dict(Counter(reason for reason, _ in dropped).most_common()),
        "comparisons": len(compared),
        "verdicts": counts,
        "agreement": _share(counts[verdicts.AGREED], readable),
        "position_bias": {
            "share": _share(biased, readable),
            "first": counts[verdicts.FIRST],
            "second": counts[verdicts.SECOND],
        },
        "length_bias": {
            "chosen_longer": _share(sum(a > b for a, b in lengths), len(lengths)),
            "equal": _share(sum(a == b for a, b in lengths), len(lengths)),
            "chosen_characters": _mean([a for a, _ in lengths]),
            "rejected_characters": _mean([b for _, b in lengths]),
        },
    }


def no_rows(dropped: Sequence[tuple[str, Row]]) -> str:
    """Why there is not one row: the counts by reason, and the message of the most frequent one."""
    if not dropped:
        return "no item has given a row"
    counts = Counter(reason for reason, _ in dropped).most_common()
    message = next((str(row["message"]) for reason, row in dropped if reason == counts[0][0] and row.get("message")), "")
    shown = ", ".join(f"{reason} {count:,}" for reason, count in counts)
    return f"not one row is left: {shown}" + (f" ({message})" if message else "")


def _characters(messages: Sequence[Mapping[str, str]]) -> int:
    return sum(len(m["content"]) for m in messages)


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _mean(values: Sequence[int]) -> float | None:
    return round(sum(values) / len(values), 1) if values else None


def text(report: Mapping[str, Any], indent: str = "") -> str:
    """A report as lines, nested counts under their names."""
    lines = []
    for name, value in report.items():
        if isinstance(value, Mapping):
            inner = text(value, indent + "  ")
            lines.append(f"{indent}{name}:" + (f"\n{inner}" if inner else " none"))
        else:
            shown = (
                "-" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
            )
            lines.append(f"{indent}{name}: {shown}")
    return "\n".join(lines)
