"""A config's Python file and what the command line sets in it: `--config=FILE.py[:argument]`, `--config.a.b=value`."""

from __future__ import annotations

import ast
import difflib
import inspect
import linecache
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from ml_collections import ConfigDict

from tanuki_jax.config.schema import Recipe, Source, key_types
from tanuki_jax.errors import UserError

MODULE = "tanuki_config"  # under which Python knows the file that is read
BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def read(arguments: Sequence[str]) -> ConfigDict:
    """What the file's `get_config` returns, with the keys set that the other flags name; of one set twice the last counts."""
    files = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    if not files or not files[0]:
        raise UserError("--config is missing; for example --config=configs/nano.py")
    if len(files) > 1:
        raise UserError(f"--config is given more than once: {', '.join(files)}; a run has one config")
    path, argument = _split(files[0])
    config = _build(path, argument)
    with config.ignore_type():  # the schema knows the types
        for flag in arguments:
            if not flag.startswith("--config="):
                _set(config, flag, path)
    return config


def unknown(path: str, names: Sequence[str]) -> str:
    """Words about a key that is not in the schema, with the one that was meant."""
    near = difflib.get_close_matches(path.rsplit(".", 1)[-1], list(names), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(names))}"
    return f"unknown key {path!r}; {hint}"


# --- the file -------------------------------------------------------------------------------------------------------


def _split(flag: str) -> tuple[Path, str | None]:
    """The file, and the argument where there is one."""
    try:
        file, colon, argument = (flag, "", "") if Path(flag).is_file() else flag.partition(":")
        path = Path(file)
        if path.is_dir():
            raise UserError(f"--config: {file!r} is a directory; name a Python file in it, {path / 'FILE.py'}")
        if not path.is_file():
            raise UserError(f"--config: no such file {file!r}; the shipped ones are in configs/")
    except OSError as error:
        raise UserError(f"--config: {flag[:80]!r}: {error.strerror}") from error
    if path.suffix != ".py":
        raise UserError(f"--config: {file!r} is not a Python file; a config is FILE.py with get_config()")
    return path, argument if colon else None


def _build(path: Path, argument: str | None) -> ConfigDict:
    """What get_config returns.  The file is the user's program: it can fail in any way."""
    module = types.ModuleType(MODULE)
    module.__file__ = str(path)
    sys.modules[MODULE] = module
    linecache.checkcache(str(path))
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        function = getattr(module, "get_config", None)
        if not callable(function):
            raise UserError(f"config {path}: it has no get_config(); define one that returns what config.recipe(...) made")
        _check_argument(function, path, argument)
        config = function() if argument is None else function(argument)
        config = ConfigDict(config) if isinstance(config, Mapping) and not isinstance(config, ConfigDict) else config
    except UserError as error:
        where = _place(error, path)
        raise UserError(f"{error} ({where})" if where else str(error)) from error
    except (Exception, SystemExit) as error:
        raise UserError(f"config {_place(error, path) or path}: {_shown(error, path)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config {path}: get_config() must return what config.recipe(...) made, a group of keys, not {config!r}"
        )
    return config


def _check_argument(function: Callable[..., Any], path: Path, argument: str | None) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind(*(() if argument is None else (argument,)))
    except TypeError:
        message = f"config {path}: get_config{signature}"
        if argument is None:
            names = ":".join(name.upper() for name in signature.parameters)
            raise UserError(f"{message} needs an argument; give it after a colon, --config={path}:{names}") from None
        raise UserError(f"{message} takes no argument; leave out :{argument}, --config={path}") from None


def _place(error: BaseException, path: Path) -> str:
    """The file and line of the config at which something went wrong."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else ""


def _shown(error: BaseException, path: Path) -> str:
    """What went wrong, in words instead of Python's name for it, with the line of the file."""
    if isinstance(error, SyntaxError):
        return f"this is not Python: {error.msg}" + (f": {error.text.strip()}" if error.text else "")
    last = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    code = f" ({last[-1].line})" if last and last[-1].line else ""
    message = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        return f"it ended the program{code}"
    call = next((frame_locals for frame_locals in _calls(error) if isinstance(frame_locals.get("self"), ConfigDict)), None)
    name = call.get("key", call.get("attribute")) if call else None
    if call and isinstance(error, KeyError | AttributeError):
        message = _missing(str(name), list(map(str, call["self"])))
    elif call and isinstance(error, TypeError) and name in call["self"] and "value" in call:
        kind, value = type(call["self"][name]).__name__, call["value"]
        message = f"{name} must be {kind}, not {type(value).__name__} {value!r}"
    elif isinstance(error, KeyError) and len(error.args) == 1:
        message = f"there is no {error.args[0]!r}"
    elif isinstance(error, FileNotFoundError):
        message = f"no such file {error.filename!r}"
    return f"{message or 'it failed with ' + type(error).__name__}{code}"


def _calls(error: BaseException) -> list[dict[str, Any]]:
    """The variables of the functions through which an error came, from the outermost on."""
    return [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]


def _missing(name: str, held: list[str]) -> str:
    """A group of keys that holds `held` was asked for another."""
    near = difflib.get_close_matches(name, held, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no {name!r} here; {hint}it has {', '.join(held) or 'nothing'}"


# --- the flags ------------------------------------------------------------------------------------------------------


def _set(config: ConfigDict, flag: str, file: Path) -> None:
    """Puts a flag's value where its key says."""
    name, equals, text = flag.partition("=")
    where, done, kind, place = f"config {file}: {name}", "", cast(Any, Recipe), config
    *groups, last = name.removeprefix("--config.").split(".")
    for part in groups:
        kind, done = _inner(kind, place, part, done, where), f"{done}.{part}".lstrip(".")
        if not is_dataclass(kind) and get_origin(kind) is not dict:
            raise UserError(f"{where}: {done} is one value and has no keys")
        if kind is Source and isinstance(place.get(part), str):
            place[part] = {"files": place[part]}
        if part not in place:
            place[part] = {}
        place = place[part]
        if not isinstance(place, ConfigDict):
            raise UserError(f"{where}: {done} is {place!r} in the file, not a group of keys")
    kind, done = _inner(kind, place, last, done, where), f"{done}.{last}".lstrip(".")
    place[last] = _parsed(kind, text if equals else None, where, done)


def _inner(kind: Any, place: ConfigDict, part: str, done: str, where: str) -> Any:
    """The kind of the key `part` in a group of keys, or in a dictionary of the user's own names."""
    if is_dataclass(kind):
        if part not in key_types(kind):
            raise UserError(f"{where}: {unknown(f'{done}.{part}'.lstrip('.'), list(key_types(kind)))}")
        return key_types(kind)[part]
    if part not in place:
        raise UserError(f"{where}: {done} has no {part!r}; it has {', '.join(map(str, place)) or 'nothing'}")
    return get_args(kind)[1]


def _parsed(kind: Any, text: str | None, where: str, path: str) -> Any:
    """The value that a flag's text means."""
    flag, origin = f"--config.{path}", get_origin(kind)
    if is_dataclass(kind) and (kind is not Source or text is None):
        raise UserError(f"{where}: {path} is a group of keys; set one of them, {flag}.KEY=VALUE")
    if origin is dict and is_dataclass(get_args(kind)[1]):
        raise UserError(f"{where}: {path} is a group of keys; set one of them, {flag}.NAME.KEY=VALUE")
    if text is None:
        if kind is bool:
            return True
        raise UserError(f"{where} has no value; give it one, {flag}=VALUE")
    if kind in (str, Source):
        return text
    try:
        return _literal(kind, origin, text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise UserError(f"{where} is {text[:80]!r}; it must be {_form(kind, flag)}") from None


def _form(kind: Any, flag: str) -> str:
    """How the value of a key is written, in words."""
    if get_origin(kind) is tuple:
        example = {int: "(0, 1000)", float: "(0.5, 0.2)"}.get(get_args(kind)[0], "('name',)")
        return f'a tuple as Python writes it, for example {flag}="{example}"'
    if get_origin(kind) is dict:
        example = {int: "1", float: "0.5"}.get(get_args(kind)[1], "(0.5,)")
        return f"a dictionary as Python writes it, for example {flag}=\"{{'name': {example}}}\""
    return {int: "a whole number, written with digits alone", float: "a number", bool: "True or False"}[kind]


def _literal(kind: Any, origin: Any, text: str) -> Any:
    if kind is bool:
        if text.lower() not in BOOLS:
            raise ValueError(text)
        return BOOLS[text.lower()]
    if kind in (int, float):
        return kind(text)
    value = ast.literal_eval(text)
    if origin is tuple and isinstance(value, int | float | str):
        value = (value,)
    if not isinstance(value, tuple | list if origin is tuple else dict):
        raise ValueError(text)
    return value
