"""Where the rows of a source lie: files of the user's, rows made by rules or by a model, and what filters leave of them."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from tanuki_jax import config, files
from tanuki_jax.config.derived import made_sources
from tanuki_jax.config.schema import Recipe
from tanuki_jax.config.synthesis import RULES_PREFIX, SYNTH_PREFIX
from tanuki_jax.data import paths, sources
from tanuki_jax.errors import UserError
from tanuki_jax.recipe.make_rows import make_rows
from tanuki_jax.recipe.workdir import Workdir
from tanuki_jax.synth import methods, rules


class SourceFiles(NamedTuple):
    """Globs of files, their fingerprint, the fields that are read of their rows, and where it is counted what was left out."""

    files: str
    identity: str
    fields: sources.Fields
    counts: tuple[Path, ...] = ()  # files of the making and of filters
    generated: bool = False  # by a model: every row has its provenance


def locate(recipe: Recipe, name: str, workdir: Workdir) -> SourceFiles:
    """The files of a source; those that rules or endpoints make, and those that filters leave, are written first."""
    source = recipe.data[name]
    fields = sources.Fields(source.text, row_format=source.row_format)
    _check_files(recipe, name)
    if source.files.startswith(SYNTH_PREFIX):
        rows = make_rows(recipe, source.files.removeprefix(SYNTH_PREFIX), workdir)
        located = SourceFiles(str(rows), files.fingerprint(rows), fields, (rows.with_name("report.json"),), generated=True)
    elif source.files.startswith(RULES_PREFIX):
        located = SourceFiles(*rule_made(recipe, source.files, workdir, f"data.{name}"), fields)
    else:
        located = SourceFiles(source.files, sources.identity(source.files), fields)
    return _filter(recipe, name, workdir, located) if source.filters else located


def rule_made(recipe: Recipe, address: str, workdir: Workdir, key: str) -> tuple[str, str]:
    """The file of rule-made rows, written where it is missing, and its fingerprint; key: of the config, for messages."""
    split = _split(address, key)
    options = recipe.rules
    by_split = {"pairs": options.pairs, "documents_ja": options.documents, "documents_en": options.documents}
    count = by_split.get(split, options.dialogues)
    code = rules.code_files()
    identity = files.fingerprint(split, count, recipe.seed, *code)
    path = workdir.data / f"rules-{split}-{identity}.jsonl"
    if not path.is_file():
        files.write_jsonl(path, rules.rows(split, count, recipe.seed))
    return str(path), identity


def _check_files(recipe: Recipe, name: str) -> None:
    if not recipe.data[name].files:
        raise UserError(
            f"config: data.{name} is empty; set it to your files, for example --config.data.{name}='texts/*.jsonl.gz'"
        )


def _split(address: str, key: str) -> str:
    split = address.removeprefix(RULES_PREFIX)
    if split not in rules.SPLITS:
        raise UserError(f"config: {key} is {address!r}; rules: makes {', '.join(rules.SPLITS)}")
    return split


def _filter(recipe: Recipe, name: str, workdir: Workdir, located: SourceFiles) -> SourceFiles:
    """What the filters of a source leave of it; what they drop lies beside, with the reasons."""
    from tanuki_jax.data import filters

    source, options = recipe.data[name], recipe.filters[recipe.data[name].filters]
    judge = recipe.endpoints.get(options.judge)
    settings = [config.settings(group) for group in (options, judge) if group]
    prompts = sources.identity(options.evaluation) if options.evaluation else ""
    read = [source.text, source.row_format, source.skip_invalid]
    identity = files.fingerprint(located.identity, read, settings, prompts, filters.VERSION)
    directory = workdir.data / f"filtered-{name}-{identity}"
    if not directory.is_dir():
        summary = filters.filter_files(
            *(located.files, options, directory), fields=located.fields, skip_invalid=source.skip_invalid, judge=judge
        )
        print(f"data {name}, filters {source.filters}:\n{summary}", file=sys.stderr, flush=True)
    return SourceFiles(
        str(directory / "rows.jsonl"), identity, sources.PLAIN, (*located.counts, directory / "summary.json"), located.generated
    )


def check(recipe: Recipe, stages: Collection[str]) -> None:
    """Looks at all that stages read before anything long begins: it is there, and the first row of each file can be read.

    Says which files two sources share: they are trained on twice, which may be meant.
    """
    for name in sorted({name for stage in stages for name in made_sources(recipe, stage)}):
        methods.check(recipe, name)
    first: dict[object, str] = {}
    for name in sorted({name for stage in stages for name in config.stage_sources(recipe.stages[stage])}):
        source = recipe.data[name]
        _check_files(recipe, name)
        if source.files.startswith(RULES_PREFIX):
            _split(source.files, f"data.{name}")
        if source.files.startswith((RULES_PREFIX, SYNTH_PREFIX)):
            continue
        for path in sources.matching_files(source.files):
            other = first.setdefault(paths.identity_key(path), name)
            if other != name:
                paths.warn(f"data: {path} is in the sources {other} and {name}, and is trained on as often as both are")
        if not source.files.endswith(".bin"):
            fields = sources.Fields(source.text, row_format=source.row_format)
            on_bad_row = sources.skip_silently if source.skip_invalid else None
            next(sources.read_rows(source.files, fields, on_bad_row), None)
