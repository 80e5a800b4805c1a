"""`python -m tests.config.golden` writes what the tests compare: config keys, ranges, shipped configs with their defaults.

Look at the diff before committing it: it shows every consequence of a changed default.
"""

import dataclasses
import json
from pathlib import Path

from tanuki_jax import config
from tanuki_jax.config import schema

HERE = Path(__file__).parent
CONFIGS = sorted((HERE.parents[2] / "configs").glob("*.py"))
KEYS = HERE.parent / "config_keys.txt"
DOCS = HERE.parents[2] / "docs/config.md"
# Of the recipe's dictionaries of groups, what each entry is.
NAMED = {
    **{"stages": config.Stage, "data": config.Source, "filters": config.Filters},
    **{"endpoints": config.Endpoint, "synth": config.Synth},
}


def keys(group=config.Recipe, path=""):
    """Dotted names of all keys, those of one stage under stages.NAME, with their fields."""
    for field in dataclasses.fields(group):
        named = NAMED.get(field.name) if path == "" else None
        inner = named or getattr(schema, str(field.type), None)
        if inner:
            yield from keys(inner, f"{path}{field.name}.NAME." if named else f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", field


def numeric():
    """The keys that hold numbers, with their fields."""
    return {name: field for name, field in keys() if "int" in str(field.type) or "float" in str(field.type)}


def ranges():
    """The tables that end docs/config.md: the stage kinds, and each key with its default, what is allowed and its meaning."""
    kinds = [
        f"| `{name}` | {kind.doc} | {', '.join(kind.rows) or 'none'} | {kind.layout or 'none'} | {kind.loss or 'none'} | "
        f"{', '.join(f'`{array}`' for array in kind.batch) or 'none'} |"
        for name, kind in config.STAGE_KINDS.items()
    ]
    rows = [
        f"| `{name}` | {default_of(field)} | {allowed(name, field)} | {escape(field.metadata['doc'])} |"
        for name, field in keys()
    ]
    return (
        "\n".join(
            [
                *(
                    "| kind | what it is | rows | layout | loss | arrays beside the five |",
                    "|---|---|---|---|---|---|",
                    *kinds,
                    "",
                ),
                *("## All keys", "", ALL_KEYS, "", "| key | default | allowed | meaning |", "|---|---|---|---|", *rows),
            ]
        )
        + "\n"
    )


ALL_KEYS = (
    "`NAME` is any stage, source, filter, endpoint or set of made rows. NaN and infinities are never allowed; in a tuple or\n"
    "dictionary, each number must be in the range."
)


def default_of(field):
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if isinstance(default, int | float) and not isinstance(default, bool):
        return f"{default:,}"
    return f"`{escape(default)}`" if default or default is False else "empty"


def allowed(name, field):
    """A range, or a choice of words."""
    if name in numeric():
        return field.metadata["range"].describe()
    return ", ".join(f"`{choice}`" for choice in config.CHOICES.get(name.rsplit(".", 1)[-1], ())) or f"{field.type}"


def escape(value):
    return str(value).replace("|", "\\|")


def golden(file):
    return HERE / f"{file.stem}.json"


def resolved(file):
    """The config of a file as it is read back from JSON."""
    return json.loads(json.dumps(config.to_dict(config.load([f"--config={file}"]))))


if __name__ == "__main__":
    KEYS.write_text("".join(f"{name}\n" for name, _ in keys()), encoding="utf-8")
    DOCS.write_text(DOCS.read_text(encoding="utf-8").partition("| kind |")[0] + ranges(), encoding="utf-8")  # it ends the page
    for file in CONFIGS:
        golden(file).write_text(json.dumps(resolved(file), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
