"""A workdir belongs to one recipe: it is claimed by writing the recipe there, and refused to another."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from tanuki_jax import config, files
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import UserError
from tanuki_jax.recipe.workdir import Workdir


def claim_workdir(recipe: Recipe, workdir: Workdir) -> None:
    """Makes the workdir this recipe's, or refuses one that is another's."""
    path, ours = workdir.recipe_file, config.to_dict(recipe)
    if path.is_file():
        stored = files.read_json(path)
        try:
            theirs = config.from_dict(Recipe, stored)  # keys added since have their defaults
        except UserError as error:
            raise UserError(f"workdir: {path} is no recipe of this version ({error}); use another --workdir") from error
        differing = _differences(config.to_dict(theirs), ours)
        if differing:
            shown = "; ".join(differing[:4]) + (" ..." if len(differing) > 4 else "")
            raise UserError(
                f"workdir: {workdir.root} belongs to another recipe; {shown}. "
                "Use another --workdir, or the settings it was started with"
            )
    try:
        workdir.root.mkdir(parents=True, exist_ok=True)
        files.write_json(path, ours)
    except OSError as error:
        raise UserError(f"--workdir: cannot write to {workdir.root}: {error.strerror}") from error


def _differences(old: Any, new: Any, schema: Any = Recipe, path: str = "") -> list[str]:
    """What differs between two recipes, as nested dicts, but for the keys that the schema calls resumable."""
    if dataclasses.is_dataclass(schema):
        types = config.key_types(typing.cast(type, schema))
        keys = [(f.name, types[f.name]) for f in dataclasses.fields(schema) if not f.metadata["resumable"]]
    elif typing.get_origin(schema) is dict:
        keys = [(name, typing.get_args(schema)[1]) for name in {**old, **new}]
    else:
        return [] if old == new else [f"{path} was {old}, is {new}"]
    lines = []
    for name, inner in keys:
        key = f"{path}.{name}".lstrip(".")
        if (name in old) != (name in new):
            lines.append(f"{key} is {'new' if name in new else 'gone'}")
        elif name in old:
            lines += _differences(old[name], new[name], inner, key)
    return lines
