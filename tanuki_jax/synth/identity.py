"""What requests and rows depend on, as fingerprints.

An answer that is paid for is found again by what was asked, whatever else has changed: so a request's id depends on little.
The rows that come out depend on everything.
"""

from __future__ import annotations

from collections.abc import Mapping

from tanuki_jax import files
from tanuki_jax.config.derived import settings
from tanuki_jax.config.schema import Recipe
from tanuki_jax.config.synthesis import METHODS, RULES, Endpoint, Filters, decider
from tanuki_jax.data import filters as row_filters
from tanuki_jax.data import sources
from tanuki_jax.synth import rules, seeds
from tanuki_jax.synth.asking import Context


def of_requests(recipe: Recipe, name: str, generator_id: str) -> str:
    """What all requests for the rows `name` share, beside what is asked and of which model (endpoint/job.py)."""
    return files.fingerprint(name, recipe.seed, generator_id)


def of_rows(
    recipe: Recipe,
    name: str,
    context: Context,
    endpoints: Mapping[str, Endpoint],
    makers: seeds.Makers,
    weak: tuple[str, ...],
    generator_id: str,
) -> str:
    """All that the rows `name` depend on; keys that may change in a resumed run are none of it.

    Settings of the entry, its endpoints and filters; what lies in seeds and evaluations' files; our code where rules make or
    judge; the model of a stage.
    """
    synth = context.synth
    groups = {group: settings(value) for group, value in {"synth": synth, **endpoints}.items()}
    lists = {kind: seeds.identity(synth.seeds[kind], makers) for kind in METHODS[synth.method].seeds}
    code = rules.code_files() if decider(synth) == RULES else []
    filters_id = _of_filters(recipe, recipe.filters[synth.filters]) if synth.filters else ""
    requests_id = of_requests(recipe, name, generator_id)
    return files.fingerprint(requests_id, groups, context.templates.version, list(weak), lists, filters_id, *code)


def _of_filters(recipe: Recipe, filters: Filters) -> str:
    judge = recipe.endpoints.get(filters.judge)
    prompts = sources.identity(filters.evaluation) if filters.evaluation else ""
    return files.fingerprint(settings(filters), settings(judge) if judge else {}, prompts, row_filters.VERSION)
