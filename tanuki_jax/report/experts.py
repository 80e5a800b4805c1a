"""Pictures of a mixture's experts for report.html: their load, the gate's certainty, their similarity."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from tanuki_jax.report.svg import Rows, plt, shorten

# Mean cosine of the experts of Tanuki-8x8B with one another, by training step after upcycling (the team's ledger).
TANUKI_SIMILARITY = {
    1_200: 0.971,
    3_600: 0.935,
    8_000: 0.901,
    12_800: 0.870,
    21_600: 0.769,
    33_600: 0.665,
    49_600: 0.588,
    72_800: 0.501,
    95_700: 0.486,
}


def moe_stages(metrics: dict[str, Rows]) -> dict[str, Rows]:
    """The stages that logged a load of experts."""
    return {name: rows for name, rows in metrics.items() if rows and "moe/load" in rows[-1]}


def plot_load(stages: dict[str, Rows]) -> Figure:
    """Share of the assignments that each expert of each layer received in the last logged steps of each stage."""
    figure, grid = plt.subplots(1, len(stages), figsize=(max(7.2, 2.2 * len(stages)), 2.4), squeeze=False, layout="constrained")
    images = []
    for axes, (name, rows) in zip(grid[0], stages.items(), strict=True):
        load_LE = np.mean([row["moe/load"] for row in rows[-10:]], axis=0)
        images.append(axes.imshow(load_LE * load_LE.shape[1], vmin=0, vmax=2, cmap="RdBu_r", aspect="auto"))
        axes.set_title(shorten(name, 16), fontsize=9)
        axes.set_xlabel("専門家 (expert)", fontsize=9)
        for axis in (axes.xaxis, axes.yaxis):  # whole numbers, as many as fit
            axis.get_major_locator().set_params(integer=True)
    grid[0][0].set_ylabel("層 (layer)", fontsize=9)
    figure.colorbar(images[-1], ax=list(grid[0]), label="1 = 均等 (even)")
    return figure


# Long: four pictures with their labels.
def plot_diagnostics(stages: dict[str, Rows]) -> Figure:
    """Over training: similarity of the experts and of the original's, largest load, router norm; at the end, gate weights."""
    figure, ((similarity, load), (norm, gate)) = plt.subplots(2, 2, figsize=(8, 6.4))
    offset, total = 0.0, sum(rows[-1]["tokens"] for rows in stages.values())
    curves = (
        (similarity, "moe/similarity", "#ff725c"),
        (load, "moe/load_max", "#4269d0"),
        (norm, "moe/router_norm", "#3ca951"),
    )
    for rows in stages.values():
        for axes, key, colour in curves:
            logged = [row for row in rows if key in row]
            if not logged:
                continue
            x = (offset + np.array([row["tokens"] for row in logged])) / total
            values = np.array([row[key] for row in logged])
            axes.plot(x, values.mean(axis=1), color=colour, linewidth=1.2)
            axes.fill_between(x, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.2, linewidth=0)
        offset += rows[-1]["tokens"]
        for axes in (similarity, load, norm):
            axes.axvline(offset / total, color="#cccccc", linewidth=0.8)
    steps = np.array(list(TANUKI_SIMILARITY))
    similarity.plot(steps / steps[-1], list(TANUKI_SIMILARITY.values()), "o--", color="#999999", markersize=3, linewidth=0.8)
    similarity.annotate("Tanuki-8x8B", (1, 0.45), ha="right", va="top", fontsize=9, color="#666666")
    similarity.set_ylim(0, 1.03)
    similarity.set_ylabel("専門家の類似度 (similarity)")
    load.axhline(1, color="#999999", linewidth=0.8, linestyle="--")
    load.set_ylim(0.9, None)
    load.set_ylabel("最大負荷 (largest load / mean)")
    norm.set_ylim(0, None)
    norm.set_ylabel("ルーターのノルム (router norm)")
    for axes in (similarity, load, norm):
        axes.set_xlabel("混合モデルの学習の割合\n(share of training as a mixture)", fontsize=9)
    for name, rows in stages.items():
        histograms = [np.mean(row["moe/top_gate_hist"], axis=0) for row in rows[-10:] if "moe/top_gate_hist" in row]
        bins = np.mean(histograms or [[0.0]], axis=0)
        gate.stairs(bins, np.linspace(0, 1, len(bins) + 1), label=shorten(name, 16))
    gate.set_xlabel("最大のゲート重み\n(largest gate weight)", fontsize=9)
    gate.set_ylabel("トークンの割合 (share of tokens)")
    gate.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    for axes in (similarity, load, norm, gate):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure
