"""Where checkpoints lie: `STAGE/checkpoints/STEP`, with its `meta` beside the arrays."""

from __future__ import annotations

from pathlib import Path

from tanuki_jax import files
from tanuki_jax.errors import UserError

NAME = "checkpoints"


def checkpoints_directory(stage_directory: Path) -> Path:
    """The directory of a stage's checkpoints, each in a directory of its step's number."""
    return stage_directory / NAME


def step_directory(stage_directory: Path, step: int) -> Path:
    """The directory of one checkpoint."""
    return checkpoints_directory(stage_directory) / str(step)


def meta_file(stage_directory: Path, step: int) -> Path:
    """The JSON file of what was saved beside the arrays of a step."""
    return step_directory(stage_directory, step) / "meta" / "metadata"


def list_steps(stage_directory: Path) -> list[int]:
    """The steps of which there is a whole checkpoint, in no order; saves that are under way have other names."""
    return [int(path.name) for path in checkpoints_directory(stage_directory).glob("*") if path.name.isdigit()]


def locate(path: str | Path) -> tuple[Path, int]:
    """Stage directory and step of a `--checkpoint`: a stage's directory (newest step) or one step's."""
    path = files.absolute(path)
    if path.name.isdigit() and path.parent.name == NAME and path.is_dir():
        return path.parent.parent, int(path.name)
    steps = list_steps(path) if path.is_dir() else []
    if not steps:
        raise UserError(
            f"checkpoint: {path} has no checkpoints/<step>; give a stage's directory, runs/nano/stages/sft for example"
        )
    return path, max(steps)
