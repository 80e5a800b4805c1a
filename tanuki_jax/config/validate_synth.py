"""What the groups about made rows must be: endpoints, filters, synth, and the stages and sources that name them."""

from __future__ import annotations

from collections.abc import Collection

from tanuki_jax.config.addresses import check_address, check_base_url
from tanuki_jax.config.derived import made_sources, making_order, making_stage, needs_stage, waits_for_stage
from tanuki_jax.config.kinds import STAGE_KINDS
from tanuki_jax.config.schema import Recipe
from tanuki_jax.config.synthesis import (
    JUDGE,
    LANGUAGES,
    METHODS,
    PII,
    RULES,
    SYNTH_PREFIX,
    Filters,
    Synth,
    decider,
    has_prices,
    roles,
)
from tanuki_jax.errors import UserError


def check_made_rows(recipe: Recipe) -> None:
    """An error about the first key of these groups whose value cannot be, with the fix."""
    for name, endpoint in recipe.endpoints.items():
        if endpoint.base_url:
            check_base_url(f"config: endpoints.{name}.base_url", endpoint.base_url)
    for name, filters in recipe.filters.items():
        check_filters(filters, f"config: filters.{name}")
        _check_address_of(recipe, f"config: filters.{name}.judge", filters.judge)
    for name, source in recipe.data.items():
        _check_name(f"config: data.{name}.filters", source.filters, recipe.filters, "filters")
        if source.files.startswith(SYNTH_PREFIX):
            _check_made(recipe, f"config: data.{name}", source.files)
    for name, stage in recipe.stages.items():
        if STAGE_KINDS[stage.kind].makes_rows:
            _check_maker(recipe, name)
        elif stage.synth:
            raise UserError(f"config: stages.{name}.synth is for stages of kind synth; leave it out")
    for name, synth in recipe.synth.items():
        _check_synth(recipe, name, synth)
    making_order(recipe, recipe.synth)
    for reader in recipe.stages:
        _check_makers(recipe, reader)
    for name in recipe.tokenizer.sources if not recipe.tokenizer.path else ():
        files = recipe.data[name].files if name in recipe.data else ""
        if waits_for_stage(recipe, files):
            raise UserError(
                f"config: tokenizer.sources names {name!r}, which a stage makes; the tokenizer comes before all stages"
            )


def check_filters(filters: Filters, where: str = "filters") -> None:
    """An error about filters that cannot work as they are set."""
    check_address(f"{where.removeprefix('config: ')}.evaluation", filters.evaluation)
    if filters.language not in ("", *LANGUAGES):
        raise UserError(f"{where}.language is {filters.language!r}; it must be ja, en or empty")
    if filters.pii not in PII:
        raise UserError(f"{where}.pii is {filters.pii!r}; it must be {', '.join(PII)}")
    if 0 < filters.max_characters < filters.min_characters:
        raise UserError(
            f"{where}.max_characters {filters.max_characters} is below min_characters {filters.min_characters}; nothing would "
            "be left"
        )
    judged = [key for key in ("min_quality", "dependent_turns") if getattr(filters, key)]
    if judged and not filters.judge:
        name = f"{where.removeprefix('config: ')}.judge"
        raise UserError(f"{where}.{judged[0]} needs a judge; set {name} to a name in endpoints (--judge)")


def _check_synth(recipe: Recipe, name: str, synth: Synth) -> None:
    where = f"config: synth.{name}"
    _check_name(f"{where}.generator", synth.generator, recipe.endpoints, "endpoints")
    _check_address_of(recipe, f"{where}.better", synth.better)
    if synth.judge != RULES:
        _check_address_of(recipe, f"{where}.judge", synth.judge, "endpoints, or rules")
    _check_name(f"{where}.filters", synth.filters, recipe.filters, "filters")
    if synth.language not in LANGUAGES:
        raise UserError(f"{where}.language is {synth.language!r}; it must be ja or en")
    if decider(synth) == JUDGE and not synth.judge:
        raise UserError(f"{where}.judge is empty; name one of `endpoints`, or {RULES}, or a `better` model instead")
    if synth.max_cost and not has_prices(recipe.endpoints[endpoint] for endpoint in roles(synth).values() if endpoint):
        raise UserError(
            f"{where}.max_cost is {synth.max_cost:g}, but no endpoint that is asked has a price, so that nothing would be "
            "counted; set input_price and output_price of it"
        )
    _check_seeds(recipe, where, synth)


def _check_seeds(recipe: Recipe, where: str, synth: Synth) -> None:
    """An error where a method has not the seeds that it needs, or others."""
    needed = METHODS[synth.method].seeds
    for kind in needed:
        if not synth.seeds.get(kind):
            raise UserError(
                f"{where}.seeds has no {kind}; {synth.method} needs {' and '.join(needed)}, as files or lists of ours"
            )
    if not needed and not synth.items:
        raise UserError(f"{where}.items is 0; {synth.method} has no seeds that could run out, so set a number of rows")
    for kind, files in synth.seeds.items():
        if kind not in needed:
            raise UserError(f"{where}.seeds names {kind}; {synth.method} reads {' and '.join(needed) or 'no seeds'}")
        check_address(f"{where.removeprefix('config: ')}.seeds.{kind}", files)
        if files.startswith(SYNTH_PREFIX):
            _check_made(recipe, f"{where}.seeds.{kind}", files)


def _check_makers(recipe: Recipe, stage: str) -> None:
    """An error where nobody makes what a stage reads."""
    for name in made_sources(recipe, stage):
        if needs_stage(recipe, name) and not making_stage(recipe, name):
            raise UserError(
                f"config: synth.{name}.generator is {recipe.synth[name].generator!r}, which has no address, and no stage makes "
                f"the rows, which stage {stage} reads; name an endpoint with a base_url, or add a stage of kind synth with "
                f"synth={name!r}"
            )


def _check_maker(recipe: Recipe, name: str) -> None:
    stage, where = recipe.stages[name], f"config: stages.{name}"
    if not stage.synth:
        raise UserError(f"{where}.synth is empty; name the rows in `synth` that it makes")
    _check_name(f"{where}.synth", stage.synth, recipe.synth, "synth")
    if not needs_stage(recipe, stage.synth):
        raise UserError(
            f"{where}.synth: {stage.synth} has the generator {recipe.synth[stage.synth].generator!r}, which has an address; a "
            "stage makes rows with the model that it starts from, so leave the address out, or the stage"
        )
    if not stage.init_from:
        raise UserError(f"{where}.init_from is empty; a stage that makes rows needs a model")
    first = making_stage(recipe, stage.synth)
    if first != name:
        raise UserError(f"{where}.synth: stage {first} makes {stage.synth} already; rows are made once")
    if stage.mixture:
        raise UserError(f"{where}.mixture: the stage trains nothing; its rows come from synth.{stage.synth}.seeds")


def check_parent(recipe: Recipe, where: str, init_from: str) -> None:
    """An error where a stage is to start from one that makes rows."""
    if init_from in recipe.stages and STAGE_KINDS[recipe.stages[init_from].kind].makes_rows:
        raise UserError(
            f"{where}.init_from names {init_from!r}, which makes rows and has no checkpoint; start from "
            f"{recipe.stages[init_from].init_from!r}, and read its rows as a source"
        )


def _check_made(recipe: Recipe, where: str, files: str) -> None:
    name = files.removeprefix(SYNTH_PREFIX)
    if name not in recipe.synth:
        raise UserError(f"{where} is {files!r}, and `synth` has no {name!r} ({', '.join(recipe.synth) or 'it is empty'})")


def _check_address_of(recipe: Recipe, where: str, name: str, group: str = "endpoints") -> None:
    """An error where a name is of no endpoint, or of one that only the model of a stage can stand for."""
    _check_name(where, name, recipe.endpoints, group)
    if name and not recipe.endpoints[name].base_url:
        raise UserError(f"{where} is {name!r}, whose base_url is empty; set it to the address of a server")


def _check_name(where: str, name: str, names: Collection[str], group: str) -> None:
    if name and name not in names:
        raise UserError(f"{where} is {name!r}, which is not in {group} ({', '.join(names) or 'it is empty'})")
