"""Pictures of a whole run for report.html: losses, scores, LR-range tests."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.report.svg import WIDTH, Rows, StageEntry, plt, shorten, to_svg
from tanuki_jax.train import lr_range

# Of each stage kind, for its curve and, dark enough for letters, for its name; others have the last.
COLOURS = {"pretrain": "#4269d0", "upcycle": "#97bbf5", "sft": "#3ca951", "dpo": "#efb118", "synth": "#ff725c"}
DARK_COLOURS = {"pretrain": "#3457b2", "upcycle": "#4a6fae", "sft": "#24863a", "dpo": "#9a6b00", "synth": "#b8402c"}
OTHER, DARK_OTHER = "#a463f2", "#7b3fc0"
LABEL_GAP = 0.035  # between names, of the width of a picture


def plot_loss(stages: list[StageEntry], metrics: dict[str, Rows]) -> Markup:
    """Loss of every stage on one axis of tokens; the preference loss, another quantity, is dashed."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4))
    offset, top = 0.0, 1.0
    centers = []
    for entry in stages:
        rows, kind = [row for row in metrics[entry["name"]] if row["loss"] is not None], entry["kind"]
        axes.axvline(offset / 1e6, color="#cccccc", linewidth=0.8)
        if rows:
            x = np.array([offset + row["tokens"] for row in rows]) / 1e6
            axes.plot(
                x,
                [row["loss"] for row in rows],
                color=COLOURS.get(kind, OTHER),
                linestyle="--" if STAGE_KINDS[kind].loss == "preference" else "-",
                linewidth=1.2,
            )
            top = max(top, *(row["loss"] for row in rows[len(rows) // 20 :]))
        centers.append((offset + entry["tokens"] / 2) / 1e6)
        offset += entry["tokens"]
    axes.set_xlim(0, max(offset / 1e6, 1e-6))
    colours = [DARK_COLOURS.get(entry["kind"], DARK_OTHER) for entry in stages]
    _label_above(axes, [entry["name"] for entry in stages], centers, colours)
    axes.set_xlabel("百万トークン (million tokens)")
    axes.set_ylabel("損失 (loss)")
    axes.set_ylim(0, top * 1.05)
    axes.spines[["top", "right"]].set_visible(False)
    return to_svg(figure)


def _label_above(axes: Axes, names: list[str], centers: list[float], colours: list[str]) -> None:
    """Names above an axis at their centers, moved apart where they would overlap, with a line to the center."""
    span = axes.get_xlim()[1]
    positions = spread_labels([center / span for center in centers], min(LABEL_GAP, 1 / max(1, len(names))))
    for name, center, x, colour in zip(names, centers, positions, colours, strict=True):
        axes.annotate(
            shorten(name),
            (center, 1.0),
            (x, 1.07),
            xycoords=("data", "axes fraction"),
            textcoords="axes fraction",
            rotation=40,
            rotation_mode="anchor",
            fontsize=9,
            color=colour,
            arrowprops=dict(arrowstyle="-", color="#cccccc", linewidth=0.8, shrinkA=0, shrinkB=0),
        )


def spread_labels(positions: list[float], gap: float) -> list[float]:
    """Ascending positions from 0 to 1, moved as little as needed to be `gap` apart and still end at 1."""
    result: list[float] = []
    for position in positions:
        result.append(max(position, result[-1] + gap) if result else position)
    limit = 1.0
    for i in reversed(range(len(result))):
        result[i] = min(result[i], limit)
        limit = result[i] - gap
    return result


def plot_lr_range(stages: list[StageEntry], metrics: dict[str, Rows]) -> Markup | str:
    """Loss by learning rate of every LR-range test; empty where there is none."""
    tested = [entry for entry in stages if entry.get("learning_rate_range")]
    if not tested:
        return ""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.0))
    low, high = [], []
    for entry in tested:
        rates, losses = lr_range.smooth(metrics[entry["name"]])
        axes.plot(rates, losses, label=shorten(entry["name"]))
        low.append(losses.min())
        high.append(losses[0])
        for name, colour in (("suggested", "#3ca951"), ("lowest_at", "#999999")):
            axes.axvline(entry["learning_rate_range"][name], color=colour, linestyle=":")
    axes.set_ylim(min(low) * 0.9, max(high) * 1.2)
    axes.set_xscale("log")
    axes.set_xlabel("学習率 (learning rate)")
    axes.set_ylabel("損失 (loss)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, fontsize=9)
    return to_svg(figure)


def plot_scores(scored: list[StageEntry]) -> Markup:
    """Scores after each stage, in the manner of the paper's figure 1."""
    figure, axes = plt.subplots(figsize=(max(WIDTH, 0.45 * len(scored)), 2.8))
    names = [shorten(entry["name"]) for entry in scored]
    labels, colours = ("正答率 (exact answers)", "選好の一致 (pair accuracy)"), ("#24863a", "#9a6b00")
    percentages = [
        [100 * entry["scores"].get("exact_match", np.nan) for entry in scored],
        [100 * entry["scores"].get("pair_accuracy", np.nan) for entry in scored],
    ]
    for label, colour, values in zip(labels, colours, percentages, strict=True):
        if np.isfinite(values).any():
            axes.plot(range(len(names)), values, "o-", color=colour, label=label)
    for i, pair in enumerate(zip(*percentages, strict=True)):
        for colour, value, other in zip(colours, pair, pair[::-1], strict=True):
            if np.isfinite(value):  # the larger of two numbers stands above its point, the smaller below
                below = value < other or (value == other and value is pair[0])
                axes.annotate(
                    f"{value:.0f}",
                    (i, value),
                    xytext=(0, -6 if below else 6),
                    va="top" if below else "bottom",
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                    color=colour,
                )
    tilted = sum(map(len, names)) > 60
    axes.set_xticks(range(len(names)), names, rotation=40 if tilted else 0, ha="right" if tilted else "center")
    axes.set_ylim(-18, 118)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("%")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2, borderaxespad=0, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return to_svg(figure)
