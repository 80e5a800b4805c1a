"""Arithmetic over short lists of digits, and unit conversion.  Sums are worked out step by step, as a tutor would."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TypeAlias

from tanuki_jax.synth import world
from tanuki_jax.synth.families.family import EN, JA, Content, Family, in_language, listed

Answer: TypeAlias = Callable[[Content, str], str]


def _digits(rng: Random) -> Content:
    return tuple(rng.randint(1, 9) for _ in range(rng.randint(3, 4)))


def _distinct(rng: Random) -> Content:
    return tuple(rng.sample(range(1, 10), rng.randint(3, 5)))


def _odd_number(rng: Random) -> Content:
    return tuple(rng.sample(range(1, 10), rng.choice((3, 5))))


def _even_shares(rng: Random) -> Content:
    while True:
        numbers = tuple(rng.randint(1, 9) for _ in range(rng.choice((3, 4))))
        if sum(numbers) % len(numbers) == 0 and len(set(numbers)) > 1:
            return numbers


def _additions(numbers: Content, lang: str) -> str:
    steps, total = [], numbers[0]
    for n in numbers[1:]:
        steps.append(f"{total}+{n}={total + n}")
        total += n
    return listed(steps, lang)


def _sum(numbers: Content, lang: str) -> str:
    steps, total = _additions(numbers, lang), sum(numbers)
    return in_language(lang, f"{steps}。合計は{total}です。", f"{steps}. The sum is {total}.")


def _mean(numbers: Content, lang: str) -> str:
    steps, total, n = _additions(numbers, lang), sum(numbers), len(numbers)
    mean = total // n
    return in_language(
        lang, f"{steps}、{total}÷{n}={mean}。平均は{mean}です。", f"{steps}, {total}÷{n}={mean}. The mean is {mean}."
    )


def _median(numbers: Content, lang: str) -> str:
    row = sorted(numbers)
    order, middle = listed(row, lang), row[len(row) // 2]
    return in_language(lang, f"小さい順に{order}。中央値は{middle}です。", f"In order: {order}. The median is {middle}.")


def _maximum(numbers: Content, lang: str) -> str:
    return in_language(lang, f"最大の数は{max(numbers)}です。", f"The largest is {max(numbers)}.")


def _minimum(numbers: Content, lang: str) -> str:
    return in_language(lang, f"最小の数は{min(numbers)}です。", f"The smallest is {min(numbers)}.")


def _ascending(numbers: Content, lang: str) -> str:
    row = listed(sorted(numbers), lang)
    return in_language(lang, f"{row}です。", f"{row}.")


def _descending(numbers: Content, lang: str) -> str:
    row = listed(sorted(numbers, reverse=True), lang)
    return in_language(lang, f"{row}です。", f"{row}.")


def _change_one(answer: Answer) -> Callable[[Random, Content, str], str]:
    """The answer to a list in which one number, or as many as it takes, is another."""

    def wrong(rng: Random, numbers: Content, lang: str) -> str:
        right, other = answer(numbers, lang), list(numbers)
        while answer(tuple(other), lang) == right:
            other[rng.randrange(len(other))] = rng.randint(1, 9)
        return answer(tuple(other), lang)

    return wrong


def _wrong_mean(rng: Random, numbers: Content, lang: str) -> str:
    """The mean of another list of the same length, which divides evenly too."""
    while True:
        other = _even_shares(rng)
        if len(other) == len(numbers) and _mean(other, lang) != _mean(numbers, lang):
            return _mean(other, lang)


def _slots(numbers: Content, lang: str) -> tuple[str, ...]:
    return (listed(numbers, lang),)


def _key(numbers: Content) -> str:
    """A list counts without its order, for all list families at once."""
    return f"list {sorted(numbers)}"


# Eight arguments: a table of families is written with it.
def _list_family(
    name: str,
    draw: Callable[[Random], Content],
    answer: Answer,
    lead: tuple[str, str],
    ja: tuple[str, ...],
    en: tuple[str, ...],
    wrong: Callable[[Random, Content, str], str] | None = None,
    weight: float = 1.0,
) -> Family:
    def say(numbers: Content, lang: str) -> str:
        start = in_language(lang, *lead).format(*_slots(numbers, lang))
        return f"{start}{in_language(lang, '', ' ')}{answer(numbers, lang)}"

    return Family(name, draw, {JA: ja, EN: en}, _slots, answer, wrong or _change_one(answer), say, _key, weight)


LISTS = (
    _list_family(
        "sum", _digits, _sum,
        ("{}を足します。", "We add {}."),
        ("{}の合計はいくつですか。", "{}を全部足してください。", "次の数を足すといくつになりますか。{}", "{}の和を求めてください。", "合計を計算してください。{}", "{}を足し算するとどうなりますか。"),
        ("What is the sum of {}?", "Add up {}.", "Add these numbers: {}", "Find the total of {}.", "Compute the sum: {}", "What do {} add up to?"),
    ),
    _list_family(
        "mean", _even_shares, _mean,
        ("{}の平均を考えます。", "We take the mean of {}."),
        ("{}の平均はいくつですか。", "{}の平均を求めてください。", "次の数の平均を計算してください。{}", "{}を平均するといくつになりますか。", "平均値を教えてください。{}", "{}の平均値は何ですか。"),
        ("What is the mean of {}?", "Find the mean of {}.", "Compute the average of these numbers: {}", "What is the average of {}?", "Give the mean: {}", "Average {}."),
        _wrong_mean, 1.5,
    ),
    _list_family(
        "median", _odd_number, _median,
        ("{}の中央値を調べます。", "We look for the median of {}."),
        ("{}の中央値はいくつですか。", "{}の中央値を求めてください。", "次の数の中央値は何ですか。{}", "{}の真ん中の値を教えてください。", "中央値を答えてください。{}", "{}を並べたとき真ん中に来る数は何ですか。"),
        ("What is the median of {}?", "Find the median of {}.", "Which number is in the middle of {}?", "Give the median: {}", "Tell me the median of these numbers: {}", "What is the middle value of {}?"),
    ),
    _list_family(
        "maximum", _distinct, _maximum,
        ("{}があります。", "Here are {}."),
        ("{}の中で最大の数はどれですか。", "{}のうち一番大きい数は何ですか。", "次の数の最大値を答えてください。{}", "{}の最大値はいくつですか。", "一番大きい数を選んでください。{}", "{}で最も大きいのはどれですか。"),
        ("Which is the largest of {}?", "What is the maximum of {}?", "Find the largest number: {}", "Give the biggest of these numbers: {}", "Choose the largest: {}", "Of {}, which is the greatest?"),
        weight=0.6,
    ),
    _list_family(
        "minimum", _distinct, _minimum,
        ("{}があります。", "Here are {}."),
        ("{}の中で最小の数はどれですか。", "{}のうち一番小さい数は何ですか。", "次の数の最小値を答えてください。{}", "{}の最小値はいくつですか。", "一番小さい数を選んでください。{}", "{}で最も小さいのはどれですか。"),
        ("Which is the smallest of {}?", "What is the minimum of {}?", "Find the smallest number: {}", "Give the least of these numbers: {}", "Choose the smallest: {}", "Of {}, which is the least?"),
        weight=0.6,
    ),
    _list_family(
        "ascending", _distinct, _ascending,
        ("{}を小さい順に並べます。", "We sort {} from low to high."),
        ("{}を小さい順に並べてください。", "次の数を昇順に並べてください。{}", "{}を小さい方から並べるとどうなりますか。", "{}を昇順にしてください。", "小さい順に書いてください。{}", "{}を小さいものから順に言ってください。"),
        ("Sort {} in ascending order.", "Put {} in order from smallest to largest.", "Sort these numbers from low to high: {}", "Write {} in ascending order.", "Order {} from the smallest.", "Arrange in ascending order: {}"),
    ),
    _list_family(
        "descending", _distinct, _descending,
        ("{}を大きい順に並べます。", "We sort {} from high to low."),
        ("{}を大きい順に並べてください。", "次の数を降順に並べてください。{}", "{}を大きい方から並べるとどうなりますか。", "{}を降順にしてください。", "大きい順に書いてください。{}", "{}を大きいものから順に言ってください。"),
        ("Sort {} in descending order.", "Put {} in order from largest to smallest.", "Sort these numbers from high to low: {}", "Write {} in descending order.", "Order {} from the largest.", "Arrange in descending order: {}"),
        weight=1.5,
    ),
)  # fmt: skip


def _unit_slots(content: Content, lang: str) -> tuple[str, ...]:
    unit, n = content
    ja, en, small_ja, small_en, _ = world.UNITS[unit]
    return (f"{n}{ja}", small_ja) if lang == JA else (f"{n} {en}", small_en)


def _unit_answer(content: Content, lang: str, zeros: str = "") -> str:
    unit, n = content
    ja, en, small_ja, small_en, right = world.UNITS[unit]
    zeros = zeros or right
    return in_language(lang, f"{n}{ja}は{n}{zeros}{small_ja}です。", f"{n} {en} is {n}{zeros} {small_en}.")


def _unit_wrong(rng: Random, content: Content, lang: str) -> str:
    right = world.UNITS[content[0]][4]
    return _unit_answer(content, lang, rng.choice([zeros for zeros in ("0", "00", "000") if zeros != right]))


UNITS = Family(
    "units",
    lambda rng: (rng.randrange(len(world.UNITS)), rng.randint(2, 60)),
    {
        JA: ("{}は{}で言うといくつですか。", "{}を{}に直してください。", "{}は何{}ですか。", "{}を{}で表してください。", "{}を{}に換算してください。", "{}は{}ではどれだけですか。"),
        EN: ("How many {1} is {0}?", "Convert {} to {}.", "Express {} in {}.", "What is {} in {}?", "Change {} into {}.", "Tell me how many {1} make {0}."),
    },
    _unit_slots,
    _unit_answer,
    _unit_wrong,
    _unit_answer,
    lambda content: f"units {content}",
)  # fmt: skip
