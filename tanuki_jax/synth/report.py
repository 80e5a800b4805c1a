"""What came of made rows: what was left out and why, and of preferences how the judge behaved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tanuki_jax.synth import verdicts
from tanuki_jax.synth.asking import Row


def preferences(prompts: Iterable[tuple[str, Row]]) -> dict[str, Any]:
    """Counts of prompts and of verdicts, position bias and length bias, of one pass over the rows.

    Every share is of what stands beside it, and None where that is nothing: `retention` of the prompts, `agreement` and
    `position_bias` of the comparisons that could be read in both orders, `chosen_longer` of the pairs.  `unusable` counts
    samples that no comparison saw, by reason.

    Args:
      prompts: for each prompt why it gave no pair, empty where it gave one; and its row, or what was written of it.
    """
    without_pair: Counter[str] = Counter()
    unusable: Counter[str] = Counter()
    counts: Counter[str] = Counter(dict.fromkeys(verdicts.OUTCOMES, 0))
    pairs = longer = equal = chosen_characters = rejected_characters = 0
    for reason, row in prompts:
        notes = row.get("meta", {})
        counts.update(record["outcome"] for record in notes.get("verdicts", ()))
        unusable.update(notes.get("unusable", {}))
        if reason:
            without_pair[reason] += 1
            continue
        chosen, rejected = _characters(row["chosen"]), _characters(row["rejected"])
        pairs, longer, equal = pairs + 1, longer + (chosen > rejected), equal + (chosen == rejected)
        chosen_characters, rejected_characters = chosen_characters + chosen, rejected_characters + rejected
    total = pairs + without_pair.total()
    readable = counts.total() - counts[verdicts.UNPARSABLE] - counts[verdicts.FAILED]
    return {
        "prompts": total,
        "pairs": pairs,
        "retention": _share(pairs, total),
        "without_pair": dict(without_pair.most_common()),
        "unusable": dict(unusable.most_common()),
        "comparisons": counts.total(),
        "verdicts": dict(counts),
        "agreement": _share(counts[verdicts.AGREED], readable),
        "position_bias": {
            "share": _share(counts[verdicts.FIRST] + counts[verdicts.SECOND], readable),
            "first": counts[verdicts.FIRST],
            "second": counts[verdicts.SECOND],
        },
        "length_bias": {
            "chosen_longer": _share(longer, pairs),
            "equal": _share(equal, pairs),
            "chosen_characters": round(chosen_characters / pairs, 1) if pairs else None,
            "rejected_characters": round(rejected_characters / pairs, 1) if pairs else None,
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
