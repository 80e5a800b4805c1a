"""report.html: one self-contained page about a run; pictures are SVG with drawn letters, the font is embedded."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from matplotlib_fontja import get_font_ttf_path

from tanuki_jax import files
from tanuki_jax.config.schema import Recipe
from tanuki_jax.progress import duration
from tanuki_jax.report import experts, plots
from tanuki_jax.report.svg import Rows, StageEntry, to_svg
from tanuki_jax.train.goodput import PHASES
from tanuki_jax.train.guard import read_events
from tanuki_jax.train.metrics import read_metrics

FONT = "%FONT%"  # where the page's own letters go


def write_report(recipe: Recipe, summary: Mapping[str, Any], workdir: Path) -> Path:
    """Writes the page of a run, finished or not; returns its path."""
    stages: list[StageEntry] = summary["stages"]
    directories = {entry["name"]: workdir / "stages" / entry["name"] for entry in stages}
    metrics = {name: read_metrics(directory) for name, directory in directories.items()}
    done = {name: json.loads((directory / "done.json").read_text(encoding="utf-8")) for name, directory in directories.items()}
    moe_stages = experts.moe_stages(metrics)
    scored = [entry for entry in stages if entry["scores"]]
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("tanuki_jax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    page = template.render(
        title=recipe.name or "tanuki",
        stages=stages,
        scored=scored,
        families=sorted({family for entry in scored for family in entry["scores"].get("families", {})}),
        loss=plots.plot_loss(stages, metrics),
        scores=plots.plot_scores(scored) if scored else "",
        load=to_svg(experts.plot_load(moe_stages)) if moe_stages else "",
        diagnostics=to_svg(experts.plot_diagnostics(moe_stages)) if moe_stages else "",
        ranges=plots.plot_lr_range(stages, metrics),
        samples=_samples(done),
        synth_stages=[entry for entry in stages if "synth" in entry],
        phases=PHASES,
        events=[(name, event) for name, directory in directories.items() for event in read_events(directory)],
        config=json.dumps(summary["config"], ensure_ascii=False, indent=1),
        versions=summary["versions"],
        duration=duration,
        workdir=workdir,
        font=FONT,
    )
    page = page.replace(f"url({FONT})", f"url({_embed_font(page)})", 1)
    path = workdir / "report.html"
    files.write_text(path, page)
    return path


def _samples(done: dict[str, dict[str, Any]]) -> Rows:
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


def _embed_font(page: str) -> str:
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
