"""The files of a folder that holds a dataset.  Of several splits `train` is read, and a line says so."""

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

# The names of files and folders by which Hugging Face datasets recognizes splits.
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"data/(\w+)-\d{5}-of-\d{5}[^/]*$")  # as push_to_hub names them
CLONE_NAMES = (
    ".git",
    ".gitattributes",
    "README.md",
    "data",
)  # of a clone of a dataset's repository


def expand(path: str) -> list[str]:
    """The files of a folder that Hugging Face datasets or TFDS wrote; a file is returned as it is."""
    if not paths.is_directory(path):
        return [path]
    if formats.is_tfds(path):
        _warn_of_splits(path)
        return [path]
    folder = path.rstrip("/")
    try:
        if paths.exists(f"{folder}/dataset_dict.json"):
            splits = paths.read_json(f"{folder}/dataset_dict.json")["splits"]
            split = "train" if "train" in splits else splits[0]
            others = ", ".join(name for name in splits if name != split)
            paths.warn(f"data: {folder}: split {split}{'; not read: ' if others else ''}{others}")
            folder = f"{folder}/{split}"
        if paths.exists(f"{folder}/state.json"):
            files = [f"{folder}/{entry['filename']}" for entry in paths.read_json(f"{folder}/state.json")["_data_files"]]
            for file in files:
                if not paths.exists(file):
                    raise UserError(f"data: {file} is missing from the dataset in {path}; save it again")
            return files
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"data: {folder} is not a whole dataset of Hugging Face's ({error!r}); save it again") from error
    return _files_of(folder) or [path]


def _files_of(folder: str) -> list[str]:
    """The files of the split train of a folder, or all where no name is a split's; none where it is no dataset's folder."""
    suffixes = [suffix for suffix in formats.SUFFIXES if suffix != ".bin"]
    if paths.is_url(folder):
        urls = sorted({url for suffix in suffixes for url in paths.glob_files(f"{folder}/**/*{suffix}")})
        inner = folder.rpartition("://")[2] + "/"
        names, is_dataset = [url[url.index(inner) + len(inner) :] for url in urls], True
    else:
        names = [
            str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.name.endswith(tuple(suffixes)) and p.is_file()
        ]
        is_dataset = any((Path(folder) / name).exists() for name in CLONE_NAMES) or any(n.endswith(".parquet") for n in names)
    readme = ""
    if paths.exists(f"{folder}/README.md"):
        with paths.open_file(f"{folder}/README.md") as f:
            readme = f.read().decode("utf-8", "replace")
    return [f"{folder}/{name}" for name in _train_files(folder, names, readme, is_dataset, suffixes)]


def _warn_of_splits(path: str) -> None:
    """Says which splits of a TFDS folder are read; a folder without its description is left to the reader to refuse."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        splits = [entry["name"] for entry in paths.read_json(f"{path}/dataset_info.json")["splits"]]
        others = ", ".join(name for name in splits if name != "train")
        if "train" in splits:
            paths.warn(f"data: {path}: split train{'; not read: ' if others else ''}{others}")
        elif len(splits) > 1:
            paths.warn(f"data: {path}: no split train; all are read: {others}")


def _train_files(folder: str, names: Sequence[str], readme: str, is_dataset: bool, suffixes: Collection[str]) -> list[str]:
    """The files of a folder (a clone of a dataset's repository, say) that datasets would read as its split `train`.

    The README may name them; else the names of folders and files decide.

    Args:
      names: relative to the folder; hidden ones are left out.
      is_dataset: whether the folder is surely a dataset's; of another one nothing is read unless a name in it is a split's.
    """
    names = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
    splits, other_formats = _declared_splits(folder, names, readme), ""
    if splits is None:
        names, other_formats = _of_one_format(names, suffixes)
        splits = _named_splits(names)
        if not names or not (is_dataset or splits or other_formats):
            return []
    if not splits:
        total = f"all {len(names)} files are read{other_formats}"
        paths.warn(f"data: {folder}: no name of a file or folder in it is a split's; {total}")
        return names
    if "train" not in splits:
        raise UserError(
            f"data: {folder} has no split train, only {', '.join(splits)}; name the files that you want, {folder}/{names[0]} "
            "for example"
        )
    others = ", ".join(f"{name} ({len(files)})" for name, files in splits.items() if name != "train")
    files = splits["train"]
    paths.warn(f"data: {folder}: split train, {len(files)} files{'; not read: ' if others else ''}{others}{other_formats}")
    return files


def _of_one_format(names: Sequence[str], suffixes: Collection[str]) -> tuple[list[str], str]:
    """The files of the commonest format, and a message about the others: a repository may hold the same rows twice."""
    formats = {name: max((s for s in suffixes if name.endswith(s)), key=len) for name in names}
    count = collections.Counter(formats.values())
    if len(count) < 2:
        return list(names), ""
    commonest = max(count, key=lambda suffix: (count[suffix], suffix == ".parquet"))
    others = ", ".join(f"{n} {suffix}" for suffix, n in count.items() if suffix != commonest)
    return [name for name in names if formats[name] == commonest], f"; of another format, and not read: {others}"


def _named_splits(names: Sequence[str]) -> dict[str, list[str]]:
    """Split -> files, by the first of datasets' rules that gives any file a split; files without one are left out."""
    rules: tuple[Callable[[str], str], ...] = (
        lambda name: match[1] if (match := SHARD.match(name)) else "",
        lambda name: _keyword(name.rpartition("/")[0]),
        lambda name: _keyword(name.rpartition("/")[2]),
    )
    for rule in rules:
        splits: dict[str, list[str]] = {}
        for name in names:
            split = rule(name)
            if split:
                splits.setdefault(split, []).append(name)
        if splits:
            return splits
    return {}


def _keyword(name: str) -> str:
    """The split whose keyword is in a name; empty where there is none."""
    for split, words in KEYWORDS.items():
        if re.search(rf"(?:^|[-._ 0-9/])(?:{'|'.join(words)})(?:[-._ 0-9/]|$)", name):
            return split
    return ""


def _declared_splits(folder: str, names: Sequence[str], readme: str) -> dict[str, list[str]] | None:
    """Split -> files as the README's front matter says; None where it says nothing.  Of several configs the default one."""
    configs = [c for c in _front_matter(readme).get("configs") or () if isinstance(c, Mapping) and c.get("data_files")]
    if not configs:
        return None
    config_names = [str(c.get("config_name", "default")) for c in configs]
    named = zip(configs, config_names, strict=True)
    chosen = [c for c, name in named if len(configs) == 1 or c.get("default") or name == "default"]
    if not chosen:
        raise UserError(f"data: {folder} holds the configs {', '.join(config_names)}; name the files of one: {folder}/...")
    declared = chosen[0]["data_files"]
    if not isinstance(declared, list) or not all(isinstance(entry, Mapping) for entry in declared):
        declared = [{"split": "train", "path": declared}]
    splits: dict[str, list[str]] = {}
    for entry in declared:
        path = entry.get("path") or ()
        patterns = [path] if isinstance(path, str) else list(path)
        splits[str(entry.get("split", "train"))] = [n for n in names if any(fnmatch.fnmatch(n, str(p)) for p in patterns)]
    return {name: files for name, files in splits.items() if files} or None


def _front_matter(readme: str) -> Mapping[str, Any]:
    """The YAML between the first two lines of dashes of a dataset card."""
    parts = re.split(r"^---\s*$", readme, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    import yaml  # type: ignore[import-untyped]

    try:
        metadata = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, Mapping) else {}
