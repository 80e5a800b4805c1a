"""Runs a recipe on other people's machines: Cloud TPU slices, GKE, Slurm.  Settings in one file, every command in a dry run.

A launch needs neither JAX nor an accelerator here.  Each platform is a module with `ACTIONS` and `launch`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from tanuki_jax.launch import settings
from tanuki_jax.launch.commands import Commands

PLATFORMS = {
    "tpu": "Cloud TPU slices, one or several, over any number of preemptions",
    "gke": "TPU slices of a GKE cluster, as a JobSet",
    "slurm": "GPUs of a Slurm cluster, as a job that requeues itself",
}


def actions(platform: str) -> dict[str, str]:
    """What can be done on a platform, each with a line of help."""
    result: dict[str, str] = importlib.import_module(f"tanuki_jax.launch.{platform}").ACTIONS
    return result


def keys(platform: str) -> dict[str, tuple[str, str]]:
    """A platform's settings: of each its help, with the default, and what its value looks like."""
    return settings.describe(platform)


def launch(platform: str, action: str, path: Path | None, flags: Sequence[str], dry_run: bool) -> None:
    """Does an action, with the settings of a file and of flags."""
    module = importlib.import_module(f"tanuki_jax.launch.{platform}")
    module.launch(action, settings.read(platform, path, flags), Commands(dry_run))
