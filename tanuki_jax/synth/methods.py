"""The methods by which models make rows, in one table; config/synthesis.py lists their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tanuki_jax.config.schema import Recipe
from tanuki_jax.config.synthesis import METHODS as NAMES
from tanuki_jax.config.synthesis import RULES, Synth
from tanuki_jax.errors import UserError
from tanuki_jax.synth import chains, preferences
from tanuki_jax.synth.asking import Chain, Context
from tanuki_jax.synth.templates import STEPS

DIALOGUES, DOCUMENTS, PAIRS = "dialogues", "documents", "pairs"


@dataclass(frozen=True)
class Method:
    """One way to make rows.

    chain: the function that asks and gives the rows of an item.  seeds: the kinds of seeds that it needs.  gives: what its rows
    are trained as.  calls: requests for one item where all goes well.
    """

    chain: Callable[[Context], Chain]
    seeds: tuple[str, ...]
    gives: str
    calls: Callable[[Context], int]


METHODS: Mapping[str, Method] = {
    "answer": Method(chains.answer, ("prompts",), DIALOGUES, lambda context: 1),
    "persona": Method(chains.dialogue, ("personas", "tasks"), DIALOGUES, lambda context: 2 * context.synth.turns),
    "topic": Method(chains.dialogue, ("topics",), DIALOGUES, lambda context: 2 * context.synth.turns),
    "rewrite": Method(chains.rewrite, ("documents",), DOCUMENTS, lambda context: len(chains.styles(context))),
    "magpie": Method(chains.magpie, (), DIALOGUES, lambda context: 2),
    "evol": Method(chains.evol, ("prompts",), DIALOGUES, lambda context: context.synth.rounds + 1),
    "preferences": Method(
        preferences.chain,
        ("prompts",),
        PAIRS,
        lambda context: preferences.calls(context.synth.samples, context.synth.judge, context.synth.better),
    ),
}
assert METHODS.keys() == set(NAMES) == STEPS.keys()


def roles(synth: Synth) -> dict[str, str]:
    """Role -> name in `endpoints` of the models that a method asks; an empty name is the model of a synth stage."""
    named = {"generator": synth.generator}
    if synth.method == "preferences" and synth.better:
        named["better"] = synth.better
    elif synth.method == "preferences" and synth.judge != RULES:
        named["judge"] = synth.judge
    return named


def check(recipe: Recipe, name: str, in_stage: bool) -> Synth:
    """The entry `name` of a recipe's `synth`, or a UserError about what is wrong in it.

    in_stage: whether a stage's own model may be the generator.
    """
    if name not in recipe.synth:
        raise UserError(f"config: synth has no {name!r}; it has {', '.join(recipe.synth) or 'nothing'}")
    synth, where = recipe.synth[name], f"config: synth.{name}"
    if synth.method not in METHODS:
        raise UserError(f"{where}.method is {synth.method!r}; it must be one of {', '.join(METHODS)}")
    if synth.language not in ("ja", "en"):
        raise UserError(f"{where}.language is {synth.language!r}; it must be ja or en")
    needed = METHODS[synth.method].seeds
    for kind in needed:
        if not synth.seeds.get(kind):
            raise UserError(
                f"{where}.seeds has no {kind}; {synth.method} needs {' and '.join(needed)}, as files or lists of ours"
            )
    for kind in synth.seeds:
        if kind not in needed:
            raise UserError(f"{where}.seeds names {kind}; {synth.method} reads {' and '.join(needed) or 'no seeds'}")
    if not needed and not synth.items:
        raise UserError(f"{where}.items is 0; {synth.method} has no seeds that could run out, so set a number of rows")
    for role, endpoint in roles(synth).items():
        if not endpoint and role == "generator" and in_stage:
            continue
        if not endpoint and role == "judge":
            raise UserError(f"{where}.judge is empty; name one of `endpoints`, or {RULES}, or a `better` model instead")
        if endpoint not in recipe.endpoints:
            meaning = "; only a stage of kind synth may leave it empty" if not endpoint else ""
            options = ", ".join(recipe.endpoints) or "nothing"
            raise UserError(f"{where}.{role} {endpoint!r} is not in endpoints, which has {options}{meaning}")
    if synth.filters and synth.filters not in recipe.filters:
        raise UserError(f"{where}.filters {synth.filters!r} is not in filters ({', '.join(recipe.filters) or 'nothing'})")
    return synth


def check_styles(context: Context, where: str) -> None:
    """A UserError about a style that has no template."""
    if context.synth.method == "rewrite":
        for style in context.synth.styles:
            if style not in context.templates.texts:
                options = ", ".join(context.templates.texts)
                raise UserError(f"{where}.styles: there is no template for {style!r}; there is {options}")
