"""What came of a run that asks models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tanuki_jax.endpoint.budget import Amount


@dataclass
class Summary:
    """Counts; calls, tokens and money are those of all runs in the directory, as far as they were recorded.

    complete: rows.jsonl is there.
    outcomes: of requests: answer, cut (an answer that is cut at its length), overflow, refused, empty, and the failures.
    dropped: rows or items by reason; failed: items by the failure of the job that they wait for.
    """

    complete: bool = False
    items: int = 0
    rows: int = 0
    answers: int = 0  # jobs that have a final outcome
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0  # of this run
    outcomes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    rows_sha256: str = ""

    def add_record(self, row: Mapping[str, Any]) -> Amount:
        """Counts a row of answers.jsonl or failed.jsonl; returns what it cost."""
        faults, outcome = row.get("faults", {}), row["outcome"]
        self.outcomes.update(faults)
        calls = sum(faults.values())
        if outcome in ("answer", "overflow", "refused"):  # others are the last of the faults
            calls += 1
            self.outcomes["cut" if row.get("finish_reason") == "length" else outcome] += 1
        tokens = Counter(row.get("usage", {}))
        tokens.update(row.get("wasted", {}))
        return Amount(calls, tokens["prompt_tokens"], tokens["completion_tokens"], row.get("cost", 0.0))

    def spend(self, spent: Amount) -> None:
        self.calls, self.cost = spent.calls, spent.cost
        self.prompt_tokens, self.completion_tokens = spent.prompt_tokens, spent.completion_tokens

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        counts = {name: dict(sorted(getattr(self, name).items())) for name in ("outcomes", "dropped", "failed")}
        return asdict(self) | counts

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Summary:
        counts = {name: Counter(value[name]) for name in ("outcomes", "dropped", "failed")}
        return cls(**{**value, **counts})
