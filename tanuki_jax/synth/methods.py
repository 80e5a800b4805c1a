"""The chains of the methods that config/synthesis.py lists, and their templates checked against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tanuki_jax.config.schema import Recipe
from tanuki_jax.config.synthesis import METHODS, SYNTH_PREFIX, Synth
from tanuki_jax.errors import UserError
from tanuki_jax.synth import chains, preferences, seeds, templates, weak_fields
from tanuki_jax.synth.asking import Chain, Context

CHAINS: Mapping[str, Callable[[Context], Chain]] = {
    "answer": chains.answer,
    "persona": chains.dialogue,
    "topic": chains.dialogue,
    "rewrite": chains.rewrite,
    "magpie": chains.magpie,
    "evol": chains.evol,
    "preferences": preferences.chain,
}
assert CHAINS.keys() == METHODS.keys() == templates.STEPS.keys()


def context_of(synth: Synth, name: str = "") -> Context:
    """An entry with its templates; a UserError where these cannot be read, or lack a style of the entry."""
    context = Context(synth, templates.load(synth.method, synth.language, synth.templates))
    for style in synth.styles if synth.method == "rewrite" else ():
        if style not in context.templates.texts:
            options = ", ".join(context.templates.texts)
            raise UserError(f"config: synth.{name}.styles: there is no template for {style!r}; there is {options}")
    return context


def check(recipe: Recipe, name: str) -> None:
    """Looks at all that the rows `name` of `synth` need and no stage makes: templates, styles, scores, lists and files of seeds.

    For the time before anything long begins; the first row of each file of seeds is read.
    """
    synth = recipe.synth[name]
    context_of(synth, name)
    if synth.scores and synth.scores not in recipe.stages:
        weak_fields.weakest(Path(synth.scores), synth.weakest)
    for kind, address in synth.seeds.items():
        if not address.startswith(SYNTH_PREFIX):
            seeds.check(kind, address)
