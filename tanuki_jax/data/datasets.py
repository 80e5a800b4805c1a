"""The files of a folder that holds a dataset: of several splits `train`, and what was taken is told."""

from __future__ import annotations

import collections
import contextlib
import fnmatch
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tanuki_jax.data import formats, paths
from tanuki_jax.errors import UserError

# As Hugging Face datasets knows splits by the names of files and folders.
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"data/(\w+)-\d{5}-of-\d{5}[^/]*$")  # of what push_to_hub wrote
CLONED = (".git", ".gitattributes", "README.md", "data")  # what says that a folder is a clone of a dataset's repository


def expand(path: str) -> list[str]:
    """The files of a dataset folder: one that Hugging Face datasets or TFDS wrote; a file is itself."""
    if not paths.is_directory(path):
        return [path]
    if formats.is_tfds(path):
        _warn_of_splits(path)
        return [path]
    folder = path.rstrip("/")
    try:
        if paths.exists(f"{folder}/dataset_dict.json"):
            splits = paths.read_json(f"{folder}/dataset_dict.json")["splits"]
            taken = "train" if "train" in splits else splits[0]
            left = ", ".join(name for name in splits if name != taken)
            paths.warn(f"data: {folder}: split {taken}{'; not read: ' if left else ''}{left}")
            folder = f"{folder}/{taken}"
        if paths.exists(f"{folder}/state.json"):
            found = [f"{folder}/{entry['filename']}" for entry in paths.read_json(f"{folder}/state.json")["_data_files"]]
            for missing in (file for file in found if not paths.exists(file)):
                raise UserError(f"data: {missing} is missing from the dataset in {path}; save it again")
            return found
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"data: {folder} is not a whole dataset of Hugging Face's ({error!r}); save it again") from error
    return _files_of(folder) or [path]


def _files_of(folder: str) -> list[str]:
    """The files of the split train of a folder, or all of them where no name says a split; none of a folder of anything."""
    suffixes = [suffix for suffix in formats.SUFFIXES if suffix != ".bin"]
    if paths.is_url(folder):
        urls = sorted({url for suffix in suffixes for url in paths.glob_files(f"{folder}/**/*{suffix}")})
        inner = folder.rpartition("://")[2] + "/"
        names, known = [url[url.index(inner) + len(inner) :] for url in urls], True
    else:
        names = [
            str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.name.endswith(tuple(suffixes)) and p.is_file()
        ]
        known = any((Path(folder) / name).exists() for name in CLONED) or any(n.endswith(".parquet") for n in names)
    readme = ""
    if paths.exists(f"{folder}/README.md"):
        with paths.open_file(f"{folder}/README.md") as f:
            readme = f.read().decode("utf-8", "replace")
    return [f"{folder}/{name}" for name in _train_files(folder, names, readme, known, suffixes)]


def _warn_of_splits(path: str) -> None:
    """Says which splits of a TFDS folder are read; a folder without its description is for the reader to refuse."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        splits = [entry["name"] for entry in paths.read_json(f"{path}/dataset_info.json")["splits"]]
        others = ", ".join(name for name in splits if name != "train")
        if "train" in splits:
            paths.warn(f"data: {path}: split train{'; not read: ' if others else ''}{others}")
        elif len(splits) > 1:
            paths.warn(f"data: {path}: no split train; all are read: {others}")


def _train_files(folder: str, names: Sequence[str], readme: str, known: bool, suffixes: Collection[str]) -> list[str]:
    """Of the files in a folder (a clone of a dataset's repository, say) those that datasets would read as its split `train`.

    The README may say which files those are; else it is the names of folders and files that do.

    Args:
      names: relative to the folder; hidden ones are left out.
      known: whether the folder is known to be a dataset's; of another that has no split's name nothing is read.
    """
    found = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
    splits, left = _declared_splits(folder, found, readme), ""
    if splits is None:
        found, left = _of_one_format(found, suffixes)
        splits = _split_name(found)
        if not found or not (known or splits or left):
            return []
    if not splits:
        paths.warn(f"data: {folder}: no name of a file or folder in it is a split's; all {len(found)} files are read{left}")
        return found
    if "train" not in splits:
        raise UserError(
            f"data: {folder} has no split train, only {', '.join(splits)}; name the files that you want, {folder}/{found[0]} "
            "for example"
        )
    others = ", ".join(f"{name} ({len(files)})" for name, files in splits.items() if name != "train")
    taken = splits["train"]
    paths.warn(f"data: {folder}: split train, {len(taken)} files{'; not read: ' if others else ''}{others}{left}")
    return taken


def _of_one_format(found: Sequence[str], suffixes: Collection[str]) -> tuple[list[str], str]:
    """The files of the commonest format, and what is told of the others: a repository may hold the same rows twice."""
    formats = {name: max((s for s in suffixes if name.endswith(s)), key=len) for name in found}
    count = collections.Counter(formats.values())
    if len(count) < 2:
        return list(found), ""
    most = max(count, key=lambda suffix: (count[suffix], suffix == ".parquet"))
    others = ", ".join(f"{n} {suffix}" for suffix, n in count.items() if suffix != most)
    return [name for name in found if formats[name] == most], f"; of another format, and not read: {others}"


def _split_name(found: Sequence[str]) -> dict[str, list[str]]:
    """Split -> files, by the first of datasets' rules by which any file has one; files without one are left out."""
    rules: tuple[Callable[[str], str], ...] = (
        lambda name: match[1] if (match := SHARD.match(name)) else "",
        lambda name: _keyword(name.rpartition("/")[0]),
        lambda name: _keyword(name.rpartition("/")[2]),
    )
    for rule in rules:
        splits: dict[str, list[str]] = {}
        for name in found:
            if split := rule(name):
                splits.setdefault(split, []).append(name)
        if splits:
            return splits
    return {}


def _keyword(name: str) -> str:
    for split, words in KEYWORDS.items():
        if re.search(rf"(?:^|[-._ 0-9/])(?:{'|'.join(words)})(?:[-._ 0-9/]|$)", name):
            return split
    return ""


def _declared_splits(folder: str, found: Sequence[str], readme: str) -> dict[str, list[str]] | None:
    """Split -> files as the README's head says; none where it says nothing.  Of several configs the default one."""
    configs = [c for c in _head(readme).get("configs") or () if isinstance(c, Mapping) and c.get("data_files")]
    if not configs:
        return None
    names = [str(c.get("config_name", "default")) for c in configs]
    chosen = [c for c, name in zip(configs, names, strict=True) if len(configs) == 1 or c.get("default") or name == "default"]
    if not chosen:
        raise UserError(f"data: {folder} holds the configs {', '.join(names)}; name the files of one: {folder}/...")
    declared = chosen[0]["data_files"]
    if not isinstance(declared, list) or not all(isinstance(entry, Mapping) for entry in declared):
        declared = [{"split": "train", "path": declared}]
    splits: dict[str, list[str]] = {}
    for entry in declared:
        given = entry.get("path") or ()
        patterns = [given] if isinstance(given, str) else list(given)
        splits[str(entry.get("split", "train"))] = [n for n in found if any(fnmatch.fnmatch(n, str(p)) for p in patterns)]
    return {name: files for name, files in splits.items() if files} or None


def _head(readme: str) -> Mapping[str, Any]:
    """The YAML between the first two lines of dashes of a dataset's card."""
    parts = re.split(r"^---\s*$", readme, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    import yaml  # type: ignore[import-untyped]

    try:
        head = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return head if isinstance(head, Mapping) else {}
