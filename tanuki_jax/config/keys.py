"""How a key of the schema is written: its default, documentation and range, and how these are read back."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

from tanuki_jax.config.ranges import Range


def key(default: Any, doc: str, allowed: Range | None = None, resumable: bool = False) -> Any:
    """A config key: its default (a dict or class means a fresh one each time) and its documentation.

    allowed: of a key that holds numbers, the range of each; resumable: whether it may differ when a workdir's recipe is
    resumed, for it changes neither data nor weights.
    """
    metadata = {"doc": doc, "range": allowed, "resumable": resumable}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_hints = functools.cache(typing.get_type_hints)


def key_types(schema: Any) -> dict[str, Any]:
    """The type of each key of a dataclass of the schema."""
    return _hints(schema)


def range_of(schema: Any, name: str) -> Range:
    """The range of a numeric key of a dataclass of the schema."""
    allowed: Range = schema.__dataclass_fields__[name].metadata["range"]
    return allowed
