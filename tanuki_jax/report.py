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

from tanuki_jax import files, report_experts
from tanuki_jax.config import Recipe
from tanuki_jax.progress import duration
from tanuki_jax.train import lr_range
from tanuki_jax.train.clock import KINDS
from tanuki_jax.train.guard import read_events
from tanuki_jax.train.metrics import read_metrics

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib_fontja import get_font_ttf_path

COLOURS = {"pretrain": "#4269d0", "upcycle": "#97bbf5", "sft": "#3ca951", "dpo": "#efb118"}


def write_report(recipe: Recipe, summary: dict[str, Any], workdir: Path) -> Path:
    """Draws what is there so far; returns the page's path."""
    homes = {entry["name"]: workdir / "stages" / entry["name"] for entry in summary["stages"]}
    metrics = {name: read_metrics(home) for name, home in homes.items()}
    done = {name: json.loads((home / "done.json").read_text(encoding="utf-8")) for name, home in homes.items()}
    mixtures = report_experts.mixtures(metrics)
    scored = [entry for entry in summary["stages"] if entry["scores"]]
    families = sorted({family for entry in scored for family in entry["scores"].get("families", {})})
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("tanuki_jax", "."),
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
        load=_svg(report_experts.load_picture(plt, mixtures)) if mixtures else "",
        health=_svg(report_experts.health_picture(plt, mixtures)) if mixtures else "",
        ranges=_range_picture(summary["stages"], metrics),
        samples=_samples(done),
        kinds=KINDS,
        events=[(name, event) for name, home in homes.items() for event in read_events(home)],
        config=json.dumps(summary["config"], ensure_ascii=False, indent=1),
        versions=summary["versions"],
        duration=duration,
        workdir=workdir,
        font="FONT",
    )
    page = page.replace("FONT", _embedded_font(page), 1)
    path = workdir / "report.html"
    files.write_text(path, page)
    return path


def _svg(figure: Any) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])


def _loss_picture(stages: list[dict[str, Any]], metrics: dict[str, list[dict[str, Any]]]) -> Markup:
    """Loss of every stage on one axis of tokens; the preference loss, another quantity, is dashed."""
    figure, axes = plt.subplots(figsize=(9, 3.6))
    offset, top = 0.0, 1.0
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
        place = (offset + entry["tokens"] / 2) / 1e6
        axes.annotate(
            entry["name"],
            (place, 1.01),
            xycoords=("data", "axes fraction"),
            rotation=35,
            fontsize=8,
            color=COLOURS[kind],
        )
        offset += entry["tokens"]
    axes.set_xlabel("百万トークン (million tokens)")
    axes.set_ylabel("損失 (loss)")
    axes.set_ylim(0, top * 1.05)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _range_picture(stages: list[dict[str, Any]], metrics: dict[str, list[dict[str, Any]]]) -> Markup | str:
    """Loss over the learning rate of every LR-range test."""
    tested = [entry for entry in stages if entry.get("learning_rate_range")]
    if not tested:
        return ""
    figure, axes = plt.subplots(figsize=(9, 3.0))
    for entry in tested:
        rates, losses = lr_range.smoothed(metrics[entry["name"]])
        axes.plot(rates, losses, label=entry["name"])
        axes.set_ylim(losses.min() * 0.9, losses[0] * 1.2)
        for name, colour in (("suggested", "#3ca951"), ("lowest_at", "#999999")):
            axes.axvline(entry["learning_rate_range"][name], color=colour, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("学習率 (learning rate)")
    axes.set_ylabel("損失 (loss)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _score_picture(scored: list[dict[str, Any]]) -> Markup:
    """Scores after each stage, in the manner of the paper's figure 1."""
    figure, axes = plt.subplots(figsize=(9, 2.8))
    names = [entry["name"] for entry in scored]
    lines = {"exact": ("正答率 (exact answers)", "#3ca951"), "pair_accuracy": ("選好の一致 (pair accuracy)", "#efb118")}
    for key, (label, colour) in lines.items():
        values = [100 * entry["scores"][key] if key in entry["scores"] else np.nan for entry in scored]
        axes.plot(range(len(names)), values, "o-", color=colour, label=label)
        for i, value in enumerate(values):
            if np.isfinite(value):
                axes.annotate(f"{value:.0f}", (i, value), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 112)
    axes.set_ylabel("%")
    axes.legend(frameon=False, loc="lower right")
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
