"""What the pages name is there: links, files, config keys; and the path through one train step is short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for folder in (".", "docs", "launch", "benchmarks/results") for p in (ROOT / folder).glob("*.md"))
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md" and page.parent.name != "results"]  # not of the past
KEYS = (ROOT / "tests/config/config_keys.txt").read_text(encoding="utf-8").split()
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}
IN_STAGE = {key.split(".")[2] for key in KEYS if key.startswith("stages.NAME.") and key.count(".") > 2}
# Files that a run, an export or another tool writes.
WRITTEN = re.compile(r"(stages|data|checkpoints|STORE|runs|logs|ja|en|texts|train|corpus|llama)/")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without fenced code."""
    return re.sub(r"^```[\s\S]*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_files_exist(page):
    for path in re.findall(r"`([\w.\-]+/[\w./\-]*)`", prose(page)):
        if WRITTEN.match(path) and not path.endswith(".py"):
            continue
        assert any((base / path).exists() for base in (ROOT, ROOT / "tanuki_jax")) or not re.search(r"\.\w+$|/$", path), path


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_config_keys_exist(page):
    for word in re.findall(r"`(?:--config\.)?((?:[a-z]\w*)(?:\.\w+)+)(?:=[^`]*)?`", prose(page)):
        head, *rest = word.split(".")
        if head in IN_STAGE:
            word = f"stages.NAME.{word}"
        elif head in ("stages", "data") and len(rest) > 1:
            word = ".".join([head, "NAME", *rest[1:]])
        elif head not in SECTIONS or rest[-1] in ("py", "json", "md", "jsonl", "model", "count_parameters"):
            continue
        assert any(f"{key}.".startswith(f"{word}.") or word.startswith(f"{key}.") for key in KEYS), word


def test_names_in_contributing_exist():
    """Functions, classes and tables that CONTRIBUTING.md points to."""
    sources = [p for folder in ("tanuki_jax", "tests") for p in (ROOT / folder).rglob("*.py")]
    words = set(re.findall(r"\w+", " ".join(p.read_text(encoding="utf-8") for p in sources)))
    named = set(re.findall(r"`(\w+)`", prose(ROOT / "CONTRIBUTING.md")))
    assert named <= words | {"utils"}, named - words


def test_one_train_step_is_read_in_few_lines():
    """The files of the section "One dense train step, file by file"."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.split("## One dense train step, file by file")[1].split("\n\nNot needed")[0]
    files = re.findall(r"\(\.\./(tanuki_jax/[\w/]+\.py)\)", section)
    assert len(files) >= 6
    assert sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files) <= 1200


def test_a_preemption_is_announced_by_sigterm_alone():
    """No platform sends anything else to a process."""
    texts = [*PAGES, *(ROOT / "tanuki_jax").rglob("*.py")]
    assert not [path for path in texts if "platform's notice" in path.read_text(encoding="utf-8")]
