"""What a recipe leaves out is the checkpoint's that a stage starts from, and what it sets must be what that has."""

import copy
import json

import pytest
from ml_collections import ConfigDict

from tanuki_jax import config
from tanuki_jax.config.checkpoint_paths import locate
from tanuki_jax.errors import UserError

SHAPE = dict(vocab_size=512, n_layers=2, d_model=32, d_ff=64, n_heads=4, n_kv_heads=2, head_dim=8)
DENSE = dict(SHAPE, rope_theta=5e5, norm_eps=1e-6, qk_norm=True)
EXPERTS = dict(n_experts=4, top_k=3, normalized_gate=False, gate_scale=1.5, router_bias=True)
ROW = dict(mixture=dict(talk=(1.0,)), steps=1)


def written(home, tokenizer='{"model": 1}', **shape):
    """What of a checkpoint is looked at: the meta of its newest step, and its tokenizer."""
    (home / "checkpoints/3/meta").mkdir(parents=True)
    (home / "checkpoints/2/meta").mkdir(parents=True)
    meta = {"model": config.to_dict(config.Model(**{**DENSE, **shape}))}
    (home / "checkpoints/3/meta/metadata").write_text(json.dumps(meta))
    if tokenizer:
        (home / "tokenizer").mkdir()
        (home / "tokenizer/tokenizer.json").write_text(tokenizer)
    return home


def recipe(init_from, options=(), **model):
    """A config whose first stage starts from a directory; nothing of the model is set but what is given."""
    c = config.recipe(data=dict(talk="talk.jsonl"))
    c.model.update(model)
    c.stages.sft = config.stage("sft", init_from=str(init_from), **ROW, **dict(options))
    c.stages.dpo = config.stage("dpo", init_from="sft", **ROW)
    return c


def message(c):
    with pytest.raises(UserError) as error:
        config.resolve(c)
    assert "\n" not in str(error.value)
    return str(error.value)


def brought(made, keys):
    return {key: getattr(made.model, key) for key in keys}


# --- left out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "checkpoints/3"])
def test_what_is_left_out_is_the_checkpoints_own(place, tmp_path):
    home = written(tmp_path / "dense")
    made = config.resolve(recipe(home / place))
    assert brought(made, DENSE) == DENSE
    assert made.tokenizer.path == str(home / "tokenizer")
    assert [config.model_config(made, name).rope_theta for name in made.stages] == [5e5, 5e5]
    rest = set(config.to_dict(config.Model())) - set(DENSE)
    assert brought(made, rest) == brought(config.Recipe(), rest)
    assert config.resolve(config.to_dict(made)) == made  # as it is stored


def test_a_mixture_brings_its_experts_and_its_gate(tmp_path):
    made = config.resolve(recipe(written(tmp_path / "mixture", **EXPERTS)))
    assert brought(made, EXPERTS) == EXPERTS and made.stages["sft"].moe
    assert [config.model_config(made, name).n_experts for name in made.stages] == [4, 4]
    assert config.resolve(config.to_dict(made)) == made


def test_a_dense_checkpoint_leaves_the_mixture_to_the_recipe(tmp_path):
    c = config.recipe(data=dict(talk="talk.jsonl"), model=dict(n_experts=8, top_k=3))
    c.stages.up = config.stage("upcycle", init_from=str(written(tmp_path / "dense")))
    made = config.resolve(c)
    assert brought(made, DENSE) == DENSE and (made.model.n_experts, made.model.top_k) == (8, 3)


def test_a_recipe_without_a_directory_has_the_defaults():
    c = config.recipe(data=dict(talk="talk.jsonl"))
    c.stages.one = config.stage("pretrain", **ROW)
    made = config.resolve(c)
    assert made.model == config.Model() and made.tokenizer == config.Tokenizer()


def test_what_is_set_is_known_in_copies_too(tmp_path):
    """Also where it is set to what it was; what another config has left out stays left out."""
    c = recipe(written(tmp_path / "dense"))
    assert c.model.d_ff // 2 == 7168 and c.model.rope_theta == 1e4  # defaults can be read
    assert brought(config.resolve(copy.deepcopy(c)), DENSE) == DENSE
    c.model.update(config.recipe(model=dict(n_heads=4)).model)
    c.update(dict(model=dict(n_layers=2)))
    assert brought(config.resolve(c), DENSE) == DENSE and c.model.left_out().isdisjoint({"n_heads", "n_layers"})
    c.model.d_ff = c.model.d_ff
    for copied in (c, copy.deepcopy(c)):
        found = message(copied)
        assert "d_ff 64 (here 14336)" in found and "d_model" not in found
    assert "d_ff 64 (here 14336)" in message(c.copy_and_resolve_references())  # of which all is taken for set
    with pytest.raises(TypeError, match="d_model"):
        c.model.d_model = "wide"
    for given in (dict(n_heads=4), ConfigDict(dict(n_heads=4)), config.recipe(model=dict(n_heads=4)).model):
        c = recipe(tmp_path / "dense")
        c.model = given
        assert brought(config.resolve(c), DENSE) == DENSE and "n_heads" not in c.model.left_out()
        c.model.d_ff = 65
        assert "d_ff 64 (here 65)" in message(c)


def test_a_flag_sets_a_key_and_leaves_the_others_out(tmp_path):
    home = written(tmp_path / "dense")
    file = tmp_path / "mine.py"
    file.write_text(
        "from tanuki_jax import config\n\ndef get_config():\n    c = config.recipe(data=dict(talk='talk.jsonl'))\n"
        f"    c.stages.one = config.stage('sft', init_from={str(home)!r}, mixture=dict(talk=(1.0,)), steps=1)\n    return c\n"
    )
    made = config.load([f"--config={file}", "--config.model.d_ff=64", "--config.compute.remat=full"])
    assert brought(made, DENSE) == DENSE and made.compute.remat == "full"
    with pytest.raises(UserError, match=r"d_ff 64 \(here 65\).*model.d_ff"):
        config.load([f"--config={file}", "--config.model.d_ff=65"])


# --- set otherwise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", DENSE)
def test_a_key_that_is_set_to_another_value_is_told_with_both(key, tmp_path):
    other = {"qk_norm": False, "rope_theta": 1e4, "norm_eps": 1e-5}.get(key, 2 * DENSE[key])
    found = message(recipe(written(tmp_path / "dense"), **{key: other}))
    assert f"{key} {DENSE[key]} (here {other})" in found and f"leave model.{key} out" in found
    assert "stages.sft.init_from" in found and str(tmp_path / "dense") in found
    config.resolve(recipe(tmp_path / "dense", **{key: DENSE[key]}))


def test_a_stage_says_that_another_rotary_base_is_meant(tmp_path):
    home = written(tmp_path / "dense")
    assert "stages.sft.rope_theta" in message(recipe(home, rope_theta=1e4))
    made = config.resolve(recipe(home, dict(rope_theta=8e6), rope_theta=1e4))
    assert config.model_config(made, "sft").rope_theta == 8e6
    assert config.model_config(config.resolve(recipe(home, dict(rope_theta=8e6))), "dpo").rope_theta == 8e6


MIXTURES = {
    "other experts": (EXPERTS, dict(n_experts=8), dict(moe=True), ["n_experts 4 (here 8)", "model.n_experts"]),
    "another gate": (EXPERTS, dict(top_k=2), {}, ["top_k 3 (here 2)", "model.top_k"]),
    "not said to be one": (EXPERTS, dict(n_experts=4), {}, ["n_experts 4 (here 0)", "moe"]),
    "none": ({}, dict(n_experts=4), dict(moe=True), ["n_experts 0 (here 4)", "moe"]),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_another_mixture_is_told(case, tmp_path):
    shape, model, options, words = MIXTURES[case]
    found = message(recipe(written(tmp_path / "other", **shape), options, **model))
    assert all(word in found for word in words), found


def test_two_checkpoints_of_one_recipe_have_one_shape_and_one_tokenizer(tmp_path):
    c = config.recipe(data=dict(talk="talk.jsonl"))
    for name, shape in (("a", {}), ("b", dict(rope_theta=1e6)), ("c", dict(n_layers=3))):
        c.stages[name] = config.stage("sft", init_from=str(written(tmp_path / name, **shape)), **ROW)
    assert "stages.b.init_from" in message(c) and "rope_theta 1000000.0 (here 500000.0)" in message(c)
    c.stages.b.rope_theta = 1e6
    assert "stages.c.init_from" in message(c) and "n_layers 3 (here 2); an earlier stage" in message(c)
    del c.stages["c"]
    config.resolve(c)
    (tmp_path / "b/tokenizer/tokenizer.json").write_text('{"model": 2}')
    assert "stages.b.init_from" in message(c) and str(tmp_path / "a/tokenizer") in message(c)


def test_another_tokenizer_is_told_with_both(tmp_path):
    home, other = written(tmp_path / "dense"), written(tmp_path / "other", '{"model": 2}') / "tokenizer"
    c = recipe(home)
    c.tokenizer.path = str(other)
    found = message(c)
    assert all(word in found for word in ("tokenizer.path", str(other), str(home / "tokenizer"), "fingerprint", "init_from"))
    # The same ids, however they are written; the template may be another one.
    (other / "tokenizer.json").write_text('{"truncation": null,\n "model": 1}')
    (other / "chat_template.jinja").write_text("{{ messages }}")
    assert config.resolve(c).tokenizer.path == str(other)


def test_a_tokenizer_is_never_trained_for_a_checkpoint_that_has_lost_its_own(tmp_path):
    c = recipe(written(tmp_path / "dense", tokenizer=""))
    assert "has no tokenizer; set tokenizer.path" in message(c)
    c.tokenizer.path = "somewhere"
    assert config.resolve(c).tokenizer.path == "somewhere"


# --- what is no checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "words"), [("config.json", ["Hugging Face"]), ("adapter_config.json", ["PEFT", "--base="])])
def test_files_of_others_are_to_be_imported_first(file, words, tmp_path):
    home = tmp_path / "theirs"
    home.mkdir()
    (home / file).write_text("{}")
    found = message(recipe(home))
    assert all(word in found for word in ("stages.sft.init_from", f"tanuki import --hf={home}", "--output=", *words))


@pytest.mark.parametrize("meta", ["{", "[]", '{"model": 3}'])
def test_what_is_no_checkpoint_is_one_message(meta, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no checkpoints/<step>" in message(recipe(tmp_path / "empty"))
    home = written(tmp_path / "damaged")
    (home / "checkpoints/3/meta/metadata").write_text(meta)
    assert str(home) in message(recipe(home)) and "damaged" in message(recipe(home))


def test_a_path_may_lead_up_and_down_again(tmp_path, monkeypatch):
    home = written(tmp_path / "dense")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert locate("../dense") == (home, 3) == locate("../here/../dense/checkpoints/3")
    assert config.resolve(recipe("../dense")).tokenizer.path == str(home / "tokenizer")
