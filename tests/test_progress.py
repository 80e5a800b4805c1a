import sys

import pytest

from tanuki_jax import progress
from tanuki_jax.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(4, "4s"), (200, "3m20s"), (7500, "2h05m"), (3 * 86400 + 4 * 3600, "3d4h"), (float("inf"), "?")]
)
def test_durations_are_written_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_lines_come_now_and_then_with_the_time_left_and_at_the_end(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = Progress("work", 100, "MB")
    for done in range(101):  # two a second
        now = done / 2
        bar.show(done, "fine")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[1] for line in lines] == ["20/100 MB", "40/100 MB", "60/100 MB", "80/100 MB", "100/100 MB"]
    assert lines[0] == "work  20/100 MB  fine  10s gone, 40s left" and lines[-1].endswith("50s gone, 0s left")


def test_what_takes_no_time_prints_nothing(capsys):
    bar = Progress("work", 2)
    bar.show(1)
    bar.show(2)
    assert capsys.readouterr().err == ""


def test_the_last_line_is_shown_once(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = Progress("work", 2)
    now = 30.0
    bar.show(2)
    bar.show(2)
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def shown(monkeypatch, capsys):
    """The lines of a work of `total` bytes, shown every 20 seconds after each of `steps`."""

    def run(total, steps, live=False):
        now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: now)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: live, raising=False)
        bar = Progress("tokenize", total, "MB", 1e6)
        for done in steps:
            now += 20
            bar.show(done)
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("total", "count"),
    [
        (300, "300/300 bytes"),
        (9_999, "9,999/9,999 bytes"),
        (400_000, "400/400 kB"),
        (7_300_000, "7,300/7,300 kB"),
        (36_000_000, "36/36 MB"),
        (5_000_000_000, "5,000/5,000 MB"),
    ],
)
def test_little_is_counted_in_small_units(shown, total, count):
    assert shown(total, [total]) == f"tokenize  {count}  20s gone, 0s left\n"


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("total", [0, -1])
def test_nothing_to_do_is_not_shown_as_nought_of_nought(shown, total, live):
    assert shown(total, [0, 0], live) == ""


@pytest.mark.parametrize("live", [False, True])
def test_work_of_unknown_size_is_counted_without_an_end(shown, live):
    assert shown(0, [5_000_000, 9_000_000], live) == "tokenize  5 MB  20s gone\ntokenize  9 MB  40s gone\n"


def test_more_than_all_is_the_new_all_and_no_time_is_negative(shown):
    first, second = shown(50_000_000, [10_000_000, 60_000_000]).splitlines()
    assert first == "tokenize  10/50 MB  20s gone, ? left" and second == "tokenize  60/60 MB  40s gone, 0s left"
    assert duration(-3) == "0s"


def test_a_line_that_renews_itself_ends_with_the_work(shown):
    text = shown(50_000_000, [10_000_000, 20_000_000, 50_000_000], live=True)
    assert text.count("\r\033[K") == 3 and text.count("\n") == 1 and text.endswith("0s left\n") and ", 1m00s left\r" in text
