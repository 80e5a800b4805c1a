import re
import statistics

import pytest

from tanuki_jax.synth.families import FAMILIES
from tests.synth.families.draws import draws

RESULT = {"sum": sum, "mean": statistics.mean, "median": statistics.median, "maximum": max, "minimum": min}
ORDER = {"median": False, "ascending": False, "descending": True}
SIZES = {  # in millimetres, grams, millilitres
    "キロメートル": 10**6, "メートル": 1000, "センチメートル": 10, "ミリメートル": 1,
    "kilometers": 10**6, "meters": 1000, "centimeters": 10, "millimeters": 1,
    "トン": 10**6, "キログラム": 1000, "グラム": 1, "tons": 10**6, "kilograms": 1000, "grams": 1,
    "リットル": 1000, "ミリリットル": 1, "liters": 1000, "milliliters": 1,
}  # fmt: skip


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize("name", RESULT)
def test_the_result_is_that_of_the_numbers_in_the_prompt(name):
    for _, prompt, right, _, said in draws(FAMILIES[name]):
        assert numbers(right)[-1] == RESULT[name](numbers(prompt))
        assert numbers(said)[: len(numbers(prompt))] == numbers(prompt) and said.endswith(right)


@pytest.mark.parametrize("name", ORDER)
def test_the_order_is_that_of_the_numbers_in_the_prompt(name):
    for _, prompt, right, *_ in draws(FAMILIES[name]):
        asked = numbers(prompt)
        assert numbers(right)[: len(asked)] == sorted(asked, reverse=ORDER[name])


@pytest.mark.parametrize("name", ["sum", "mean"])
def test_every_step_is_right_and_goes_on_from_the_one_before(name):
    for _, prompt, right, *_ in draws(FAMILIES[name]):
        first, *rest = numbers(prompt)
        steps = [tuple(map(int, m)) for m in re.findall(r"(\d+)\+(\d+)=(\d+)", right)]
        assert [b for _, b, _ in steps] == rest
        assert all(a + b == c for a, b, c in steps)
        assert [a for a, *_ in steps] == [first, *(c for *_, c in steps[:-1])]
        divisions = [tuple(map(int, m)) for m in re.findall(r"(\d+)÷(\d+)=(\d+)", right)]
        assert divisions == ([(steps[-1][2], len(rest) + 1, statistics.mean([first, *rest]))] if name == "mean" else [])


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_a_wrong_extreme_is_another_number(name):
    assert all(numbers(wrong) != numbers(right) for _, _, right, wrong, _ in draws(FAMILIES[name]))


def test_a_conversion_gives_the_same_quantity_in_the_unit_asked_for_and_a_wrong_one_does_not():
    for _, prompt, right, wrong, said in draws(FAMILIES["units"]):
        names = sorted(SIZES, key=len, reverse=True)
        for answer, equal in ((right, True), (wrong, False), (said, True)):
            (a, big), (b, small) = re.findall(rf"(\d+) ?({'|'.join(names)})", answer)
            assert (int(a) * SIZES[big] == int(b) * SIZES[small]) == equal
            rest, found = re.subn(rf"(?<!\d){a} ?{big}", "", prompt)
            assert found == 1 and small in rest
