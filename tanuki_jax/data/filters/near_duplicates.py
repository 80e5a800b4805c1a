"""Near-duplicates: MinHash (rensa) proposes candidates, and the exact Jaccard similarity of their 5-grams decides.

Memory for each row that is passed: 2 to 5.5 kB at a threshold of 0.8, up to 9 kB at 0.5; the less the rows have in common, the
more.  Their texts and places lie in a temporary file.
"""

from __future__ import annotations

import array
import math
import os
import tempfile
from typing import IO

import numpy as np

from tanuki_jax.data.filters.extras import require
from tanuki_jax.data.filters.texts import normalize

N = 5  # characters of a shingle
PERMUTATIONS = 128
BANDS = (8, 16, 32, 64)  # the fewest that propose a pair at the threshold with probability RECALL are used
RECALL = 0.97
CANDIDATES = 64  # of a row are compared exactly, those with the highest estimate first
SEED = 20240912


def shingles(text: str) -> set[str]:
    """The character 5-grams of a text, normalized."""
    text = normalize(text)
    return {text[i : i + N] for i in range(max(1, len(text) - N + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    """Size of the intersection over size of the union."""
    common = len(a & b)
    return common / (len(a) + len(b) - common) if common else 0.0


def bands_for(threshold: float) -> int:
    """Bands of the index: the fewest with which a pair at the threshold is proposed with probability RECALL."""
    chances = {bands: 1 - (1 - threshold ** (PERMUTATIONS // bands)) ** bands for bands in BANDS}
    return next((bands for bands, chance in chances.items() if chance >= RECALL), BANDS[-1])


class Index:
    """The rows that have been passed so far."""

    def __init__(self, threshold: float) -> None:
        rensa = require("rensa", "filters: near_duplicates")
        self._threshold = threshold
        self._new_hash = rensa.RMinHash
        self._bands = rensa.RMinHashLSH(threshold, PERMUTATIONS, bands_for(threshold))
        self._digests = np.empty((0, PERMUTATIONS), np.uint32)
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # closed, and so removed, with the index
        self._ends = array.array("Q", [0])  # in the file, of each row's text and place

    def find(self, text: str, where: str) -> str:
        """The place of a row that this one nearly repeats; where there is none, the row is added, and nothing returned."""
        grams = shingles(text)
        sketch = self._new_hash(PERMUTATIONS, SEED)
        sketch.update(list(grams))
        digest = np.array(sketch.digest(), np.uint32)
        for key in self._order(self._bands.query(sketch), digest):
            similarity = jaccard(grams, shingles(self._read(2 * key)))
            if similarity >= self._threshold:
                return f"{self._read(2 * key + 1)} (Jaccard {math.floor(100 * similarity) / 100:.2f})"
        self._add(text, where, sketch, digest)
        return ""

    def _order(self, keys: list[int], digest: np.ndarray) -> list[int]:
        """The candidates by estimated similarity, at most CANDIDATES of them."""
        if len(keys) < 2:
            return keys
        estimates = (self._digests[keys] == digest).mean(1)
        return [keys[i] for i in np.argsort(-estimates, kind="stable")[:CANDIDATES]]

    def _add(self, text: str, where: str, sketch: object, digest: np.ndarray) -> None:
        key = len(self._ends) // 2
        self._bands.insert(key, sketch)
        if key == len(self._digests):
            self._digests = np.resize(self._digests, (max(1024, key + key // 2), PERMUTATIONS))
        self._digests[key] = digest
        for part in (text, where):
            data = part.encode("utf-8", "surrogatepass")
            self._file.write(data)
            self._ends.append(self._ends[-1] + len(data))

    def _read(self, number: int) -> str:
        start, stop = self._ends[number : number + 2]
        return os.pread(self._file.fileno(), stop - start, start).decode("utf-8", "surrogatepass")
