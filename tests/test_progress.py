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
