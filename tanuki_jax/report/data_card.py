"""data_card.md: what a run was trained on, beside its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tanuki_jax import files
from tanuki_jax.config.schema import Recipe

SHOWN = 300  # characters of a sample
NAMES = {"messages": "", "prompt": "", "chosen": "chosen", "rejected": "rejected"}


def write_data_card(recipe: Recipe, workdir: Path) -> Path:
    """Writes the card of the stages that are finished; returns its path."""
    data: dict[str, dict[str, Any]] = {}
    readers: dict[str, list[str]] = {}
    for stage in recipe.stages:
        done = workdir / "stages" / stage / "done.json"
        for name, facts in (files.read_json(done).get("data", {}) if done.is_file() else {}).items():
            data[name] = facts
            readers.setdefault(name, []).append(stage)
    path = workdir / "data_card.md"
    files.write_text(path, "\n".join(_lines(recipe, data, readers)) + "\n")
    return path


def _lines(recipe: Recipe, data: Mapping[str, Mapping[str, Any]], readers: Mapping[str, list[str]]) -> list[str]:
    lines = [f"# データカード · Data card: {recipe.name or 'tanuki'}", ""]
    if not data:
        return [*lines, "No stage that reads data is finished yet."]
    lines += ["| source | files | kind | rows | tokens | left out | read by |", "|---|---|---|---:|---:|---:|---|"]
    for name, facts in data.items():
        left_out = facts["rejected"] + sum(facts["dropped"].values())
        lines.append(
            f"| {_cell(name)} | `{_cell(facts['files'])}` | {facts['kind']} | {facts['rows']:,} | {facts['tokens']:,} | "
            f"{left_out:,} | {', '.join(map(_cell, readers[name]))} |"
        )
    for name, facts in data.items():
        lines += ["", f"## {name}", ""]
        if facts["licenses"]:
            lines += ["Licences that the rows name: " + _counts(facts["licenses"]) + ".", ""]
        if facts["dropped"]:
            lines += ["Left out, by reason: " + _counts(facts["dropped"]) + ".", ""]
        if facts["rejected"]:
            lines += [f"Bad rows, left out: {facts['rejected']:,}.", ""]
        for sample in facts["samples"]:
            lines += [*_sample(sample), ""]
        lines.pop()
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _sample(row: Mapping[str, Any]) -> list[str]:
    """A row as quoted lines."""
    lines: list[str] = []
    if "text" in row:
        lines.append(_shorten(str(row["text"])))
    for field, label in NAMES.items():
        for message in row.get(field) or []:
            content = message.get("content")
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            lines.append(f"**{label or message.get('role')}** {_shorten(text)}")
    return [f"> {line}  " for line in lines] or ["> (no text)"]


def _shorten(text: str) -> str:
    """A text on one line, in which nothing is markup, cut after SHOWN characters."""
    line = " ".join(text.split())
    line = line if len(line) <= SHOWN else line[:SHOWN] + " …"
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|" else letter for letter in line)
