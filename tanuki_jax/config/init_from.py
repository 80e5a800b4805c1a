"""What the checkpoints outside a recipe that its stages start from bring to it: their model and their tokenizer.

A recipe has one model and one tokenizer.  What it leaves out of them is the checkpoint's own; what it sets must be what the
checkpoint has, for weights mean nothing in another shape, at other rotary positions or under another tokenizer's ids.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from tanuki_jax import files
from tanuki_jax.config.checkpoint_paths import checkpoints_directory, locate, meta_file
from tanuki_jax.config.derived import is_moe
from tanuki_jax.config.kinds import STAGE_KINDS
from tanuki_jax.config.schema import MOE_KEYS, Recipe
from tanuki_jax.errors import UserError

# Keys of a model that come with its weights, beside those of a mixture.
SHAPE = (
    *("vocab_size", "n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim"),
    *("norm_eps", "qk_norm", "rope_theta"),
)


def inherit(recipe: Recipe, left_out: Collection[str]) -> Recipe:
    """The recipe with what it leaves out as its starting checkpoints have it; an error where they differ from what it sets.

    Args:
      left_out: keys of the model that the config does not set; no `tokenizer.path` leaves that out.
    """
    unset = set(left_out)  # and not settled by a checkpoint yet
    for name, key, path in _external_checkpoints(recipe):
        where = f"config: stages.{name}.{key} {path}"
        _refuse_published(where, path)
        stage_dir, step = locate(path)
        meta = files.read_json(meta_file(stage_dir, step))
        brought = meta.get("model") if isinstance(meta, dict) else None
        if not isinstance(brought, dict):
            raise UserError(f"{where} has no model in its meta; it is damaged, or no checkpoint of this project")
        recipe = _with_model(recipe, name, brought, unset, left_out, where)
        recipe = _with_tokenizer(recipe, stage_dir / "tokenizer", where)
    return recipe


def _external_checkpoints(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Stage, key and path of every directory, other than a stage's own, that a stage takes weights from."""
    for name, stage in recipe.stages.items():
        if stage.init_from and stage.init_from not in recipe.stages and Path(stage.init_from).is_dir():
            yield name, "init_from", stage.init_from
        for path in stage.upcycle.experts_from if STAGE_KINDS[stage.kind].makes_moe else ():
            if path not in recipe.stages and checkpoints_directory(Path(path)).is_dir():
                yield name, "upcycle.experts_from", path


def _refuse_published(where: str, path: str) -> None:
    kinds = (("adapter_config.json", "PEFT's adapters", " --base=CHECKPOINT"), ("config.json", "a Hugging Face model", ""))
    for file, content, flag in kinds:
        if (Path(path) / file).is_file() and not checkpoints_directory(Path(path)).is_dir():
            output = f"{path.rstrip('/')}-imported"
            raise UserError(
                f"{where} holds {content}; run `tanuki import --hf={path}{flag} --output={output}` first, and start from "
                f"{output}"
            )


def _with_model(
    recipe: Recipe, name: str, brought: dict[str, Any], unset: set[str], left_out: Collection[str], where: str
) -> Recipe:
    """The recipe with a checkpoint's shape in `unset`, which loses what is settled now."""
    stage = recipe.stages[name]
    mixture = brought.get("n_experts", 0) > 0
    if mixture and not STAGE_KINDS[stage.kind].makes_moe and "n_experts" in left_out:
        stages = recipe.stages | {name: dataclasses.replace(stage, moe=True)}
        recipe = dataclasses.replace(recipe, stages=stages)
    keys = [*SHAPE, *(("n_experts", *MOE_KEYS) if mixture else ())]
    theirs = {key: brought[key] for key in keys if key in brought}  # keys added since have their defaults
    filled = {key: value for key, value in theirs.items() if key in unset}
    unset.difference_update(filled)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **filled))
    ours = {key: getattr(recipe.model, key) for key in theirs} | {"n_experts": recipe.model.n_experts}
    if not is_moe(recipe, name) or STAGE_KINDS[stage.kind].makes_moe:
        ours["n_experts"] = 0
    theirs["n_experts"] = brought.get("n_experts", 0)
    if stage.rope_theta:  # which says that a change is meant
        theirs.pop("rope_theta", None)
    differing = {key: value for key, value in theirs.items() if value != ours[key]}
    if differing:
        raise UserError(f"{where} is of another architecture: {_difference(name, differing, ours, left_out)}")
    return recipe


def _difference(name: str, theirs: dict[str, Any], ours: dict[str, Any], left_out: Collection[str]) -> str:
    """What differs, with both values, and the fix."""
    values = ", ".join(f"{key} {value} (here {ours[key]})" for key, value in theirs.items())
    if bool(theirs.get("n_experts")) != bool(ours["n_experts"]) and "n_experts" in theirs:
        fix = f"stages.{name}.moe says whether a directory holds a mixture"
    elif set(theirs) <= set(left_out):
        fix = "an earlier stage starts from a checkpoint that has the other, and a recipe has one model"
    else:
        fix = f"leave {', '.join(f'model.{key}' for key in theirs)} out: what a config leaves out is the checkpoint's own"
    meant = f", or set stages.{name}.rope_theta if the change is meant" if "rope_theta" in theirs else ""
    return f"{values}; {fix}{meant}"


def _with_tokenizer(recipe: Recipe, theirs: Path, where: str) -> Recipe:
    """The recipe with the checkpoint's tokenizer where it names none; an error where its own gives other ids.

    The template may be another one: a model that was never trained on conversations has none.
    """
    path = recipe.tokenizer.path
    if not (theirs / "tokenizer.json").is_file():
        if path:
            return recipe
        raise UserError(f"{where} has no tokenizer; set tokenizer.path to the directory of the one that it was trained with")
    if not path:
        return dataclasses.replace(recipe, tokenizer=dataclasses.replace(recipe.tokenizer, path=str(theirs)))
    ours = Path(path)
    if (ours / "tokenizer.json").is_file() and not _same_ids(ours / "tokenizer.json", theirs / "tokenizer.json"):
        ours_shown, theirs_shown = (f"{d} (fingerprint {files.fingerprint(d / 'tokenizer.json')})" for d in (ours, theirs))
        raise UserError(
            f"{where} was trained with the tokenizer {theirs_shown}, tokenizer.path is {ours_shown}; leave tokenizer.path out, "
            "which then is the checkpoint's own"
        )
    return recipe


def _same_ids(first: Path, second: Path) -> bool:
    """Whether two tokenizer.json say the same, however they are written."""
    if first.read_bytes() == second.read_bytes():
        return True
    try:
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in (first, second)]
    except ValueError:
        return False
    if not all(isinstance(content, dict) for content in contents):
        return False
    a, b = ({k: v for k, v in content.items() if k not in ("truncation", "padding")} for content in contents)
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
