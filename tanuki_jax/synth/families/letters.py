"""Strings of letters: counted, and read backwards."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tanuki_jax.synth import world
from tanuki_jax.synth.families.family import EN, JA, Content, Family, in_language, listed


def _draw(rng: Random) -> Content:
    alphabet = rng.choice((world.SYLLABLES, world.LETTERS))
    return tuple(rng.choice(alphabet) for _ in range(rng.randint(2, 4)))


def _spell(letters: Content, lang: str) -> str:
    return f"「{'・'.join(letters)}」"


def _count(letters: Content, lang: str) -> str:
    counted = listed((f"{c}{i}" for i, c in enumerate(letters, 1)), lang)
    return in_language(lang, f"{counted}。{len(letters)}文字です。", f"{counted}. It has {len(letters)} letters.")


def _reverse(letters: Content, lang: str) -> str:
    spelt = _spell(letters[::-1], lang)
    return in_language(lang, f"{spelt}です。", f"It is {spelt}.")


def _misspell(answer: Callable[[Content, str], str]) -> Callable[[Random, Content, str], str]:
    """The answer to a string in which one letter is another."""

    def wrong(rng: Random, letters: Content, lang: str) -> str:
        other = list(letters)
        while tuple(other) == letters:
            other[rng.randrange(len(other))] = rng.choice(world.SYLLABLES)
        return answer(tuple(other), lang)

    return wrong


def _count_say(letters: Content, lang: str) -> str:
    spelt = _spell(letters, lang)
    return in_language(lang, f"{spelt}を数えます。", f"We count {spelt}. ") + _count(letters, lang)


def _reverse_say(letters: Content, lang: str) -> str:
    spelt, back = _spell(letters, lang), _spell(letters[::-1], lang)
    return in_language(lang, f"{spelt}を逆から書くと{back}です。", f"{spelt} backwards is {back}.")


def _key(letters: Content) -> str:
    return f"string {letters}"


COUNTING = Family(
    "counting",
    _draw,
    {
        JA: ("{}は何文字ですか。", "{}の文字数を数えてください。", "{}の文字を数えるといくつですか。", "{}はいくつの文字でできていますか。", "文字数を答えてください。{}", "{}の長さは何文字ですか。"),
        EN: ("How many letters are in {}?", "Count the letters of {}.", "How long is {}?", "Tell me how many letters {} has.", "Count: {}", "What is the number of letters in {}?"),
    },
    lambda letters, lang: (_spell(letters, lang),),
    _count,
    _misspell(_count),
    _count_say,
    _key,
    weight=2.0,
)  # fmt: skip

REVERSING = Family(
    "reversing",
    _draw,
    {
        JA: ("{}を逆から書いてください。", "{}を後ろから読むとどうなりますか。", "{}を反対向きに書いてください。", "{}を逆さにしてください。", "逆順にしてください。{}", "{}を右から読んでください。"),
        EN: ("Write {} backwards.", "Reverse {}.", "What is {} read from the end?", "Spell {} in reverse.", "Turn around: {}", "What do you get when you reverse {}?"),
    },
    lambda letters, lang: (_spell(letters, lang),),
    _reverse,
    _misspell(_reverse),
    _reverse_say,
    _key,
    weight=2.0,
)  # fmt: skip
