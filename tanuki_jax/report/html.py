"""report.html: one self-contained page about a run; pictures are SVG with drawn letters, the font is embedded."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup

from tanuki_jax import files
from tanuki_jax.config.schema import Recipe
from tanuki_jax.progress import duration
from tanuki_jax.report import experts
from tanuki_jax.train import lr_range
from tanuki_jax.train.goodput import PHASES
from tanuki_jax.train.guard import read_events
from tanuki_jax.train.metrics import read_metrics

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib_fontja import get_font_ttf_path

COLOURS = {"pretrain": "#4269d0", "upcycle": "#97bbf5", "sft": "#3ca951", "dpo": "#efb118"}
LETTERS = {"pretrain": "#3457b2", "upcycle": "#4a6fae", "sft": "#24863a", "dpo": "#9a6b00"}  # the same, dark enough to read
WIDTH = 7.2  # inches of a picture: 690 pixels, which a phone shows in two screens, with letters of 12 pixels
LETTER_GAP = 0.035  # between names, of the width of a picture
FONT = "%FONT%"  # where the page's own letters go


def write_report(recipe: Recipe, summary: dict[str, Any], workdir: Path) -> Path:
    """Draws what is there so far; returns the page's path."""
    homes = {entry["name"]: workdir / "stages" / entry["name"] for entry in summary["stages"]}
    metrics = {name: read_metrics(home) for name, home in homes.items()}
    done = {name: json.loads((home / "done.json").read_text(encoding="utf-8")) for name, home in homes.items()}
    mixtures = experts.mixtures(metrics)
    scored = [entry for entry in summary["stages"] if entry["scores"]]
    families = sorted({family for entry in scored for family in entry["scores"].get("families", {})})
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("tanuki_jax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    page = template.render(
        title=recipe.name or "tanuki",
        stages=summary["stages"],
        scored=scored,
        families=families,
        loss=_loss_picture(summary["stages"], metrics),
        scores=_score_picture(scored) if scored else "",
        load=_svg(experts.load_picture(plt, mixtures)) if mixtures else "",
        health=_svg(experts.health_picture(plt, mixtures)) if mixtures else "",
        ranges=_range_picture(summary["stages"], metrics),
        samples=_samples(done),
        kinds=PHASES,
        events=[(name, event) for name, home in homes.items() for event in read_events(home)],
        config=json.dumps(summary["config"], ensure_ascii=False, indent=1),
        versions=summary["versions"],
        duration=duration,
        workdir=workdir,
        font=FONT,
    )
    page = page.replace(f"url({FONT})", f"url({_embedded_font(page)})", 1)
    path = workdir / "report.html"
    files.write_text(path, page)
    return path


def _svg(figure: Any) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])


def _loss_picture(stages: list[dict[str, Any]], metrics: dict[str, list[dict[str, Any]]]) -> Markup:
    """Loss of every stage on one axis of tokens; the preference loss, another quantity, is dashed."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4))
    offset, top = 0.0, 1.0
    places = []
    for entry in stages:
        rows, kind = [row for row in metrics[entry["name"]] if row["loss"] is not None], entry["kind"]
        axes.axvline(offset / 1e6, color="#cccccc", linewidth=0.8)
        if rows:
            x = np.array([offset + row["tokens"] for row in rows]) / 1e6
            axes.plot(
                x,
                [row["loss"] for row in rows],
                color=COLOURS[kind],
                linestyle="--" if kind == "dpo" else "-",
                linewidth=1.2,
            )
            top = max(top, *(row["loss"] for row in rows[len(rows) // 20 :]))
        places.append((offset + entry["tokens"] / 2) / 1e6)
        offset += entry["tokens"]
    axes.set_xlim(0, max(offset / 1e6, 1e-6))
    _name_above(axes, [entry["name"] for entry in stages], places, [LETTERS[entry["kind"]] for entry in stages])
    axes.set_xlabel("百万トークン (million tokens)")
    axes.set_ylabel("損失 (loss)")
    axes.set_ylim(0, top * 1.05)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _name_above(axes: Any, names: list[str], places: list[float], colours: list[str]) -> None:
    """Names above an axis at their places, moved apart where they would lie over one another, with a line to the place."""
    whole = axes.get_xlim()[1]
    beside = spread_labels([place / whole for place in places], min(LETTER_GAP, 1 / max(1, len(names))))
    for name, place, x, colour in zip(names, places, beside, colours, strict=True):
        axes.annotate(
            experts.short(name),
            (place, 1.0),
            (x, 1.07),
            xycoords=("data", "axes fraction"),
            textcoords="axes fraction",
            rotation=40,
            rotation_mode="anchor",
            fontsize=9,
            color=colour,
            arrowprops=dict(arrowstyle="-", color="#cccccc", linewidth=0.8, shrinkA=0, shrinkB=0),
        )


def spread_labels(places: list[float], gap: float) -> list[float]:
    """Ascending places from 0 to 1, moved as little as needed to be `gap` apart and still end at 1."""
    result: list[float] = []
    for place in places:
        result.append(max(place, result[-1] + gap) if result else place)
    limit = 1.0
    for i in reversed(range(len(result))):
        result[i] = min(result[i], limit)
        limit = result[i] - gap
    return result


def _range_picture(stages: list[dict[str, Any]], metrics: dict[str, list[dict[str, Any]]]) -> Markup | str:
    """Loss over the learning rate of every LR-range test."""
    tested = [entry for entry in stages if entry.get("learning_rate_range")]
    if not tested:
        return ""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.0))
    low, high = [], []
    for entry in tested:
        rates, losses = lr_range.smooth(metrics[entry["name"]])
        axes.plot(rates, losses, label=experts.short(entry["name"]))
        low.append(losses.min())
        high.append(losses[0])
        for name, colour in (("suggested", "#3ca951"), ("lowest_at", "#999999")):
            axes.axvline(entry["learning_rate_range"][name], color=colour, linestyle=":")
    axes.set_ylim(min(low) * 0.9, max(high) * 1.2)
    axes.set_xscale("log")
    axes.set_xlabel("学習率 (learning rate)")
    axes.set_ylabel("損失 (loss)")
    axes.spines[["top", "right"]].set_visible(False)
    _legend_beside(axes)
    return _svg(figure)


def _legend_beside(axes: Any) -> None:
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, fontsize=9)


def _score_picture(scored: list[dict[str, Any]]) -> Markup:
    """Scores after each stage, in the manner of the paper's figure 1."""
    figure, axes = plt.subplots(figsize=(max(WIDTH, 0.45 * len(scored)), 2.8))
    names = [experts.short(entry["name"]) for entry in scored]
    lines = {"exact_match": ("正答率 (exact answers)", "#24863a"), "pair_accuracy": ("選好の一致 (pair accuracy)", "#9a6b00")}
    found = {key: [100 * entry["scores"].get(key, np.nan) for entry in scored] for key in lines}
    for key, (label, colour) in lines.items():
        if np.isfinite(found[key]).any():
            axes.plot(range(len(names)), found[key], "o-", color=colour, label=label)
    for i, values in enumerate(zip(*found.values(), strict=True)):
        for (_, colour), value, other in zip(lines.values(), values, values[::-1], strict=True):
            if np.isfinite(value):  # the larger of two numbers stands above its point, the smaller below
                below = value < other or (value == other and value is values[0])
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
    return _svg(figure)


def _samples(done: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The same held-out prompts with every stage's answer."""
    sampled = {name: value["samples"] for name, value in done.items() if value["samples"]}
    if not sampled:
        return []
    last = list(sampled.values())[-1]
    return [
        {
            **row,
            "answers": [(name, rows[i]["given"], rows[i]["given"].strip() == row["answer"]) for name, rows in sampled.items()],
        }
        for i, row in enumerate(last)
    ]


def _embedded_font(page: str) -> str:
    """The glyphs that the page uses, as a data URL, so that Japanese shows on a machine without Japanese fonts."""
    from fontTools import subset

    options = subset.Options(
        flavor="woff", layout_features=[], notdef_outline=True, drop_tables=["GSUB", "GPOS", "vhea", "vmtx"]
    )
    font = subset.load_font(get_font_ttf_path(), options)
    chooser = subset.Subsetter(options)
    chooser.populate(text=page)
    chooser.subset(font)
    buffer = io.BytesIO()
    font.flavor = "woff"
    font.save(buffer)
    return "data:font/woff;base64," + base64.b64encode(buffer.getvalue()).decode()
