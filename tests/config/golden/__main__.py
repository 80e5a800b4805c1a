"""`python -m tests.config.golden` writes what the tests compare: config keys, ranges, shipped configs with their defaults.

Look at the diff before committing it: it shows every consequence of a changed default.
"""

import dataclasses
import json
from pathlib import Path

from tanuki_jax import config

HERE = Path(__file__).parent
CONFIGS = sorted((HERE.parents[2] / "configs").glob("*.py"))
KEYS = HERE.parent / "config_keys.txt"
DOCS = HERE.parents[2] / "docs/config.md"


def keys(schema=config.Recipe, path=""):
    """Dotted names of all keys, those of one stage under stages.NAME, with their fields."""
    for field in dataclasses.fields(schema):
        named = {"stages": config.Stage, "data": config.Source}.get(field.name) if path == "" else None
        inner = named or getattr(config, str(field.type), None)
        if inner:
            yield from keys(inner, f"{path}{field.name}.NAME." if named else f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", field


def numeric():
    """The keys that hold numbers, with their fields."""
    return {name: field for name, field in keys() if "int" in str(field.type) or "float" in str(field.type)}


def ranges():
    """The table of docs/config.md: each numeric key with its default and range."""
    rows = []
    for name, field in numeric().items():
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        rows.append(
            f"| `{name}` | {default:,} |" if isinstance(default, int | float) else f"| `{name}` | {default or 'none'} |"
        )
        rows[-1] += f" {field.metadata['range'].describe()} |"
    return "\n".join(["| key | default | each number |", "|---|---|---|", *rows]) + "\n"


def golden(file):
    return HERE / f"{file.stem}.json"


def resolved(file):
    """The config of a file as it is read back from JSON."""
    return json.loads(json.dumps(config.to_dict(config.load([f"--config={file}"]))))


if __name__ == "__main__":
    KEYS.write_text("".join(f"{name}\n" for name, _ in keys()), encoding="utf-8")
    DOCS.write_text(DOCS.read_text(encoding="utf-8").partition("| key |")[0] + ranges(), encoding="utf-8")  # it ends the page
    for file in CONFIGS:
        golden(file).write_text(json.dumps(resolved(file), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
