"""The families of rule-made questions, and the second questions that may follow a first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tanuki_jax.synth import world
from tanuki_jax.synth.families.arithmetic import LISTS, UNITS
from tanuki_jax.synth.families.dates import CALENDAR
from tanuki_jax.synth.families.family import EN, JA, LANGUAGES, Content, Family, side
from tanuki_jax.synth.families.knowledge import FACTS, LEXICON, MANNERS, POLITENESS
from tanuki_jax.synth.families.letters import COUNTING, REVERSING

FAMILIES = {f.name: f for f in (*LISTS, UNITS, CALENDAR, FACTS, LEXICON, MANNERS, POLITENESS, COUNTING, REVERSING)}


@dataclass(frozen=True)
class FollowUp:
    """A second turn that makes no sense without the first.

    after: families it may follow.  asks: the family of the second question.  content: what it is about, from the first
    one's content.  slots: fill the phrasings.
    """

    after: tuple[str, ...]
    asks: str
    ask: dict[str, tuple[str, ...]]
    content: Callable[[Random, Content], Content] = lambda rng, content: content
    slots: Callable[[Content, str], tuple[str, ...]] = lambda content, lang: ()


FACT_NAMES = {
    "town": ("住んでいる町", "the town"),
    "job": ("仕事", "the job"),
    "food": ("好きな食べ物", "the favorite food"),
    "pet": ("飼っている動物", "the pet"),
}


def _other_fact(rng: Random, content: Content) -> Content:
    return content[0], rng.choice([a for a in world.ATTRIBUTES if a != content[1]])


_lists, _strings = tuple(f.name for f in LISTS), (COUNTING.name, REVERSING.name)
FOLLOW_UPS = (
    FollowUp(_lists, "maximum", {JA: ("では、その中で一番大きい数は何ですか。", "その最大値も教えてください。"), EN: ("And which of them is the largest?", "Now give me the maximum.")}),
    FollowUp(_lists, "minimum", {JA: ("では、その中で一番小さい数は何ですか。", "その最小値も教えてください。"), EN: ("And which of them is the smallest?", "Now give me the minimum.")}),
    FollowUp(_lists, "ascending", {JA: ("では、それを小さい順に並べてください。",), EN: ("Now sort them in ascending order.",)}),
    FollowUp(_strings, "counting", {JA: ("では、元の文字列は何文字ですか。",), EN: ("And how many letters were in the first one?",)}),
    FollowUp(_strings, "reversing", {JA: ("では、元の文字列を逆から書いてください。",), EN: ("Now write the first one backwards.",)}),
    FollowUp(
        ("facts",), "facts",
        {JA: ("では、その人の{}は何ですか。", "その人の{}も教えてください。"), EN: ("And what is {} of that person?", "Tell me {} of that person, too.")},
        _other_fact,
        lambda content, lang: (FACT_NAMES[content[1]][side(lang)],),
    ),
)  # fmt: skip

__all__ = ["EN", "FAMILIES", "FOLLOW_UPS", "JA", "LANGUAGES", "LISTS", "Content", "Family", "FollowUp"]
