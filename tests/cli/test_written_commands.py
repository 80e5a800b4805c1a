"""Commands that are written down for a reader to paste."""

import re
import shlex
from pathlib import Path

import pytest

from tanuki_jax import config
from tanuki_jax.cli.parser import HELP, make_parser

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "launch/README.md"]
PLACES = [*sorted(PAGES), *sorted((ROOT / "configs").rglob("*.py"))]


def commands(text):
    """Lines that begin with tanuki, with their continuation lines; what follows two spaces says what they do."""
    lines = re.sub(r"\\+\n\s*", "", text).splitlines()
    found = [re.sub(r" {2,}\S.*| {2,}$", "", line.strip()) for line in lines]
    found += re.findall(r"`(tanuki [^`\n]*=[^`\n]*)`", text)  # in a sentence or a table
    return [line.removeprefix(".venv/bin/") for line in found if re.match(r"(\.venv/bin/)?tanuki( [a-z]+)+ --", line)]


COMMANDS = [c for text in (HELP, *(p.read_text(encoding="utf-8") for p in PLACES)) for c in commands(text)]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_it_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, *given = shlex.split(command)
    flags = [word for word in given if word.startswith("--config")]
    assert hasattr(make_parser().parse_args([word for word in given if word not in flags]), "work")
    if flags and not command.startswith("tanuki launch"):  # whose config is read on the workers
        recipe = config.load(flags, needs_stages=not command.startswith("tanuki synth"))
        assert recipe.stages or recipe.synth


def test_there_are_commands_and_one_trains_on_a_single_language():
    assert len(COMMANDS) > 20
    assert [c for c in COMMANDS if "data.ja" in c and "data.en" not in c and "mixture.en=" in c]


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
def test_the_readme_says_where_the_program_is_before_it_calls_it(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.index("source .venv/bin/activate") < text.index("\n    tanuki ")
