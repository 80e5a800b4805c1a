"""What a family asks and answers, many times over."""

from random import Random

from tanuki_jax.synth.families import LANGUAGES

COUNT = 300


def draws(family):
    """Yields (language, prompt, right answer, wrong answer, prose), all phrasings in turn."""
    for i in range(COUNT):
        rng, lang = Random(i), LANGUAGES[i % 2]
        content = family.draw(rng)
        prompt = family.prompt(content, lang, i // 2 % len(family.ask[lang]))
        yield lang, prompt, family.answer(content, lang), family.wrong(rng, content, lang), family.say(content, lang)
