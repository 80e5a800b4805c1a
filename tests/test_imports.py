"""Who may import whom: the table of docs/architecture.md."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for room in ("tanuki_jax", "tokenization") for path in (ROOT / room).rglob("*.py"))

TABLE = ROOT / "docs/architecture.md"


def table() -> dict[str, set[str]]:
    """Package -> the packages that it may import, from the table of docs/architecture.md: its first and last columns."""
    rows = [line.strip("|\n").split("|") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return {name.strip(" `/"): set(re.findall(r"`(\w+)`", may)) for name, *_, may in rows}


ALLOWED = table()
GROUND = {"errors", "files", "progress", "tanuki_jax"}  # any package of tanuki_jax may import them
# Libraries that only one room may import.
OWNED = {"flax": "model", "orbax": "checkpoint", "MeCab": "tokenization", "sentencepiece": "tokenization"}


class Import(NamedTuple):
    module: str  # dotted name, of one of our modules where there is such a file
    top: bool  # at the top of the file, not inside a function
    line: int


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {module_of(path): path for path in FILES}


def room(module):
    parts = module.split(".")
    return parts[0] if parts[0] == "tokenization" or len(parts) == 1 else parts[1]


def imports(path):
    """Every import of a file; `from a import b` is a.b where that is a module of ours, else a."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = {name if name in OURS else node.module for name in full}
        yield from (Import(name, id(node) not in inside, node.lineno) for name in names)


GRAPH = {module: list(imports(path)) for module, path in OURS.items()}


def forbidden(module, found):
    """The imports of a module that the table does not allow."""
    package = room(module)
    ground = GROUND - {package} if package not in GROUND | {"tokenization"} else set()
    return [i for i in found if i.module in OURS and room(i.module) not in {package} | ground | ALLOWED[package]]


@pytest.mark.parametrize("module", GRAPH)
def test_a_package_imports_what_the_table_allows(module):
    for found in forbidden(module, GRAPH[module]):
        pytest.fail(f"{OURS[module]}:{found.line}: {room(module)} must not import {room(found.module)} (docs/architecture.md)")


def test_every_arrow_of_the_table_is_used_and_points_down():
    """So that the table does not allow more than the code does, and no package imports itself by way of others."""
    used = {package: set() for package in {*ALLOWED, *GROUND}}
    for module, found in GRAPH.items():
        used[room(module)] |= {room(i.module) for i in found if i.module in OURS} - {room(module)}
    for package, allowed in ALLOWED.items():
        assert used[package] - GROUND == allowed - GROUND, package
    order = list(graphlib.TopologicalSorter(ALLOWED).static_order())
    places = [order.index(package) for package in ALLOWED]
    for number, package in enumerate(ALLOWED):
        below = list(ALLOWED)[number:]
        assert ALLOWED[package] <= set(below), f"{package} imports a package that stands above it in the table"
    assert len(places) == len(ALLOWED)


def test_an_arrow_that_the_table_does_not_allow_is_found():
    assert forbidden("tanuki_jax.data.loader", [Import("tanuki_jax.model", True, 1)])
    assert forbidden("tokenization.train", [Import("tanuki_jax.files", True, 1)])
    assert not forbidden("tanuki_jax.recipe.run", [Import("tanuki_jax.model", True, 1)])


@pytest.mark.parametrize("library", OWNED)
def test_a_library_stays_in_its_room(library):
    users = {room(module) for module, found in GRAPH.items() if any(i.module.split(".")[0] == library for i in found)}
    assert users == {OWNED[library]}


def test_no_module_imports_itself_by_way_of_others():
    tuple(
        graphlib.TopologicalSorter(
            {m: {i.module for i in found if i.module in OURS} - {m} for m, found in GRAPH.items()}
        ).static_order()
    )


def test_the_command_line_imports_nothing_heavy_before_a_verb_asks_for_it():
    heavy = {"jax", "numpy", "flax", "optax", "orbax", "grain", "tokenizers", "pyarrow"}
    code = f"import sys, tanuki_jax.cli.main; found = {heavy} & sys.modules.keys(); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_kernels_are_imported_where_they_are_used():
    """Importing Pallas takes longer than many a command works."""
    code = "import sys; from tanuki_jax import interop, model, recipe; from tanuki_jax.upcycle import stream; "
    code += "assert 'jax.experimental.pallas' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_orbax_is_imported_where_it_is_used():
    """An export reads without it, and begins a tenth of a second earlier."""
    code = "import sys; from tanuki_jax import interop; assert 'orbax.checkpoint' not in sys.modules; "
    code += "from tanuki_jax import checkpoint; assert checkpoint.Checkpoints and 'orbax.checkpoint' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_package_is_in_the_table_and_the_ground_floor_is_small():
    assert {room(module) for module in OURS} - {"tanuki_jax"} == ALLOWED.keys()
    assert len(list((ROOT / "tanuki_jax").glob("*.py"))) <= 4


def test_a_thing_lives_in_the_room_of_its_noun():
    for path in FILES:
        assert not {"utils", "util", "common", "helper", "helpers", "misc"} & {*path.relative_to(ROOT).parts, path.stem}, path


def test_no_file_is_longer_than_can_be_read():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: n for path, n in lengths.items() if n > 450} == {}
