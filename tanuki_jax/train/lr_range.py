"""What a learning-rate range test says (Smith 2017, section 3.3; smoothing and choice as in fastai)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tanuki_jax.train.metrics import Row

SMOOTH = 0.95  # weight of the past in the running mean of the loss
SAFETY = 10.0  # the rate that is suggested lies so far below the one with the lowest loss


def smooth(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Learning rates and the running mean of the loss, both [rows], without rows that have no loss."""
    rows = [row for row in rows if row.get("loss") is not None and row["learning_rate"] > 0]
    mean, values = 0.0, []
    for n, row in enumerate(rows, 1):
        mean = SMOOTH * mean + (1 - SMOOTH) * row["loss"]
        values.append(mean / (1 - SMOOTH**n))
    return np.array([row["learning_rate"] for row in rows]), np.array(values)


def suggest(rows: Sequence[Row]) -> dict[str, float]:
    """`lowest_at`, the rate with the lowest loss; `steepest_at`, where it falls fastest before; `suggested`, a tenth of lowest.

    Empty where there are too few rows to tell.
    """
    rates, losses = smooth(rows)
    lowest = int(losses.argmin()) if len(losses) else 0
    if lowest < 2:
        return {}
    slope = np.gradient(losses[: lowest + 1], np.log(rates[: lowest + 1]))
    rates_by_name = {
        "lowest_at": rates[lowest],
        "steepest_at": rates[int(slope.argmin())],
        "suggested": rates[lowest] / SAFETY,
    }
    return {name: float(f"{value:.3g}") for name, value in rates_by_name.items()}
