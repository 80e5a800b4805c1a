"""README.md and README.ja.md say the same: sections, commands and links in the same order."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "README.ja.md")


def code_blocks(text: str) -> list[str]:
    """Fenced and indented blocks, in order."""
    return re.findall(r"^```[\s\S]*?^```$|(?:^ {4,}\S.*\n)+", text, re.MULTILINE)


def without_code(text: str) -> str:
    for block in code_blocks(text):
        text = text.replace(block, "\n", 1)
    return text


def headings(text: str) -> list[int]:
    """The level of each heading."""
    return [len(marks) for marks in re.findall(r"^(#+) ", without_code(text), re.MULTILINE)]


def links(text: str) -> list[str]:
    """The target of each link and picture, but for the link to the other language."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    return [target for target in targets if target not in PAGES]


def inline_code(text: str) -> list[str]:
    """Words in backticks outside code blocks; a sentence may order them in another way."""
    return sorted(re.findall(r"`([^`\n]+)`", without_code(text)))


@pytest.mark.parametrize("part", [headings, code_blocks, links, inline_code])
def test_both_languages_have_the_same(part):
    english, japanese = (part((ROOT / page).read_text(encoding="utf-8")) for page in PAGES)
    assert len(english) > 6
    assert english == japanese


def test_each_page_links_to_the_other():
    for page, other in zip(PAGES, reversed(PAGES), strict=True):
        assert f"]({other})" in (ROOT / page).read_text(encoding="utf-8")
