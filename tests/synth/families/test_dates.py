import datetime
import re

from tanuki_jax.synth.families import FAMILIES
from tests.synth.families.draws import draws

EN = re.compile(r"(?P<n>\d) (?P<unit>day|month)s? (?P<way>after|before) (?P<start>\w+)")
JA = re.compile(r"(?P<start>[月火水木金土日]曜日|\d+月)の(?P<n>\d)(?P<unit>日|か月)(?P<way>後|前)")
NAME = re.compile(r"[月火水木金土日]曜日|(?<!\d)\d+月|[A-Z]\w+")


def names(unit, lang):
    """The names of the days of a week or the months of a year, from the calendar of the standard library."""
    if unit in ("day", "日"):
        days = [datetime.date(2024, 1, 1) + datetime.timedelta(days=i) for i in range(7)]
        return ["月火水木金土日"[d.weekday()] + "曜日" if lang == "ja" else f"{d:%A}" for d in days]
    return [f"{m}月" if lang == "ja" else f"{datetime.date(2024, m, 1):%B}" for m in range(1, 13)]


def test_days_and_months_are_counted_one_by_one_to_the_one_asked_for():
    for lang, prompt, right, _, said in draws(FAMILIES["calendar"]):
        asked = (JA if lang == "ja" else EN).search(prompt).groupdict()
        cycle, step = names(asked["unit"], lang), 1 if asked["way"] in ("after", "後") else -1
        start = cycle.index(asked["start"])
        expected = [cycle[(start + step * i) % len(cycle)] for i in range(1, int(asked["n"]) + 1)]
        assert NAME.findall(right) == expected
        assert said.endswith(right) and asked["start"] in said


def test_a_wrong_day_is_another_day():
    assert all(NAME.findall(wrong)[-1] != NAME.findall(right)[-1] for _, _, right, wrong, _ in draws(FAMILIES["calendar"]))
