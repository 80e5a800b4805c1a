"""Drawing without replacement from a huge number of combinations, none of which is stored."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

ROUNDS = 4


def permute(index: int, total: int, key: str) -> int:
    """The place of `index` in a random order of `range(total)` that depends on `key` alone.

    A Feistel network over the next power of four is a bijection; where it leads out of the range it is followed on until it
    comes back (cycle walking), in fewer than four steps on average.
    """
    half = max(1, (max(total - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        high, low = index >> half, index & mask
        for number in range(ROUNDS):
            digest = blake2b(f"{number} {low}".encode(), key=blake2b(key.encode(), digest_size=32).digest(), digest_size=8)
            high, low = low, high ^ (int.from_bytes(digest.digest(), "big") & mask)
        index = high << half | low
        if index < total:
            return index


def draw(count: int, total: int, key: str) -> Iterator[int]:
    """`count` different numbers below `total`, or all of them where there are fewer, in a random order."""
    return (permute(index, total, key) for index in range(min(count, total)))
