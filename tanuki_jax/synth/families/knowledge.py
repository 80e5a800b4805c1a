"""What has to be known: facts about people, words in two languages, manners, polite forms."""

from __future__ import annotations

from tanuki_jax.synth import world
from tanuki_jax.synth.families.family import EN, JA, Content, Family, in_language, side

FACT_SENTENCES = {
    "town": ("{}は{}に住んでいます。", "{} lives in {}."),
    "job": ("{}の仕事は{}です。", "{} is {}."),
    "food": ("{}の好きな食べ物は{}です。", "{} likes {}."),
    "pet": ("{}は{}を飼っています。", "{} has {}."),
}
FACT_SUBJECTS = {
    "town": ("{}の住んでいる町", "the town where {} lives"),
    "job": ("{}の仕事", "the job of {}"),
    "food": ("{}の好きな食べ物", "the favorite food of {}"),
    "pet": ("{}の飼っている動物", "the pet of {}"),
}


def _fact_slots(content: Content, lang: str) -> tuple[str, ...]:
    person, attribute = content
    return (FACT_SUBJECTS[attribute][side(lang)].format(world.PEOPLE[person][side(lang)]),)


def _fact(content: Content, lang: str, shift: int = 0) -> str:
    person, attribute = content
    values = world.ATTRIBUTES[attribute]
    value = values[(world.fact(person, attribute) + shift) % len(values)][side(lang)]
    return FACT_SENTENCES[attribute][side(lang)].format(world.PEOPLE[person][side(lang)], value)


FACTS = Family(
    "facts",
    lambda rng: (rng.randrange(len(world.PEOPLE)), rng.choice(list(world.ATTRIBUTES))),
    {
        JA: ("{}は何ですか。", "{}を教えてください。", "{}を知っていますか。", "{}を答えてください。", "質問です。{}は何でしょうか。", "{}について教えてください。"),
        EN: ("What is {}?", "Tell me {}.", "Do you know {}?", "Please name {}.", "A question: what is {}?", "I want to know {}."),
    },
    _fact_slots,
    _fact,
    lambda rng, content, lang: _fact(content, lang, rng.randint(1, 7)),
    _fact,
    weight=1.4,
)  # fmt: skip


def _word_slots(content: Content, lang: str) -> tuple[str, ...]:
    word, way = content
    quoted = f"「{world.LEXICON[word][0 if way == 'to_en' else 1]}」"
    if lang == JA:
        return (f"{quoted}を{'英語' if way == 'to_en' else '日本語'}",)
    return (f"{quoted} in {'English' if way == 'to_en' else 'Japanese'}",)


def _word(content: Content, lang: str, shift: int = 0) -> str:
    word, way = content
    other = world.LEXICON[(word + shift) % len(world.LEXICON)][1 if way == "to_en" else 0]
    return in_language(lang, f"「{other}」です。", f"It is 「{other}」.")


def _word_say(content: Content, lang: str) -> str:
    ja, en = world.LEXICON[content[0]]
    return in_language(lang, f"「{ja}」は英語で「{en}」と言います。", f"The Japanese word 「{ja}」 means 「{en}」.")


LEXICON = Family(
    "lexicon",
    lambda rng: (rng.randrange(len(world.LEXICON)), rng.choice(("to_en", "to_ja"))),
    {
        JA: ("{}で何と言いますか。", "{}に訳してください。", "{}にしてください。", "{}で言うとどうなりますか。", "{}で教えてください。", "{}で書いてください。"),
        EN: ("What is {}?", "How do you say {}?", "Translate {}.", "Write {}.", "Tell me {}.", "Please say {}."),
    },
    _word_slots,
    _word,
    lambda rng, content, lang: _word(content, lang, rng.randint(1, len(world.LEXICON) - 1)),
    _word_say,
    weight=2.0,
)  # fmt: skip


def _situation(content: Content, lang: str) -> str:
    return world.MANNERS[content[0]][0][side(lang)]


def _phrase(content: Content, lang: str, shift: int = 0) -> str:
    phrase = world.MANNERS[(content[0] + shift) % len(world.MANNERS)][1][side(lang)]
    return in_language(lang, f"「{phrase}」と言います。", f'You say "{phrase}"')


def _manners_say(content: Content, lang: str) -> str:
    situation, phrase = _situation(content, lang), world.MANNERS[content[0]][1][side(lang)]
    return in_language(lang, f"{situation}には「{phrase}」と言います。", f'When {situation}, you say "{phrase}"')


MANNERS = Family(
    "manners",
    lambda rng: (rng.randrange(len(world.MANNERS)),),
    {
        JA: ("{}、何と言いますか。", "{}のあいさつを教えてください。", "{}に言う言葉は何ですか。", "{}は、どう言えばいいですか。", "{}に使う表現を答えてください。", "質問です。{}には何と言うでしょうか。"),
        EN: ("What do you say when {}?", "When {}, what do you say?", "Which words do you use when {}?", "Tell me what to say when {}.", "What is the right thing to say when {}?", "A question: what does one say when {}?"),
    },
    lambda content, lang: (_situation(content, lang),),
    _phrase,
    lambda rng, content, lang: _phrase(content, lang, rng.randint(1, len(world.MANNERS) - 1)),
    _manners_say,
    weight=0.7,
)  # fmt: skip


def _polite(content: Content, lang: str, shift: int = 0) -> tuple[str, str]:
    table = world.POLITE if lang == JA else world.POLITE_ENGLISH
    return table[(content[0] % len(table) + shift) % len(table)]


def _polite_say(content: Content, lang: str) -> str:
    plain, polite = _polite(content, lang)
    return in_language(lang, f"「{plain}」を丁寧に言うと「{polite}」です。", f'"{plain}" is politely "{polite}"')


POLITENESS = Family(
    "politeness",
    lambda rng: (rng.randrange(len(world.POLITE)),),
    {
        JA: ("「{}」を丁寧に言ってください。", "「{}」の丁寧な形は何ですか。", "「{}」を丁寧語にしてください。", "「{}」をていねいに言い換えてください。", "「{}」を「ます」の形にしてください。", "「{}」はどう言えば丁寧ですか。"),
        EN: ('Say "{}" politely.', 'Make "{}" polite.', 'What is a polite way to say "{}"', 'Rewrite "{}" as a polite request.', 'How do you politely say "{}"', 'Turn "{}" into a polite sentence.'),
    },
    lambda content, lang: (_polite(content, lang)[0],),
    lambda content, lang: _polite(content, lang)[1],
    lambda rng, content, lang: _polite(content, lang, rng.randint(1, len(world.POLITE_ENGLISH) - 1))[1],
    _polite_say,
    weight=0.7,
)  # fmt: skip
