"""What the groups about made rows must be: endpoints, filters, synth, and the stages and sources that name them."""

from __future__ import annotations

from collections.abc import Collection

from tanuki_jax.config.addresses import check_address, is_url
from tanuki_jax.config.derived import SYNTH_PREFIX, made_sources, making_stage, needs_stage
from tanuki_jax.config.kinds import STAGE_KINDS
from tanuki_jax.config.schema import Recipe
from tanuki_jax.config.synthesis import RULES, Filters, Synth
from tanuki_jax.errors import UserError


def check_made_rows(recipe: Recipe) -> None:
    """An error about the first key of these groups whose value cannot be, with the fix."""
    for name, endpoint in recipe.endpoints.items():
        check_address(f"endpoints.{name}.base_url", endpoint.base_url, "name the variable that holds it in api_key_env")
        if endpoint.base_url and not is_url(endpoint.base_url):
            raise UserError(
                f"config: endpoints.{name}.base_url is {endpoint.base_url!r}; it must be an address, http://127.0.0.1:8000/v1 "
                "for example"
            )
    for name, filters in recipe.filters.items():
        _check_filters(recipe, f"config: filters.{name}", filters)
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
    for reader in recipe.stages:
        _check_makers(recipe, reader)
    for name in recipe.tokenizer.sources if not recipe.tokenizer.path else ():
        files = recipe.data[name].files if name in recipe.data else ""
        if files.startswith(SYNTH_PREFIX) and needs_stage(recipe, files.removeprefix(SYNTH_PREFIX)):
            raise UserError(
                f"config: tokenizer.sources names {name!r}, which a stage makes; the tokenizer comes before all stages"
            )


def _check_filters(recipe: Recipe, where: str, filters: Filters) -> None:
    check_address(f"{where.removeprefix('config: ')}.evaluation", filters.evaluation)
    if filters.language not in ("", "ja", "en"):
        raise UserError(f"{where}.language is {filters.language!r}; it must be ja, en or empty")
    if 0 < filters.max_characters < filters.min_characters:
        raise UserError(
            f"{where}.max_characters {filters.max_characters} is below min_characters {filters.min_characters}; nothing would "
            "be left"
        )
    judged = [key for key in ("min_quality", "dependent_turns") if getattr(filters, key)]
    if judged and not filters.judge:
        raise UserError(f"{where}.{judged[0]} needs a judge; set {where.removeprefix('config: ')}.judge to a name in endpoints")
    _check_address_of(recipe, f"{where}.judge", filters.judge)


def _check_synth(recipe: Recipe, name: str, synth: Synth) -> None:
    where = f"config: synth.{name}"
    _check_name(f"{where}.generator", synth.generator, recipe.endpoints, "endpoints")
    _check_address_of(recipe, f"{where}.better", synth.better)
    if synth.judge != RULES:
        _check_address_of(recipe, f"{where}.judge", synth.judge, "endpoints, or rules")
    _check_name(f"{where}.filters", synth.filters, recipe.filters, "filters")
    if synth.language not in ("ja", "en"):
        raise UserError(f"{where}.language is {synth.language!r}; it must be ja or en")
    for role, files in synth.seeds.items():
        check_address(f"synth.{name}.seeds.{role}", files)
        if files.startswith(SYNTH_PREFIX):
            _check_made(recipe, f"{where}.seeds.{role}", files)
    _check_circle(recipe, name)


def _check_makers(recipe: Recipe, stage: str) -> None:
    """An error where nobody makes what a stage reads."""
    for name in made_sources(recipe, stage):
        if needs_stage(recipe, name) and not making_stage(recipe, name):
            raise UserError(
                f"config: synth.{name}.generator is {recipe.synth[name].generator!r}, which has no address, and no stage makes "
                f"the rows, which stage {stage} reads; name an endpoint with a base_url, or add a stage of kind synth with "
                f"synth={name!r}"
            )


def _check_circle(recipe: Recipe, name: str) -> None:
    """An error where rows are, by way of others, seeds of their own making."""
    waiting, visited = [name], set()
    while waiting:
        for files in recipe.synth[waiting.pop()].seeds.values():
            seed = files.removeprefix(SYNTH_PREFIX)
            if files.startswith(SYNTH_PREFIX) and seed == name:
                raise UserError(f"config: synth.{name}.seeds: {name} would be made from itself; name other rows")
            if files.startswith(SYNTH_PREFIX) and seed in recipe.synth and seed not in visited:
                visited.add(seed)
                waiting.append(seed)


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
