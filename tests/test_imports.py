"""Who may import whom: DESIGN, section 1."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for room in ("tanuki_jax", "tokenization") for path in (ROOT / room).rglob("*.py"))

# The rooms from top to bottom.  A room imports its own layer and those below it.
LAYERS = (
    ("cli",),
    ("recipe",),
    (
        "stage",
        "stage_data",
        "start",
        "validation",
        "placement",
        "preflight",
        "observe",
        "inputs",
        "report",
        "report_experts",
        "train",
        "upcycle",
        "evaluate",
        "serve",
        "synth",
        "interop",
        "plan",
    ),
    ("model", "data", "checkpoint", "parallel", "tokenization"),
    ("ops",),
    (
        "config",
        "config_file",
        "schema",
        "ranges",
        "checks",
        "origins",
        "files",
        "lock",
        "progress",
        "errors",
        "flags",
        "machine",
        "tanuki_jax",
    ),  # tanuki_jax: the package itself, for its version
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# What the layers alone would allow.
FORBIDDEN = {("data", "model"), ("model", "data"), ("parallel", "model"), ("parallel", "data"), ("parallel", "checkpoint")}
# Libraries that only one room may import.
OWNED = {"flax": "model", "orbax": "checkpoint", "MeCab": "tokenization", "sentencepiece": "tokenization"}
# Imported by `tanuki --help`: nothing but the standard library and one another on top.
HEAVY_FREE = ("cli", "flags", "lock", "machine", "schema", "ranges", "errors", "tanuki_jax")


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


@pytest.mark.parametrize("module", GRAPH)
def test_arrows_point_downwards_only(module):
    for found in GRAPH[module]:
        if found.module in OURS:
            arrow = (room(module), room(found.module))
            assert LAYER[arrow[0]] <= LAYER[arrow[1]] and arrow not in FORBIDDEN, (
                f"{OURS[module]}:{found.line}: {' must not import '.join(arrow)}"
            )


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


def test_no_room_imports_itself_by_way_of_others():
    """Within a layer too, so that a room can be read, or replaced, before those that use it."""
    rooms = {room(module): set() for module in GRAPH}
    for module, found in GRAPH.items():
        rooms[room(module)] |= {room(i.module) for i in found if i.module in OURS} - {room(module)}
    tuple(graphlib.TopologicalSorter(rooms).static_order())


@pytest.mark.parametrize("name", HEAVY_FREE)
def test_the_command_line_imports_nothing_heavy_before_a_verb_asks_for_it(name):
    [module] = [m for m in OURS if m.split(".")[-1] == name]
    top = {i.module.split(".")[0] for i in GRAPH[module] if i.top}
    assert top <= {*sys.stdlib_module_names, "tanuki_jax"}
    ours = {i.module.removeprefix("tanuki_jax.") for i in GRAPH[module] if i.top and i.module in OURS}
    assert ours <= set(HEAVY_FREE)  # so nothing heavy comes by way of them, either


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


def test_every_room_has_its_layer():
    assert {room(module) for module in OURS} <= LAYER.keys()


def test_a_thing_lives_in_the_room_of_its_noun():
    for path in FILES:
        assert not {"utils", "util", "common", "helper", "helpers", "misc"} & {*path.relative_to(ROOT).parts, path.stem}, path


def test_no_file_is_longer_than_can_be_read():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: n for path, n in lengths.items() if n > 450} == {}
