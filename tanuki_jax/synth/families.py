"""The families of rule-made questions: how each draws its content, asks, answers, errs and states it in prose.

Everything but the draw is a pure function of (content, language), so an answer can be checked exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tanuki_jax.synth import world

Content = tuple[Any, ...]
JA, EN = "ja", "en"
LANGUAGES = (JA, EN)


@dataclass(frozen=True)
class Family:
    """One kind of question.

    draw: content from a random source.  ask: phrasings per language; `{}` takes the subject.  subject, answer,
    wrong (a plausible false answer) and say (the fact as prose): functions of content and language.
    strict: held-out content never occurs in training in any form; otherwise only the held-out prompt does not
    (facts and words cannot be guessed).  follow_ups: families that may ask on about the same content.
    """

    name: str
    draw: Callable[[Random], Content]
    ask: dict[str, tuple[str, ...]]
    subject: Callable[[Content, str], str]
    answer: Callable[[Content, str], str]
    wrong: Callable[[Random, Content, str], str]
    say: Callable[[Content, str], str]
    strict: bool = True


def _index(lang: str) -> int:
    return 0 if lang == JA else 1


def _listed(numbers: Any, lang: str) -> str:
    return ("、" if lang == JA else ", ").join(str(n) for n in numbers)


# --- arithmetic over lists ------------------------------------------------------------------------------------------


def _digits(smallest: int, largest: int, low: int = 1, high: int = 9) -> Callable[[Random], Content]:
    return lambda rng: tuple(rng.randint(low, high) for _ in range(rng.randint(smallest, largest)))


def _odd_digits(rng: Random) -> Content:
    return tuple(rng.sample(range(1, 10), rng.choice((3, 5))))


def _distinct(rng: Random) -> Content:
    return tuple(rng.sample(range(1, 10), rng.randint(3, 5)))


def _even_shares(rng: Random) -> Content:
    while True:
        numbers = tuple(rng.randint(1, 9) for _ in range(rng.choice((2, 3, 4))))
        if sum(numbers) % len(numbers) == 0 and len(set(numbers)) > 1:
            return numbers


def _additions(numbers: Content, lang: str) -> str:
    steps, total = [], numbers[0]
    for n in numbers[1:]:
        steps.append(f"{total}+{n}={total + n}")
        total += n
    return _listed(steps, lang)


def _sum_answer(numbers: Content, lang: str) -> str:
    steps, total = _additions(numbers, lang), sum(numbers)
    return f"{steps}。合計は{total}です。" if lang == JA else f"{steps}. The sum is {total}."


def _mean_answer(numbers: Content, lang: str) -> str:
    steps, total, n = _additions(numbers, lang), sum(numbers), len(numbers)
    if lang == JA:
        return f"{steps}、{total}÷{n}={total // n}。平均は{total // n}です。"
    return f"{steps}, {total}÷{n}={total // n}. The mean is {total // n}."


def _median_answer(numbers: Content, lang: str) -> str:
    row = sorted(numbers)
    middle = row[len(row) // 2]
    listed = _listed(row, lang)
    return f"小さい順に{listed}。中央値は{middle}です。" if lang == JA else f"In order: {listed}. The median is {middle}."


def _max_answer(numbers: Content, lang: str) -> str:
    return f"最大の数は{max(numbers)}です。" if lang == JA else f"The largest is {max(numbers)}."


def _min_answer(numbers: Content, lang: str) -> str:
    return f"最小の数は{min(numbers)}です。" if lang == JA else f"The smallest is {min(numbers)}."


def _ascending_answer(numbers: Content, lang: str) -> str:
    return f"{_listed(sorted(numbers), lang)}です。" if lang == JA else f"{_listed(sorted(numbers), lang)}."


def _descending_answer(numbers: Content, lang: str) -> str:
    row = _listed(sorted(numbers, reverse=True), lang)
    return f"{row}です。" if lang == JA else f"{row}."


def _changed(answer: Callable[[Content, str], str]) -> Callable[[Random, Content, str], str]:
    """The answer to a list in which one number is another."""

    def wrong(rng: Random, numbers: Content, lang: str) -> str:
        right, other = answer(numbers, lang), list(numbers)
        while answer(tuple(other), lang) == right:
            other[rng.randrange(len(other))] = rng.randint(1, 9)
        return answer(tuple(other), lang)

    return wrong


def _exact_change(answer: Callable[[Content, str], str]) -> Callable[[Random, Content, str], str]:
    """The same for the mean: the changed list must still divide evenly."""

    def wrong(rng: Random, numbers: Content, lang: str) -> str:
        right = answer(numbers, lang)
        while True:
            other = _even_shares(rng)
            if len(other) == len(numbers) and answer(other, lang) != right:
                return answer(other, lang)

    return wrong


def _about_list(ja: str, en: str, answer: Callable[[Content, str], str]) -> Callable[[Content, str], str]:
    def say(numbers: Content, lang: str) -> str:
        lead = ja if lang == JA else en
        return lead.format(_listed(numbers, lang)) + ("" if lang == JA else " ") + answer(numbers, lang)

    return say


# --- calendar and units ---------------------------------------------------------------------------------------------


def _calendar_draw(rng: Random) -> Content:
    kind = rng.choice(("weekday", "weekday", "month"))
    cycle = 7 if kind == "weekday" else 12
    return kind, rng.randrange(cycle), rng.choice((-1, 1)) * rng.randint(1, 4)


def _calendar_subject(content: Content, lang: str) -> str:
    kind, start, shift = content
    names, n = (world.WEEKDAYS if kind == "weekday" else world.MONTHS), abs(shift)
    if lang == JA:
        unit = "日" if kind == "weekday" else "か月"
        return f"{names[start][0]}の{n}{unit}{'後' if shift > 0 else '前'}"
    unit = ("day" if kind == "weekday" else "month") + ("s" if n > 1 else "")
    return f"{n} {unit} {'after' if shift > 0 else 'before'} {names[start][1]}"


def _calendar_answer(content: Content, lang: str) -> str:
    """Counts there step by step."""
    kind, start, shift = content
    names, sign = (world.WEEKDAYS if kind == "weekday" else world.MONTHS), (1 if shift > 0 else -1)
    steps = [(n, names[(start + sign * n) % len(names)][_index(lang)]) for n in range(1, abs(shift) + 1)]
    if lang == JA:
        unit = ("日" if kind == "weekday" else "か月") + ("後" if shift > 0 else "前")
        return "、".join(f"{n}{unit}は{name}" for n, name in steps) + "です。"
    return ", ".join(f"{n}: {name}" for n, name in steps) + "."


def _calendar_say(content: Content, lang: str) -> str:
    subject = _calendar_subject(content, lang)
    return (
        f"{subject}を数えます。{_calendar_answer(content, lang)}"
        if lang == JA
        else f"What comes {subject}? {_calendar_answer(content, lang)}"
    )


def _calendar_wrong(rng: Random, content: Content, lang: str) -> str:
    kind, start, shift = content
    return _calendar_answer((kind, start + rng.choice((-2, -1, 1, 2)), shift), lang)


def _unit_draw(rng: Random) -> Content:
    return rng.randrange(len(world.UNITS)), rng.randint(2, 60)


def _unit_subject(content: Content, lang: str) -> str:
    unit, n = content
    return f"{n}{world.UNITS[unit][0]}" if lang == JA else f"{n} {world.UNITS[unit][1]}"


def _unit_answer(content: Content, lang: str) -> str:
    unit, n = content
    ja, en, small_ja, small_en, zeros = world.UNITS[unit]
    return f"{n}{ja}は{n}{zeros}{small_ja}です。" if lang == JA else f"{n} {en} is {n}{zeros} {small_en}."


def _unit_wrong(rng: Random, content: Content, lang: str) -> str:
    unit, n = content
    right = _unit_answer(content, lang)
    zeros = world.UNITS[unit][4]
    other = rng.choice([z for z in ("0", "00", "000") if z != zeros])
    return right.replace(f"{n}{zeros}", f"{n}{other}")


# --- facts, words, manners ------------------------------------------------------------------------------------------

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


def _fact_draw(rng: Random) -> Content:
    return rng.randrange(len(world.PEOPLE)), rng.choice(list(world.ATTRIBUTES))


def _fact_subject(content: Content, lang: str) -> str:
    person, attribute = content
    return FACT_SUBJECTS[attribute][_index(lang)].format(world.PEOPLE[person][_index(lang)])


def _fact_sentence(content: Content, lang: str, value: int) -> str:
    person, attribute = content
    i = _index(lang)
    return FACT_SENTENCES[attribute][i].format(world.PEOPLE[person][i], world.ATTRIBUTES[attribute][value][i])


def _fact_answer(content: Content, lang: str) -> str:
    return _fact_sentence(content, lang, world.fact(*content))


def _fact_wrong(rng: Random, content: Content, lang: str) -> str:
    return _fact_sentence(content, lang, (world.fact(*content) + rng.randint(1, 7)) % 8)


def _word_draw(rng: Random) -> Content:
    return rng.randrange(len(world.LEXICON)), rng.choice(("to_en", "to_ja"))


def _word_subject(content: Content, lang: str) -> str:
    word, way = content
    quoted = f"「{world.LEXICON[word][0 if way == 'to_en' else 1]}」"
    if lang == JA:
        return f"{quoted}を{'英語' if way == 'to_en' else '日本語'}"
    return f"{quoted} in {'English' if way == 'to_en' else 'Japanese'}"


def _word_answer(content: Content, lang: str) -> str:
    word, way = content
    return (
        f"「{world.LEXICON[word][1 if way == 'to_en' else 0]}」です。"
        if lang == JA
        else f"It is 「{world.LEXICON[word][1 if way == 'to_en' else 0]}」."
    )


def _word_say(content: Content, lang: str) -> str:
    ja, en = world.LEXICON[content[0]]
    return f"「{ja}」は英語で「{en}」と言います。" if lang == JA else f"The Japanese word 「{ja}」 means 「{en}」."


def _word_wrong(rng: Random, content: Content, lang: str) -> str:
    word, way = content
    return _word_answer(((word + rng.randint(1, len(world.LEXICON) - 1)) % len(world.LEXICON), way), lang)


def _manners_draw(rng: Random) -> Content:
    return (rng.randrange(len(world.MANNERS)),)


def _manners_subject(content: Content, lang: str) -> str:
    return world.MANNERS[content[0]][0][_index(lang)]


def _manners_answer(content: Content, lang: str) -> str:
    phrase = world.MANNERS[content[0]][1][_index(lang)]
    return f"「{phrase}」と言います。" if lang == JA else f'You say "{phrase}"'


def _manners_say(content: Content, lang: str) -> str:
    subject, phrase = _manners_subject(content, lang), world.MANNERS[content[0]][1][_index(lang)]
    return f"{subject}には「{phrase}」と言います。" if lang == JA else f'When {subject}, you say "{phrase}"'


def _manners_wrong(rng: Random, content: Content, lang: str) -> str:
    return _manners_answer(((content[0] + rng.randint(1, len(world.MANNERS) - 1)) % len(world.MANNERS),), lang)


def _polite_pair(content: Content, lang: str) -> tuple[str, str]:
    return world.POLITE[content[0]] if lang == JA else world.POLITE_ENGLISH[content[0] % len(world.POLITE_ENGLISH)]


def _polite_draw(rng: Random) -> Content:
    return (rng.randrange(len(world.POLITE)),)


def _polite_say(content: Content, lang: str) -> str:
    plain, polite = _polite_pair(content, lang)
    return f"「{plain}」を丁寧に言うと「{polite}」です。" if lang == JA else f'"{plain}" is politely "{polite}"'


def _polite_wrong(rng: Random, content: Content, lang: str) -> str:
    count = len(world.POLITE) if lang == JA else len(world.POLITE_ENGLISH)
    return f"{_polite_pair(((content[0] % count + rng.randint(1, count - 1)) % count,), lang)[1]}"


# --- strings --------------------------------------------------------------------------------------------------------


def _string_draw(rng: Random) -> Content:
    letters = rng.choice((world.SYLLABLES, world.LETTERS))
    return tuple(rng.choice(letters) for _ in range(rng.randint(2, 5)))


def _spelt(letters: Content, lang: str) -> str:
    return f"「{'・'.join(letters)}」"


def _count_answer(letters: Content, lang: str) -> str:
    counted = _listed((f"{c}{i}" for i, c in enumerate(letters, 1)), lang)
    return f"{counted}。{len(letters)}文字です。" if lang == JA else f"{counted}. It has {len(letters)} letters."


def _reverse_answer(letters: Content, lang: str) -> str:
    return f"{_spelt(letters[::-1], lang)}です。" if lang == JA else f"It is {_spelt(letters[::-1], lang)}."


def _misspelt(answer: Callable[[Content, str], str]) -> Callable[[Random, Content, str], str]:
    """The answer to a string in which one letter is another."""

    def wrong(rng: Random, letters: Content, lang: str) -> str:
        other = list(letters)
        while tuple(other) == letters:
            other[rng.randrange(len(other))] = rng.choice(world.SYLLABLES)
        return answer(tuple(other), lang)

    return wrong


def _numbers(content: Content, lang: str) -> str:
    return _listed(content, lang)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sum",
            _digits(3, 4),
            {
                JA: ("{}の合計はいくつですか。", "{}を全部足してください。", "次の数を足すといくつになりますか。{}", "{}の和を求めてください。", "合計を計算してください。{}", "{}を足し算するとどうなりますか。"),
                EN: ("What is the sum of {}?", "Add up {}.", "Add these numbers: {}", "Find the total of {}.", "Compute the sum: {}", "What do {} add up to?"),
            },
            _numbers,
            _sum_answer,
            _changed(_sum_answer),
            _about_list("{}を足します。", "We add {}.", _sum_answer),
        ),
        Family(
            "mean",
            _even_shares,
            {
                JA: ("{}の平均はいくつですか。", "{}の平均を求めてください。", "次の数の平均を計算してください。{}", "{}を平均するといくつになりますか。", "平均値を教えてください。{}", "{}の平均値は何ですか。"),
                EN: ("What is the mean of {}?", "Find the mean of {}.", "Compute the average of these numbers: {}", "What is the average of {}?", "Give the mean: {}", "Average {}."),
            },
            _numbers,
            _mean_answer,
            _exact_change(_mean_answer),
            _about_list("{}の平均を考えます。", "We take the mean of {}.", _mean_answer),
        ),
        Family(
            "median",
            _odd_digits,
            {
                JA: ("{}の中央値はいくつですか。", "{}の中央値を求めてください。", "次の数の中央値は何ですか。{}", "{}の真ん中の値を教えてください。", "中央値を答えてください。{}", "{}を並べたとき真ん中に来る数は何ですか。"),
                EN: ("What is the median of {}?", "Find the median of {}.", "Which number is in the middle of {}?", "Give the median: {}", "Tell me the median of these numbers: {}", "What is the middle value of {}?"),
            },
            _numbers,
            _median_answer,
            _changed(_median_answer),
            _about_list("{}の中央値を調べます。", "We look for the median of {}.", _median_answer),
        ),
        Family(
            "maximum",
            _distinct,
            {
                JA: ("{}の中で最大の数はどれですか。", "{}のうち一番大きい数は何ですか。", "次の数の最大値を答えてください。{}", "{}の最大値はいくつですか。", "一番大きい数を選んでください。{}", "{}で最も大きいのはどれですか。"),
                EN: ("Which is the largest of {}?", "What is the maximum of {}?", "Find the largest number: {}", "Give the biggest of these numbers: {}", "Choose the largest: {}", "Of {}, which is the greatest?"),
            },
            _numbers,
            _max_answer,
            _changed(_max_answer),
            _about_list("{}があります。", "Here are {}.", _max_answer),
        ),
        Family(
            "minimum",
            _distinct,
            {
                JA: ("{}の中で最小の数はどれですか。", "{}のうち一番小さい数は何ですか。", "次の数の最小値を答えてください。{}", "{}の最小値はいくつですか。", "一番小さい数を選んでください。{}", "{}で最も小さいのはどれですか。"),
                EN: ("Which is the smallest of {}?", "What is the minimum of {}?", "Find the smallest number: {}", "Give the least of these numbers: {}", "Choose the smallest: {}", "Of {}, which is the least?"),
            },
            _numbers,
            _min_answer,
            _changed(_min_answer),
            _about_list("{}があります。", "Here are {}.", _min_answer),
        ),
        Family(
            "ascending",
            _distinct,
            {
                JA: ("{}を小さい順に並べてください。", "次の数を昇順に並べてください。{}", "{}を小さい方から並べるとどうなりますか。", "{}を昇順にしてください。", "小さい順に書いてください。{}", "{}を小さいものから順に言ってください。"),
                EN: ("Sort {} in ascending order.", "Put {} in order from smallest to largest.", "Sort these numbers from low to high: {}", "Write {} in ascending order.", "Order {} from the smallest.", "Arrange in ascending order: {}"),
            },
            _numbers,
            _ascending_answer,
            _changed(_ascending_answer),
            _about_list("{}を小さい順に並べます。", "We sort {} from low to high.", _ascending_answer),
        ),
        Family(
            "descending",
            _distinct,
            {
                JA: ("{}を大きい順に並べてください。", "次の数を降順に並べてください。{}", "{}を大きい方から並べるとどうなりますか。", "{}を降順にしてください。", "大きい順に書いてください。{}", "{}を大きいものから順に言ってください。"),
                EN: ("Sort {} in descending order.", "Put {} in order from largest to smallest.", "Sort these numbers from high to low: {}", "Write {} in descending order.", "Order {} from the largest.", "Arrange in descending order: {}"),
            },
            _numbers,
            _descending_answer,
            _changed(_descending_answer),
            _about_list("{}を大きい順に並べます。", "We sort {} from high to low.", _descending_answer),
        ),
        Family(
            "calendar",
            _calendar_draw,
            {
                JA: ("{}はいつですか。", "{}は何ですか。", "{}を教えてください。", "{}を答えてください。", "{}はいつになりますか。", "質問です。{}はいつでしょうか。"),
                EN: ("What comes {}?", "Tell me what comes {}.", "What is {}?", "Please say what is {}.", "Do you know what comes {}?", "A question: what is {}?"),
            },
            _calendar_subject,
            _calendar_answer,
            _calendar_wrong,
            _calendar_say,
            strict=False,
        ),
        Family(
            "units",
            _unit_draw,
            {
                JA: ("{}は{small}で言うといくつですか。", "{}を{small}に直してください。", "{}は何{small}ですか。", "{}を{small}で表してください。", "{}を{small}に換算してください。", "{}は{small}ではどれだけですか。"),
                EN: ("How many {small} is {}?", "Convert {} to {small}.", "Express {} in {small}.", "What is {} in {small}?", "Change {} into {small}.", "Tell me how many {small} make {}."),
            },
            _unit_subject,
            _unit_answer,
            _unit_wrong,
            _unit_answer,
        ),
        Family(
            "facts",
            _fact_draw,
            {
                JA: ("{}は何ですか。", "{}を教えてください。", "{}を知っていますか。", "{}を答えてください。", "質問です。{}は何でしょうか。", "{}について教えてください。"),
                EN: ("What is {}?", "Tell me {}.", "Do you know {}?", "Please name {}.", "A question: what is {}?", "I want to know {}."),
            },
            _fact_subject,
            _fact_answer,
            _fact_wrong,
            _fact_answer,
            strict=False,
        ),
        Family(
            "lexicon",
            _word_draw,
            {
                JA: ("{}で何と言いますか。", "{}に訳してください。", "{}にしてください。", "{}で言うとどうなりますか。", "{}で教えてください。", "{}で書いてください。"),
                EN: ("What is {}?", "How do you say {}?", "Translate {}.", "Write {}.", "Tell me {}.", "Please say {}."),
            },
            _word_subject,
            _word_answer,
            _word_wrong,
            _word_say,
            strict=False,
        ),
        Family(
            "manners",
            _manners_draw,
            {
                JA: ("{}、何と言いますか。", "{}のあいさつを教えてください。", "{}に言う言葉は何ですか。", "{}は、どう言えばいいですか。", "{}に使う表現を答えてください。", "質問です。{}には何と言うでしょうか。"),
                EN: ("What do you say when {}?", "When {}, what do you say?", "Which words do you use when {}?", "Tell me what to say when {}.", "What is the right thing to say when {}?", "A question: what does one say when {}?"),
            },
            _manners_subject,
            _manners_answer,
            _manners_wrong,
            _manners_say,
            strict=False,
        ),
        Family(
            "politeness",
            _polite_draw,
            {
                JA: ("「{}」を丁寧に言ってください。", "「{}」の丁寧な形は何ですか。", "「{}」を丁寧語にしてください。", "「{}」をていねいに言い換えてください。", "「{}」を「ます」の形にしてください。", "「{}」はどう言えば丁寧ですか。"),
                EN: ('Say "{}" politely.', 'Make "{}" polite.', 'What is a polite way to say "{}"', 'Rewrite "{}" as a polite request.', 'How do you politely say "{}"', 'Turn "{}" into a polite sentence.'),
            },
            lambda content, lang: _polite_pair(content, lang)[0],
            lambda content, lang: _polite_pair(content, lang)[1],
            _polite_wrong,
            _polite_say,
            strict=False,
        ),
        Family(
            "counting",
            _string_draw,
            {
                JA: ("{}は何文字ですか。", "{}の文字数を数えてください。", "{}の文字を数えるといくつですか。", "{}はいくつの文字でできていますか。", "文字数を答えてください。{}", "{}の長さは何文字ですか。"),
                EN: ("How many letters are in {}?", "Count the letters of {}.", "How long is {}?", "Tell me how many letters {} has.", "Count: {}", "What is the number of letters in {}?"),
            },
            _spelt,
            _count_answer,
            _misspelt(_count_answer),
            lambda content, lang: f"{_spelt(content, lang)}を数えます。{_count_answer(content, lang)}" if lang == JA else f"We count {_spelt(content, lang)}. {_count_answer(content, lang)}",
        ),
        Family(
            "reversing",
            _string_draw,
            {
                JA: ("{}を逆から書いてください。", "{}を後ろから読むとどうなりますか。", "{}を反対向きに書いてください。", "{}を逆さにしてください。", "逆順にしてください。{}", "{}を右から読んでください。"),
                EN: ("Write {} backwards.", "Reverse {}.", "What is {} read from the end?", "Spell {} in reverse.", "Turn around: {}", "What do you get when you reverse {}?"),
            },
            _spelt,
            _reverse_answer,
            _misspelt(_reverse_answer),
            lambda content, lang: f"{_spelt(content, lang)}を逆から書くと{_spelt(content[::-1], lang)}です。" if lang == JA else f"{_spelt(content, lang)} backwards is {_spelt(content[::-1], lang)}.",
        ),
    )
}  # fmt: skip

LISTS = ("sum", "mean", "median", "maximum", "minimum", "ascending", "descending")
STRINGS = ("counting", "reversing")

# A second turn that makes no sense without the first: (families it may follow, family it asks, phrasings).
FOLLOW_UPS = (
    (LISTS, "maximum", {JA: ("では、その中で一番大きい数は何ですか。", "その最大値も教えてください。"), EN: ("And which of them is the largest?", "Now give me the maximum.")}),
    (LISTS, "minimum", {JA: ("では、その中で一番小さい数は何ですか。", "その最小値も教えてください。"), EN: ("And which of them is the smallest?", "Now give me the minimum.")}),
    (LISTS, "ascending", {JA: ("では、それを小さい順に並べてください。",), EN: ("Now sort them in ascending order.",)}),
    (STRINGS, "counting", {JA: ("では、それは何文字ですか。",), EN: ("And how many letters does it have?",)}),
    (STRINGS, "reversing", {JA: ("では、それを逆から書いてください。",), EN: ("Now write it backwards.",)}),
    (("facts",), "facts", {JA: ("では、その人の{}は何ですか。", "その人の{}も教えてください。"), EN: ("And what is {} of that person?", "Tell me {} of that person, too.")}),
)  # fmt: skip
FACT_NAMES = {
    "town": ("住んでいる町", "the town"),
    "job": ("仕事", "the job"),
    "food": ("好きな食べ物", "the favorite food"),
    "pet": ("飼っている動物", "the pet"),
}


def prompt(family: Family, content: Content, lang: str, phrasing: int) -> str:
    """The question in one of its phrasings."""
    template = family.ask[lang][phrasing]
    small = world.UNITS[content[0]][2 if lang == JA else 3] if family.name == "units" else ""
    return template.format(family.subject(content, lang), small=small)
