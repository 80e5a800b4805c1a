"""Which checkpoints of a stage are kept however old they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tanuki_jax import config


def steps_to_keep(options: config.Stage, saved: Iterable[int], validation_losses: Mapping[int, float]) -> set[int]:
    """Of the saved steps those with the lowest validation loss (`keep_best`), and every `keep_every`-th; beside the newest.

    validation_losses: of every step that was validated.
    """
    saved = set(saved)
    best = sorted(saved.intersection(validation_losses), key=lambda step: (validation_losses[step], step))
    every = range(0, max(saved, default=0) + 1, options.keep_every) if options.keep_every else ()
    return {*best[: options.keep_best], *every}
