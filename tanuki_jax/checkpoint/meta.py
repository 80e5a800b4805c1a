"""The `meta` of a checkpoint: what is saved beside its arrays, as JSON."""

from __future__ import annotations

from typing import TypedDict

from tanuki_jax.config import STAGE_KINDS


class AdapterMeta(TypedDict):
    """What a checkpoint of adapters says of them and of the checkpoint that they lie on."""

    base: str  # the directory of one step; within one workdir relative to the adapters' stage
    base_fingerprint: str  # of the base's meta
    ranks: dict[str, int]  # by the path of the adapted matrix
    scales: dict[str, list[float]]  # by path, one per layer


class StageRecord(TypedDict):
    """A stage as the resolved recipe has it: those of its keys that are read back."""

    kind: str
    init_from: str
    seq_len: int
    tokens: int
    steps: int
    epochs: float
    gradient_accumulation_steps: int
    mixture: dict[str, list[float]]


class RecipeRecord(TypedDict, total=False):
    """The resolved recipe: those of its keys that are read back."""

    name: str
    stages: dict[str, StageRecord]


class Published(TypedDict, total=False):
    """What came beside the weights of an imported model."""

    config: dict[str, object]  # config.json
    generation: dict[str, object]  # generation_config.json, empty where there is none


class Meta(TypedDict, total=False):
    """Everything that a checkpoint's meta can hold; one that is saved has at least the model."""

    step: int
    stage: str
    model: dict[str, object]  # its architecture
    recipe: RecipeRecord  # of the run that saved it
    data_fingerprint: str  # empty where nothing was trained
    mesh: dict[str, int]
    id: str  # of what came from files: a new one each time
    adapter: AdapterMeta
    upcycle: dict[str, object]  # options, seed and source
    huggingface: str  # the directory of an imported model
    longest: int  # of its rows, in tokens, as its publisher says
    published: Published
    cast: list[str]  # dtypes from which an import cast the weights


def lineage(meta: Meta) -> dict[str, StageRecord]:
    """The stages of the recipe that a checkpoint's weights went through: its own and its ancestors, in order."""
    stages = meta["recipe"].get("stages", {}) if "recipe" in meta else {}
    name, names = meta.get("stage", ""), list[str]()
    while name in stages and name not in names:
        names.append(name)
        name = stages[name]["init_from"]
    return {name: stages[name] for name in reversed(names)} if names else stages


def max_seq_len(meta: Meta) -> int:
    """The longest row that a model was trained on, here or before, or that its publisher names; 2048 where it is not known."""
    without_rows = {name for name, kind in STAGE_KINDS.items() if not kind.trains}
    lengths = [stage["seq_len"] for stage in lineage(meta).values() if stage["kind"] not in without_rows]
    return max([*lengths, meta.get("longest") or 0]) or 2048


def inherited_meta(meta: Meta) -> Meta:
    """The part of a meta that goes over to whatever is made from the checkpoint."""
    inherited: Meta = {"longest": max_seq_len(meta)}
    if "huggingface" in meta:
        inherited["huggingface"] = meta["huggingface"]
    if "published" in meta:
        inherited["published"] = meta["published"]
    return inherited


def without_adapter(meta: Meta) -> Meta:
    """The meta of the merged model."""
    merged = meta.copy()
    merged.pop("adapter", None)
    return merged
