"""`python -m tests.golden` writes what test_config.py compares: the config keys, and every shipped config with its defaults.

Look at the diff before committing it: it shows every consequence of a changed default.
"""

import dataclasses
import json
from pathlib import Path

from tanuki_jax import config

HERE = Path(__file__).parent
CONFIGS = sorted((HERE.parents[1] / "configs").glob("*.py"))
KEYS = HERE.parent / "config_keys.txt"


def keys(schema=config.Recipe, path=""):
    """Dotted names of all keys, those of one stage under stages.NAME, with their fields."""
    for field in dataclasses.fields(schema):
        named = {"stages": config.Stage, "data": config.Source}.get(field.name) if path == "" else None
        inner = named or getattr(config, str(field.type), None)
        if inner:
            yield from keys(inner, f"{path}{field.name}.NAME." if named else f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", field


def golden(file):
    return HERE / f"{file.stem}.json"


def resolved(file):
    """The config of a file as it is read back from JSON."""
    return json.loads(json.dumps(config.to_dict(config.load([f"--config={file}"]))))


if __name__ == "__main__":
    KEYS.write_text("".join(f"{name}\n" for name, _ in keys()), encoding="utf-8")
    for file in CONFIGS:
        golden(file).write_text(json.dumps(resolved(file), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
