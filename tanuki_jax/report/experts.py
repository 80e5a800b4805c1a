"""Pictures of a mixture's experts for report.html: who gets the tokens, how sure the gate is, how alike the experts are."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
# Mean cosine of the experts of Tanuki-8x8B with one another, by training step after upcycling (the team's ledger).
ORIGINAL = {
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


def mixtures(metrics: dict[str, Rows]) -> dict[str, Rows]:
    """The stages that logged a load of experts."""
    return {name: rows for name, rows in metrics.items() if rows and "moe/load" in rows[-1]}


def short(name: str, most: int = 20) -> str:
    """A name whose middle is left out where it is wider than `most` letters; a Japanese one counts twice."""
    widths = [1 + (unicodedata.east_asian_width(letter) in "WF") for letter in name]
    if sum(widths) <= most:
        return name
    begin, end = 0, len(name)
    while sum(widths[: begin + 1]) + sum(widths[end - 1 :]) < most:  # a letter more at each end, as long as there is room
        begin, end = begin + 1, end - 1
    return f"{name[:begin]}…{name[end:]}"


def load_picture(plt: Any, stages: dict[str, Rows]) -> Any:
    """Share of the assignments that each expert of each layer received in the last logged steps of each stage."""
    figure, grid = plt.subplots(1, len(stages), figsize=(max(7.2, 2.2 * len(stages)), 2.4), squeeze=False, layout="constrained")
    image: Any = None
    for axes, (name, rows) in zip(grid[0], stages.items(), strict=True):
        load_LE = np.mean([row["moe/load"] for row in rows[-10:]], axis=0)
        image = axes.imshow(load_LE * load_LE.shape[1], vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
        axes.set_title(short(name, 16), fontsize=9)
        axes.set_xlabel("専門家 (expert)", fontsize=9)
        for axis in (axes.xaxis, axes.yaxis):  # whole numbers, as many as there is room for
            axis.get_major_locator().set_params(integer=True)
    grid[0][0].set_ylabel("層 (layer)", fontsize=9)
    figure.colorbar(image, ax=list(grid[0]), label="1 = 均等 (even)")
    return figure


def health_picture(plt: Any, stages: dict[str, Rows]) -> Any:
    """Over training: similarity of experts beside the original's, largest load, router norm; at the end, the gate's weights."""
    figure, ((similarity, load), (norm, gate)) = plt.subplots(2, 2, figsize=(8, 6.4))
    offset, total = 0.0, sum(rows[-1]["tokens"] for rows in stages.values())
    curves = (
        (similarity, "moe/similarity", "#ff725c"),
        (load, "moe/load_max", "#4269d0"),
        (norm, "moe/router_norm", "#3ca951"),
    )
    for rows in stages.values():
        for axes, key, colour in curves:
            found = [row for row in rows if key in row]
            if not found:
                continue
            x = (offset + np.array([row["tokens"] for row in found])) / total
            values = np.array([row[key] for row in found])
            axes.plot(x, values.mean(axis=1), color=colour, linewidth=1.2)
            axes.fill_between(x, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.2, linewidth=0)
        offset += rows[-1]["tokens"]
        for axes in (similarity, load, norm):
            axes.axvline(offset / total, color="#cccccc", linewidth=0.8)
    steps = np.array(list(ORIGINAL))
    similarity.plot(steps / steps[-1], list(ORIGINAL.values()), "o--", color="#999999", markersize=3, linewidth=0.8)
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
        bins = np.mean([np.mean(row["moe/gate"], axis=0) for row in rows[-10:] if "moe/gate" in row] or [[0.0]], axis=0)
        gate.stairs(bins, np.linspace(0, 1, len(bins) + 1), label=short(name, 16))
    gate.set_xlabel("最大のゲート重み\n(largest gate weight)", fontsize=9)
    gate.set_ylabel("トークンの割合 (share of tokens)")
    gate.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    for axes in (similarity, load, norm, gate):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure
