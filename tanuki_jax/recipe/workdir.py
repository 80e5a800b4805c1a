"""The paths of a workdir; what lies inside a stage's directory is of train, checkpoint and report."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tanuki_jax import files


@dataclass(frozen=True)
class Workdir:
    """A run's directory."""

    root: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved config."""
        return self.root / "recipe.json"

    @property
    def summary_file(self) -> Path:
        """What the finished stages came to."""
        return self.root / "summary.json"

    @property
    def data(self) -> Path:
        """Artifacts: rule-made files, tokenizer, token stores, pack indexes, reference log-probabilities."""
        return self.root / "data"

    def stage_dir(self, stage: str) -> Path:
        """Checkpoints, metrics, events and tokenizer of a stage."""
        return self.root / "stages" / stage

    def synth_dir(self, name: str) -> Path:
        """Answers, rows and counts of a group in `synth`."""
        return self.root / "synth" / name

    def rows_file(self, name: str) -> Path:
        """The rows of a group in `synth`, which are made once."""
        return self.synth_dir(name) / "rows.jsonl"

    def done_file(self, stage: str) -> Path:
        """Summary entry, sample answers and suggested questions of a finished stage."""
        return self.stage_dir(stage) / "done.json"

    def done(self, stage: str) -> dict[str, Any] | None:
        """What a stage's done file says; None while the stage is not finished."""
        path = self.done_file(stage)
        return files.read_json(path) if path.is_file() else None

    def pair_margins_file(self, stage: str) -> Path:
        """Margins of the held-out pairs after a stage, which the next stage is compared with."""
        return self.stage_dir(stage) / "pair_margins.json"

    def init_checkpoint(self, init_from: str, stages: Container[str]) -> Path | None:
        """Where the checkpoint that a stage's `init_from` names lies, an earlier stage or a directory; None if it is empty."""
        if not init_from:
            return None
        return self.stage_dir(init_from) if init_from in stages else Path(init_from)
