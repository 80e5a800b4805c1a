"""What a stage writes while it trains: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from tanuki_jax import files
from tanuki_jax.files import lock

Row: TypeAlias = dict[str, Any]  # a line of metrics.jsonl: numbers, null, or lists of them, by name

# Dense bfloat16 peak of one device, FLOP/s (vendors' data sheets); where a kind is missing, mfu is null.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # half a chip
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class MetricsWriter:
    """Appends to metrics.jsonl and TensorBoard, where a list becomes a curve for each layer.

    Lines of steps after `step` (an interrupted run's) are removed first; `rows` are those before them, and
    `replayed_seconds` what they took, for their steps are done again.
    """

    def __init__(self, directory: Path, step: int, tensorboard: bool) -> None:
        self.path = directory / "metrics.jsonl"
        rows = read_metrics(directory)
        self.rows = [row for row in rows if row["step"] <= step]
        last = self.rows[-1]["seconds"] if self.rows else 0.0
        self.replayed_seconds = max(0.0, rows[-1]["seconds"] - last) if rows else 0.0
        files.write_jsonl(self.path, self.rows)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, row: Row) -> None:
        """One logged step; an error where the run's lock is another's by now."""
        lock.check(look=False)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board:
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("step", "seconds"):
                    self._board.add_scalar(name, value, row["step"])
                elif isinstance(value, list) and not isinstance(value[0], list):
                    for layer, part in enumerate(value):
                        self._board.add_scalar(f"{name}/{layer}", part, row["step"])

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board:
            self._board.close()


def read_metrics(directory: Path) -> list[Row]:
    """The rows of a stage's metrics.jsonl; a last line cut short by a kill is left out."""
    path = Path(directory) / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def validation_loss(row: Mapping[str, Any]) -> float | None:
    """The mean over the sources of a row's validation losses, where it has some and all are finite."""
    losses = [value for name, value in row.items() if name.startswith("validation/") and name.endswith("/loss")]
    return float(np.mean(losses)) if losses and all(map(_is_finite, losses)) else None


def to_plain(metrics: Mapping[str, Any]) -> Row:
    """Host values of a step's metrics: floats, None for NaN and Inf, or nested lists for arrays (experts' load)."""

    def plain(value: np.ndarray | float) -> float | list[Any] | None:
        if np.ndim(value):
            rounded: list[Any] = np.round(value, 6).tolist()
            return rounded
        return float(value) if np.isfinite(value) else None

    return {name: plain(value) for name, value in jax.device_get(dict(metrics)).items()}


def mfu(tokens_per_second: float, flops_per_token: float) -> float | None:
    """Model FLOPs utilisation over all devices, or None where the peak is unknown."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return round(tokens_per_second * flops_per_token / (peak * jax.device_count()), 4) if peak else None
