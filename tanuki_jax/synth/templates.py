"""Templates of what models are asked: ours (prompts/*.toml), or a user's file in place of some or all of them.

A file has tables [LANGUAGE.METHOD] with one text per step.  {field} is filled in, {{ and }} stand for braces; whatever is filled
in stays as it is, braces included.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from pathlib import Path
from string import Formatter
from typing import Any

from tanuki_jax.errors import UserError

# Steps of each method -> the fields that their template may use, and must.
STEPS: Mapping[str, Mapping[str, tuple[Collection[str], Collection[str]]]] = {
    "answer": {},
    "persona": {
        "question": (("persona", "task"), ("persona", "task")),
        "follow_up": (("conversation", "persona", "task"), ("conversation",)),
    },
    "topic": {
        "question": (("topic", "category"), ("topic",)),
        "follow_up": (("conversation", "topic", "category"), ("conversation",)),
    },
    "rewrite": {"*": (("document",), ("document",))},  # * = steps of any name: a file may add its own
    "magpie": {"prefix": ((), ()), "stop": ((), ())},
    "evol": {"*": (("prompt",), ("prompt",))},
    "preferences": {"system": ((), ()), "judge": (("question", "answer_a", "answer_b"), ("question", "answer_a", "answer_b"))},
}
# FastChat's judge prompts that are used, with the fields that each may have.
PAIR, MULTI_TURN = "pair-v2", "pair-v2-multi-turn"
JUDGES: Mapping[str, tuple[str, ...]] = {
    PAIR: ("question", "answer_a", "answer_b"),
    MULTI_TURN: ("question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"),
}


@dataclass(frozen=True)
class Templates:
    """The texts of one method in one language; `version` changes where any of them does."""

    texts: Mapping[str, str]
    version: str

    def render(self, step: str, **values: str) -> str:
        """The text of a step with its fields filled in."""
        return fill(self.texts[step], values)


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with {field} replaced by its value, as it stands."""
    return "".join(text + (values[name] if name is not None else "") for text, name, _, _ in Formatter().parse(template))


def load(method: str, language: str, path: str = "") -> Templates:
    """The templates of a method, those of the file at `path` in place of ours.

    A .jsonl is a file of judge prompts as FastChat has them: of its lines `pair-v2` and `pair-v2-multi-turn` are used.
    """
    if method == "preferences" and path.endswith(".jsonl"):
        return _with_version(_read_judges(path))
    folder = resources.files("tanuki_jax.synth") / "prompts"
    texts = dict(_texts(tomllib.loads((folder / f"{language}.toml").read_text(encoding="utf-8")), method, language, "ours"))
    if path:
        texts |= _texts(_read_toml(path), method, language, path)
    for step in STEPS[method]:
        if step != "*" and step not in texts:
            raise UserError(f"synth: templates: [{language}.{method}] has no {step!r}")
    return _with_version(texts)


def _with_version(texts: Mapping[str, str]) -> Templates:
    return Templates(texts, sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:12])


def _read_toml(path: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(_read(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"synth: templates {path} is not TOML: {error}") from error


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"synth: templates {path} cannot be read: {reason}") from error


def _texts(document: Mapping[str, Any], method: str, language: str, path: str) -> Mapping[str, str]:
    """The checked texts of one table of a file; every other table is looked at, too, for names that nothing reads."""
    if not document:
        raise UserError(f"synth: templates {path} is empty; texts are in [ja.METHOD] and [en.METHOD]")
    for tag, methods in document.items():
        if tag not in ("ja", "en"):
            raise UserError(f"synth: templates {path}: [{tag}]: no such language; texts are in [ja.METHOD] and [en.METHOD]")
        if not isinstance(methods, Mapping):
            raise UserError(f"synth: templates {path}: {tag!r} is no table; texts are in [ja.METHOD] and [en.METHOD]")
        for name in methods:
            if name not in STEPS:
                raise UserError(f"synth: templates {path}: [{tag}.{name}]: no such method; there is {', '.join(STEPS)}")
    table = document.get(language, {}).get(method, {})
    for step, text in table.items():
        _check(step, text, method, f"synth: templates {path}: [{language}.{method}] {step}")
    return {step: text for step, text in table.items()}


def _check(step: str, text: object, method: str, where: str) -> None:
    steps = STEPS[method]
    if step not in steps and "*" not in steps:
        raise UserError(f"{where}: no such step; there is {', '.join(steps) or 'none, the prompts are asked as they are'}")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} must be text")
    allowed, needed = steps.get(step, steps.get("*", ((), ())))
    present = check_fields(text, allowed, where)
    for name in needed:
        if name not in present:
            raise UserError(f"{where} has no {{{name}}}; without it the model is not told what it is about")


def check_fields(text: str, allowed: Collection[str], where: str) -> set[str]:
    """The fields of a template; one that is not allowed is an error."""
    options = ", ".join(f"{{{name}}}" for name in allowed) or "none"
    names = set()
    try:
        for _, name, spec, conversion in Formatter().parse(text):
            if name is None:
                continue
            if name in allowed and (spec or conversion):
                raise UserError(f"{where}: {{{name}}} stands alone between its braces, without ! and :")
            if name not in allowed:
                raise UserError(
                    f"{where}: unknown field {{{name}}}; it may have {options}, and a brace is written {{{{ or }}}}"
                )
            names.add(name)
    except ValueError as error:
        raise UserError(f"{where}: {error}; fields are {options}, and a brace is written {{{{ or }}}}") from error
    return names


def _read_judges(path: str) -> Mapping[str, str]:
    """System and prompt texts of FastChat's pair prompts in a file, by their names."""
    texts: dict[str, str] = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        where = f"synth: templates {path}:{number}"
        try:
            record = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict) or record.get("name") not in JUDGES:
            continue
        name = record["name"]
        for field in ("system_prompt", "prompt_template"):
            if not isinstance(record.get(field), str):
                raise UserError(f"{where}: {name} has no text in {field!r}")
        present = check_fields(record["prompt_template"], JUDGES[name], f"{where}: {name}: prompt_template")
        if missing := [field for field in JUDGES[name] if field not in present]:
            raise UserError(f"{where}: {name}: prompt_template has no {{{missing[0]}}}")
        texts |= {f"{name} system": record["system_prompt"], name: record["prompt_template"]}
    if PAIR not in texts:
        raise UserError(
            f"synth: templates {path} has no judge prompt of the name {PAIR}; FastChat's judge_prompts.jsonl has one"
        )
    return texts
