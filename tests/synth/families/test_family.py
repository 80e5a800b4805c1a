from random import Random

import pytest

from tanuki_jax.synth import rules
from tanuki_jax.synth.families import FAMILIES, FOLLOW_UPS, LANGUAGES
from tests.synth.families.draws import draws

JAPANESE = range(0x3040, 0xA000)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_answer_is_never_the_right_one(name):
    assert [right for _, _, right, wrong, _ in draws(FAMILIES[name]) if wrong == right] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_phrasings_differ_in_both_languages(name):
    content = FAMILIES[name].draw(Random(0))
    for lang in LANGUAGES:
        asked = {FAMILIES[name].prompt(content, lang, i) for i in range(len(FAMILIES[name].ask[lang]))}
        assert len(asked) == len(FAMILIES[name].ask[lang]) >= 3


@pytest.mark.parametrize("name", FAMILIES)
def test_japanese_is_asked_and_answered_in_japanese_and_english_in_english(name):
    for lang, prompt, right, wrong, said in draws(FAMILIES[name]):
        for text in (prompt, right, wrong, said):
            outside = text.translate({ord(c): None for c in "、。・「」"}) if lang == "ja" else text
            words = [w for w in outside.split() if w.isascii() and w.isalpha() and len(w) > 1]
            assert bool(words) <= (lang == "en" or name == "lexicon")
            assert any(ord(c) in JAPANESE for c in text) >= (lang == "ja" and name not in ("ascending", "descending"))


def test_no_two_families_ask_the_same():
    asked = {}
    for name, family in FAMILIES.items():
        for _, prompt, *_ in draws(family):
            assert asked.setdefault(prompt, name) == name


def test_a_second_question_is_about_the_content_of_the_first():
    for seed in range(200):
        rng = Random(seed)
        [first] = rules.conversation(rng, LANGUAGES[seed % 2], False, two_turns=False)
        second = rules.follow_up(rng, first)
        if second is None:
            assert not any(first.family in f.after and f.asks != first.family for f in FOLLOW_UPS)
            continue
        assert second.lang == first.lang and second.content[0] == first.content[0]
        assert second.content == first.content or first.family == "facts"
        assert (second.family, second.content) != (first.family, first.content)
        assert second.answer == FAMILIES[second.family].answer(second.content, second.lang) != second.wrong
