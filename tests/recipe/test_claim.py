"""Which workdir belongs to which recipe, and what may differ where a run goes on."""

import dataclasses
import json
import re

import pytest

from tanuki_jax import config
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import claim
from tanuki_jax.recipe.workdir import Workdir
from tests.config.golden.__main__ import DOCS, keys


def two_stages(stage="pretrain", source="ja", group="sft"):
    """A recipe in which the user chose all names, as it lies in recipe.json."""
    c = config.recipe(data={source: "a.txt", "b": "b.txt", "talks": "t.jsonl"})
    c.filters.NAME, c.endpoints.NAME = config.filters(), config.endpoint("http://127.0.0.1:8000/v1")
    c.synth.NAME = config.synth("answer", seeds=dict(prompts="prompts.jsonl"), generator="NAME")
    c.stages[stage] = config.stage("pretrain", mixture={source: (0.5,), "b": (0.5,)}, steps=2)
    c.stages[group] = config.stage("sft", init_from=stage, mixture=dict(talks=(1.0,)), steps=2)
    return json.loads(json.dumps(config.to_dict(config.resolve(c))))


KEYS_OF = [("stages.NAME.", config.Stage), ("", config.Recipe), ("model.", config.Model), ("compute.", config.Compute)]
RESUMABLE = [f"{where}{f.name}" for where, kind in KEYS_OF for f in dataclasses.fields(kind) if f.metadata["resumable"]]


@pytest.mark.parametrize(
    "name", sorted({path.rsplit(".", 1)[-1] for path in RESUMABLE} | {"data", "stages", "model", "optimizer"})
)
def test_no_name_of_a_users_own_keeps_a_difference_unseen(name):
    old, new = (two_stages(stage=name, source=name, group=f"{name}_") for _ in range(2))
    new["stages"][name]["steps"] = 7
    new["stages"][name]["optimizer"]["learning_rate"] = 1.0
    new["stages"][name]["mixture"][name] = [0.9]
    new["data"][name]["files"] = "other.txt"
    found = claim._differences(old, new)
    assert {line.split()[0] for line in found} == {
        *(f"stages.{name}.{key}" for key in ("steps", "optimizer.learning_rate", f"mixture.{name}")),
        f"data.{name}.files",
    }


def test_what_the_schema_calls_resumable_may_differ_and_nothing_else():
    for path, field in keys():
        path = path.replace("NAME", {"data": "ja", "stages": "pretrain"}.get(path.split(".")[0], "NAME"))
        old, new = two_stages(), two_stages()
        *groups, last = path.split(".")
        place, above = new, config.Recipe
        free = field.metadata["resumable"]
        for group in groups:
            place = place[group]
            if dataclasses.is_dataclass(above):
                inside = above.__dataclass_fields__[group]
                free, above = free or inside.metadata["resumable"], config.key_types(above)[group]
            else:
                above = above.__args__[1]
        dictionary = isinstance(place[last], dict)
        place[last] = {"else": 1} if dictionary else "other"
        found = claim._differences(old, new)
        assert (found == []) == free, path
        if dictionary and not free:
            assert f"{path}.else is new" in found
        elif not free:
            assert len(found) == 1 and found[0].startswith(f"{path} was ") and found[0].endswith(", is other")


def test_a_stage_or_source_that_is_new_or_gone_is_named():
    old, new = two_stages(), two_stages(group="talking")
    assert claim._differences(old, new) == ["stages.sft is gone", "stages.talking is new"]
    del new["data"]["b"]
    assert "data.b is gone" in claim._differences(old, new)


def test_the_page_lists_what_may_differ():
    page = re.sub(r"\s+", " ", DOCS.read_text(encoding="utf-8"))
    told = page.partition("(`resumable` in the schema): ")[2].partition(". ")[0]
    assert set(re.findall(r"`(?:\w+\.)*(\w+)`", told)) == {path.rsplit(".", 1)[-1] for path in RESUMABLE}


@pytest.mark.parametrize("stored", ["[]", "3", '{"stages": 3}', '{"modle": {}}', '{"seed": "a"}', '{"model": {"d_model": -1}}'])
def test_a_recipe_that_is_none_names_its_file(stored, tmp_path):
    (tmp_path / "recipe.json").write_text(stored)
    with pytest.raises(UserError, match="recipe.json") as error:
        claim.claim_workdir(config.from_dict(config.Recipe, two_stages()), Workdir(tmp_path))
    assert "\n" not in str(error.value)
