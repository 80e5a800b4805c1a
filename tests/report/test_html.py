"""What report.html looks like: structure and names; the numbers are tested where they are made."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tanuki_jax.report import experts, html, plots, svg
from tests import tiny_recipe

TEMPLATE = Path(html.__file__).with_name("report.html.jinja").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The regions around every table and picture of a page; None where there is none."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("table", "svg"):
            regions = [attrs for name, attrs in self.open if name == "div" and "scroll" in (attrs.get("class") or "").split()]
            self.found.append((tag, given, regions[-1] if regions else None))
        if tag not in self.VOID:
            self.open.append((tag, given))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    workdir = tiny_recipe.trained(tmp_path_factory.getbasetemp())
    return (workdir / "report.html").read_text(encoding="utf-8")


def test_whatever_is_wide_lies_in_a_region_that_scrolls_and_that_a_keyboard_reaches(page):
    found = Page(page).found
    assert [tag for tag, *_ in found].count("table") >= 3 and [tag for tag, *_ in found].count("svg") >= 4
    labels = [region and region.get("aria-label") for _, _, region in found]
    assert all(labels) and len(set(labels)) == len(labels)
    assert all(region["tabindex"] == "0" and region["role"] == "region" for _, _, region in found)
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto[^}]*linear-gradient", page) and ":focus-visible" in page


def test_nothing_else_is_wider_than_a_phone():
    css = TEMPLATE[TEMPLATE.index("<style>") : TEMPLATE.index("</style>")]
    widths = [(float(n), unit) for n, unit in re.findall(r"(?<!max-)width: ([\d.]+)(px|em)", css)]
    assert all(n * (16 if unit == "em" else 1) < 300 for n, unit in widths)
    assert "overflow-wrap: anywhere" in css and 'name="viewport"' in TEMPLATE and "prefers-color-scheme: dark" in css


def test_pictures_keep_their_size_and_their_letters_can_be_read(page):
    assert re.search(r"\.picture svg \{[^}]*max-width: none", page)
    pictures = [given for tag, given, _ in Page(page).found if tag == "svg"]
    assert all(float(given["width"].removesuffix("pt")) > 350 for given in pictures)  # not drawn for a stamp
    code = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (plots, experts))
    assert min(map(float, re.findall(r"fontsize=([\d.]+)", code))) >= 9  # points: 12 pixels


def test_a_recipe_may_have_the_name_of_what_stands_for_the_font(page):
    assert "FONT" not in page


@pytest.mark.parametrize(
    "places", [[0.5], [0.1, 0.5, 0.9], [0.5] * 5, [0.0] * 9 + [1.0], [0.2, 0.99, 1.0, 1.0], [i / 300 for i in range(20)]]
)
def test_names_are_moved_apart_and_stay_in_the_picture(places):
    moved = plots.spread_labels(places, 0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in zip(moved, moved[1:], strict=False)) and max(moved) <= 1 and min(moved) >= 0
    if all(b - a >= 0.05 for a, b in zip(places, places[1:], strict=False)):
        assert moved == places


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pretrain", "pretrain"),
        ("continued_pretraining_number_01", "continued…number_01"),
        ("continued_pretraining_number_02", "continued…number_02"),
        ("指示調整の第二段階の続き", "指示調整…階の続き"),
        ("第一段階の指示調整", "第一段階の指示調整"),
    ],
)
def test_a_long_name_keeps_what_tells_it_from_others(name, text):
    assert svg.shorten(name) == text


def scored(*pairs):
    return [{"name": f"s{i}", "scores": {"exact_match": exact, "pair_accuracy": pair}} for i, (exact, pair) in enumerate(pairs)]


@pytest.mark.parametrize("pairs", [[(1.0, 1.0)], [(0.96, 1.0), (1.0, 0.96)], [(0.0, 0.0), (0.5, 0.5), (0.5, 0.51)]])
def test_two_numbers_of_a_stage_do_not_cover_one_another(monkeypatch, pairs):
    boxes = []

    def measure(figure):
        texts = [t for t in figure.axes[0].texts if t.get_text().isdigit()]
        figure.canvas.draw()
        boxes.extend(text.get_window_extent() for text in texts)
        svg.plt.close(figure)

    monkeypatch.setattr(plots, "to_svg", measure)
    plots.plot_scores(scored(*pairs))
    assert len(boxes) == 2 * len(pairs)
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
