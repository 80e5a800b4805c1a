"""What numbers may be: a config's keys and the command line's flags; this imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The numbers that a key may be: from `low` to `high`, both included where `open` does not name them (low, high, both)."""

    low: float
    high: float
    open: str = ""
    zero: str = ""  # what 0 stands for, where it is no amount
    besides: int | None = None  # one more number, which the key's documentation explains

    def __contains__(self, value: float) -> bool:
        if value == self.besides:
            return True
        above = value > self.low if self.open in ("low", "both") else value >= self.low
        return above and (value < self.high if self.open in ("high", "both") else value <= self.high)

    def describe(self) -> str:
        """The range in words: above 0 and at most 1."""
        low = f"{'above' if self.open in ('low', 'both') else 'at least'} {_shown(self.low)}"
        high = f"{'below' if self.open in ('high', 'both') else 'at most'} {_shown(self.high)}"
        if self.zero:
            return f"0 ({self.zero}) or more, {high}"
        return f"{'' if self.besides is None else f'{self.besides}, or '}{low} and {high}"


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


LARGEST = 2**31 - 1  # devices count steps and positions in int32
COUNT, AMOUNT = Range(1, LARGEST), Range(0, LARGEST)
NEVER, NONE = (Range(0, LARGEST, zero=word) for word in ("never", "none"))
TOKENS = Range(0, 10**15)
SIZE = Range(1, 2**24)  # of an axis of a parameter
DEVICES = Range(1, 1_000_000)
SHARE = Range(0, 1)
COEFFICIENT = Range(0, 1000)
SEED = Range(-(2**63), 2**63 - 1)  # what jax.random.key takes
# What has no key in a config, but a flag; float32 tells no smaller ones from 0, and a temperature of 0 is the likeliest token.
TEMPERATURE, TOP_P = Range(1e-3, 1000, besides=0), Range(1e-6, 1)
TOP_K, MIN_P, REPETITION_PENALTY = Range(0, 2**24), Range(0, 1), Range(0.01, 100)
