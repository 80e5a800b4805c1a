"""The interface of a family of rule-made questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any, TypeAlias

from tanuki_jax.config.synthesis import LANGUAGES

Content: TypeAlias = tuple[Any, ...]  # the subject of a question; each family has its own
JA, EN = LANGUAGES


@dataclass(frozen=True)
class Family:
    """One kind of question.  All but `draw` and `wrong` are pure functions of content and language, so answers can be checked.

    draw: content from a random source.
    ask: phrasings per language, filled with `slots`.
    answer, wrong (a plausible false answer), say (the same as prose).
    held_out_key: identifies content that, where it is held out, must not occur in training in any phrasing or language; None
      where only the prompt itself is held out (a fact or a word cannot be guessed).
    weight: how often it is drawn, relative to the others.
    """

    name: str
    draw: Callable[[Random], Content]
    ask: dict[str, tuple[str, ...]]
    slots: Callable[[Content, str], tuple[str, ...]]
    answer: Callable[[Content, str], str]
    wrong: Callable[[Random, Content, str], str]
    say: Callable[[Content, str], str]
    held_out_key: Callable[[Content], str] | None = None
    weight: float = 1.0

    def prompt(self, content: Content, lang: str, phrasing: int) -> str:
        """The question in one of its phrasings."""
        return self.ask[lang][phrasing].format(*self.slots(content, lang))


def side(lang: str) -> int:
    """Where a language stands in a (Japanese, English) pair."""
    return 0 if lang == JA else 1


def listed(items: Iterable[object], lang: str) -> str:
    """Items with the language's comma."""
    return ("、" if lang == JA else ", ").join(str(item) for item in items)


def in_language(lang: str, ja: str, en: str) -> str:
    """The text of the language."""
    return ja if lang == JA else en
