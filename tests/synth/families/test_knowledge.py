import re

import pytest

from tanuki_jax.synth import world
from tanuki_jax.synth.families import FAMILIES
from tests.synth.families.draws import draws

GODAN = dict(zip("うくぐすつぬぶむる", "いきぎしちにびみり", strict=True))
ICHIDAN = {"食べる", "見る", "教える", "覚える", "起きる", "寝る"}


def masu(verb):
    """The polite form of a Japanese verb by the rules of grammar."""
    if verb == "来る":
        return "来ます"
    return (verb[:-1] if verb in ICHIDAN else verb[:-1] + GODAN[verb[-1]]) + "ます"


@pytest.mark.parametrize(
    "table", ["LEXICON", "PEOPLE", "TOWNS", "JOBS", "FOODS", "PETS", "WEEKDAYS", "MONTHS", "POLITE", "POLITE_ENGLISH"]
)
def test_no_entry_of_a_table_is_there_twice_so_that_another_entry_is_wrong(table):
    for column in zip(*getattr(world, table), strict=True):
        assert len(set(column)) == len(column)


def test_no_situation_and_no_phrase_is_there_twice():
    for part in zip(*world.MANNERS, strict=True):
        for column in zip(*part, strict=True):
            assert len(set(column)) == len(column)


def test_a_person_has_the_same_facts_in_both_languages_and_in_prose():
    family, known = FAMILIES["facts"], {}
    for content in [(p, a) for p in range(len(world.PEOPLE)) for a in world.ATTRIBUTES]:
        for side, lang in enumerate(("ja", "en")):
            right = family.answer(content, lang)
            values = [i for i, value in enumerate(world.ATTRIBUTES[content[1]]) if value[side] in right]
            assert known.setdefault(content, values) == values and len(values) == 1
            assert world.PEOPLE[content[0]][side] in right and family.say(content, lang) == right
            for phrasing in range(len(family.ask[lang])):
                prompt = family.prompt(content, lang, phrasing)
                assert world.PEOPLE[content[0]][side] in prompt
                assert world.ATTRIBUTES[content[1]][values[0]][side] not in prompt
    for attribute in world.ATTRIBUTES:
        assert len({tuple(v) for (_, a), v in known.items() if a == attribute}) > 4


def test_a_word_is_translated_by_the_lexicon():
    pairs = dict(world.LEXICON) | {en: ja for ja, en in world.LEXICON}
    for _, prompt, right, wrong, said in draws(FAMILIES["lexicon"]):
        [word], [answer], [other] = (re.findall("「(.+?)」", text) for text in (prompt, right, wrong))
        assert answer == pairs[word] != other and other.isascii() == answer.isascii()
        assert set(re.findall("「(.+?)」", said)) == {word, answer}
        assert ("英語" in prompt or "English" in prompt) == answer.isascii()


def test_the_polite_form_is_that_of_the_grammar():
    for lang, prompt, right, wrong, said in draws(FAMILIES["politeness"]):
        plain = re.search('「(.+?)」|"(.+?)"', prompt)
        expected = masu(plain[1]) if lang == "ja" else f"Could you {plain[2][0].lower()}{plain[2][1:-1]}, please?"
        assert right == expected != wrong and expected in said and (plain[1] or plain[2]) in said


def test_one_says_what_the_situation_asks_for():
    table = {situation[side]: phrase[side] for situation, phrase in world.MANNERS for side in (0, 1)}
    for _, prompt, right, wrong, said in draws(FAMILIES["manners"]):
        [phrase] = [table[s] for s in table if s in prompt]
        assert phrase in right and phrase in said and phrase not in wrong
