import dataclasses
import json
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax import config
from tanuki_jax.config import schema
from tanuki_jax.errors import UserError
from tests import tiny_recipe
from tests.config.golden.__main__ import CONFIGS, HERE, KEYS, NAMED, golden, keys, resolved

ANEW = "if this is meant, run `python -m tests.config.golden` and read its diff"
ALL_KEYS = dict(keys())


def recipe():
    """A valid recipe with a stage of every kind, as the nested dict that resolve() reads back."""
    c = config.recipe(data=dict(ja="ja.txt", en="en.txt", talks="talks.jsonl", pairs="pairs.jsonl"))
    c.model.n_experts = 4
    c.filters.NAME, c.endpoints.NAME = config.filters(), config.endpoint("http://127.0.0.1:8000/v1")
    c.synth.NAME = config.synth("answer", seeds=dict(prompts="rules:prompts"), generator="NAME")
    c.stages.pretrain = config.stage("pretrain", mixture=dict(ja=(0.5,), en=(0.5,)), steps=3)
    c.stages.upcycle = config.stage("upcycle", init_from="pretrain")
    c.stages.sft = config.stage("sft", init_from="upcycle", mixture=dict(talks=(1.0,)), epochs=1.0)
    c.stages.dpo = config.stage("dpo", init_from="sft", mixture=dict(pairs=(1.0,)), steps=3)
    return config.to_dict(config.resolve(c))


def with_changes(**changes):
    """recipe() with values put in; a key is a path whose dots are double underscores."""
    values = recipe()
    for path, value in changes.items():
        *groups, last = path.split("__")
        place = values
        for group in groups:
            place = place[group]
        place[last] = value
    return values


def message(values):
    with pytest.raises(UserError) as error:
        config.resolve(values)
    assert "\n" not in str(error.value) and str(error.value).startswith("config: ")
    return str(error.value)


# --- the schema -----------------------------------------------------------------------------------------------------


def test_keys_are_frozen():
    assert KEYS.read_text(encoding="utf-8").splitlines() == list(ALL_KEYS), f"the config keys have changed; {ANEW}"


# What trains nothing: upcycling, the tokenizer, the making and filtering of data, the scoring of a finished stage.
NO_TRAINING = (
    "stages.NAME.upcycle.",
    "stages.NAME.synth",
    "tokenizer.",
    "rules.",
    "scoring.",
    "filters.",
    "endpoints.",
    "synth.",
)


def test_a_training_stage_sees_fewer_than_a_hundred_keys():
    assert len([name for name in ALL_KEYS if not name.startswith(NO_TRAINING)]) < 100


@pytest.mark.parametrize("name", ALL_KEYS)
def test_every_key_has_one_line_of_documentation(name):
    doc = ALL_KEYS[name].metadata["doc"]
    assert doc.strip() and "\n" not in doc


def test_choices_are_keys_of_the_schema():
    assert {part for name in ALL_KEYS for part in name.split(".")}.issuperset(config.CHOICES)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_resolve_to_their_golden_dumps(file):
    assert golden(file).is_file(), f"no dump of {file.name} yet; run `python -m tests.config.golden`"
    assert resolved(file) == json.loads(golden(file).read_text(encoding="utf-8")), ANEW


def test_every_golden_dump_has_its_config():
    assert {path.stem for path in HERE.glob("*.json")} == {file.stem for file in CONFIGS}, ANEW


# --- reading --------------------------------------------------------------------------------------------------------


def named(name):
    """The key of one source or one stage of the valid recipe."""
    return name.replace("NAME", {"data": "ja", "stages": "pretrain"}.get(name.split(".")[0], "NAME"))


def path_of(name):
    return named(name).replace(".", "__")


def kind_of(field):
    return typing.get_type_hints(next(c for c in SCHEMAS if field in dataclasses.fields(c)))[field.name]


SCHEMAS = [c for c in vars(schema).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
WRONG = {str: [3], int: ["3", 1.5, True], float: ["3", True], bool: [1, "yes"], tuple: ["abc", 3, (None,)], dict: [3, "a"]}
OTHER = {str: "else", int: 77, float: 0.77, bool: None, tuple: (7,), dict: {"else": (0.5,)}}


@pytest.mark.parametrize("name", ALL_KEYS)
def test_a_wrong_type_is_named_with_its_key(name):
    kind = kind_of(ALL_KEYS[name])
    for value in WRONG[typing.get_origin(kind) or kind]:
        found = message(with_changes(**{path_of(name): value}))
        assert named(name) in found and "must be" in found


@pytest.mark.parametrize("name", ALL_KEYS)
def test_a_misspelt_key_is_answered_with_the_right_one(name):
    found = message(with_changes(**{f"{path_of(name)}_": 1}))
    assert f"{named(name)}_" in found and f"did you mean {name.split('.')[-1]!r}?" in found


def test_a_key_like_no_other_is_answered_with_what_there_is():
    found = message(with_changes(mesh__zzzz=1))
    assert "mesh.zzzz" in found and "context, data, expert, fsdp, slices, tensor" in found


def test_a_misspelt_key_is_an_error_where_the_config_is_made():
    with pytest.raises(UserError, match="did you mean 'batch_size'"):
        config.stage("pretrain", batch_sise=3)
    with pytest.raises(UserError, match="optimizer.lerning_rate.*did you mean 'learning_rate'"):
        config.stage("pretrain", optimizer=dict(lerning_rate=3.0))


@pytest.mark.parametrize("name", config.CHOICES)
def test_a_value_that_is_no_choice_is_answered_with_the_choices(name):
    [path] = [p for p in ALL_KEYS if p.split(".")[-1] == name]
    found = message(with_changes(**{path_of(path): "other"}))
    assert f"{name} is 'other'" in found and all(choice in found for choice in config.CHOICES[name])


def test_a_whole_number_may_stand_for_a_float():
    assert config.resolve(with_changes(model__norm_eps=1)).model.norm_eps == 1.0


@pytest.mark.parametrize("name", ALL_KEYS)
def test_changed_names_a_changed_key_and_no_other(name):
    kind = kind_of(ALL_KEYS[name])
    base = config.Recipe(**{group: {"NAME": schema()} for group, schema in NAMED.items()})
    assert config.non_default(base) == []

    def put(value, parts):
        if isinstance(value, dict) and parts and parts[0] in value:
            return {**value, parts[0]: put(value[parts[0]], parts[1:])}
        if not parts:
            return not value if kind is bool else OTHER[typing.get_origin(kind) or kind]
        return dataclasses.replace(value, **{parts[0]: put(getattr(value, parts[0]), parts[1:])})

    [line] = config.non_default(put(base, name.split(".")))
    assert line.startswith(f"{name} = ")


@given(
    steps=st.integers(1, 10**9),
    weights=st.lists(st.floats(0.01, 1e6), min_size=1, max_size=4),
    rate=st.floats(0, 1, allow_subnormal=False),
    name=st.text(max_size=5),
)
@settings(max_examples=30)
def test_a_recipe_survives_json(steps, weights, rate, name):
    starts = tuple(range(len(weights)))
    values = with_changes(name=name, stages__pretrain__steps=steps, stages__pretrain__phase_start_tokens=starts)
    values["stages"]["pretrain"] |= {"mixture": {"ja": tuple(weights)}}
    values["stages"]["pretrain"]["optimizer"]["learning_rate"] = rate
    made = config.resolve(values)
    assert config.resolve(json.loads(json.dumps(config.to_dict(made)))) == made


@given(st.permutations(["a", "b", "c", "d", "e"]), st.data())
@settings(max_examples=30)
def test_a_stage_comes_after_the_stage_it_starts_from(names, data):
    parents = {n: data.draw(st.sampled_from(["", *names[:i]])) for i, n in enumerate(names)}
    stage = config.to_dict(config.resolve(recipe()).stages["pretrain"])
    order = list(config.resolve({**recipe(), "stages": {n: {**stage, "init_from": p} for n, p in parents.items()}}).stages)
    assert sorted(order) == sorted(names)
    assert all(order.index(parents[n]) < order.index(n) for n in names if parents[n])


def test_stages_after_upcycling_are_mixtures_and_keep_their_rope_base():
    made = config.resolve(with_changes(stages__sft__rope_theta=5e5))
    experts = {name: config.model_config(made, name).n_experts for name in made.stages}
    assert experts == {"pretrain": 0, "upcycle": 4, "sft": 4, "dpo": 4}
    assert [config.model_config(made, name).rope_theta for name in ("pretrain", "sft", "dpo")] == [1e4, 5e5, 5e5]


def test_keys_of_the_mixture_say_nothing_where_there_is_none():
    values = with_changes(model__n_experts=0, model__first_dense=99, model__top_k=77)
    values["stages"] = {"pretrain": values["stages"]["pretrain"]}
    made = config.resolve(values)
    assert config.moe_layers(config.model_config(made, "pretrain")) == ()


def test_a_dense_stage_of_a_recipe_with_experts_has_no_mixture_and_the_others_have_theirs():
    made = config.resolve(with_changes(model__first_dense=2, model__moe_every=10))
    layers = {name: config.moe_layers(config.model_config(made, name)) for name in made.stages}
    assert layers == {"pretrain": (), "upcycle": (11, 21, 31), "sft": (11, 21, 31), "dpo": (11, 21, 31)}


@given(st.permutations(["a", "b", "c", "d", "e"]), st.data())
@settings(max_examples=30)
def test_a_mixture_comes_after_all_the_stages_that_its_experts_come_from(names, data):
    dense, [last] = names[:-1], names[-1:]
    stages = recipe()["stages"]
    parents = {n: data.draw(st.sampled_from(["", *dense[:i]])) for i, n in enumerate(dense)}
    made = {n: {**stages["pretrain"], "init_from": parent} for n, parent in parents.items()}
    others = data.draw(st.lists(st.sampled_from(dense), max_size=4))
    options = {**stages["upcycle"]["upcycle"], "experts_from": tuple(others)}
    made[last] = {**stages["upcycle"], "init_from": data.draw(st.sampled_from(dense)), "upcycle": options}
    order = list(config.resolve({**recipe(), "stages": made}).stages)
    assert sorted(order) == sorted(names)
    assert all(order.index(n) < order.index(last) for n in (*others, made[last]["init_from"]))
    assert all(order.index(parent) < order.index(n) for n, parent in parents.items() if parent)


def test_the_recipe_of_these_tests_is_valid():
    assert list(config.resolve(recipe()).stages) == ["pretrain", "upcycle", "sft", "dpo"]


# --- from the command line --------------------------------------------------------------------------------------------

SOURCE = """
from tanuki_jax import config

def get_config(steps="3"):
    c = config.recipe(data=dict(ja="ja.txt"))
    c.stages.one = config.stage("pretrain", mixture=dict(ja=(1.0,)), steps=int(steps))
    return c
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_flags_override_keys_and_the_argument_reaches_the_file(file):
    made = config.load([f"--config={file}:7", "--config.model.n_layers=5", "--config.stages.one.mixture.ja=(0.25,)"])
    assert (made.stages["one"].steps, made.model.n_layers, made.stages["one"].mixture) == (7, 5, {"ja": (0.25,)})


def test_a_file_without_get_config_does_not_get_that_of_the_file_read_before(file, tmp_path):
    config.load([f"--config={file}"])
    (tmp_path / "empty.py").write_text("a = 1")
    with pytest.raises(UserError, match="empty.py.*get_config"):
        config.load([f"--config={tmp_path / 'empty.py'}"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--config is missing", "configs/nano.py"]),
        (["--config=none.py"], ["no such file 'none.py'"]),
        (["--config={file}", "--config.stages.one.stepz=4"], ["mine.py", "stepz", "steps"]),
        (["--config={file}", "--config.stages.one.steps=many"], ["mine.py", "steps", "many"]),
        (["--config={file}", "--config.stages.one.kind=finetune"], ["stages.one.kind", "'finetune'", "pretrain"]),
    ],
)
def test_bad_flags_are_one_message_with_the_key(flags, words, file):
    with pytest.raises(UserError) as error:
        config.load([flag.format(file=file) for flag in flags])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_stage_goes_on_with_the_rotary_base_of_the_stage_that_it_starts_from():
    """Also through an upcycling, which trains nothing."""
    c = tiny_recipe.get_config()
    stages = tiny_recipe.STAGES
    c.stages.pretrain.rope_theta = 5e5
    c.stages.dpo.rope_theta = 2e4
    resolved = config.resolve(c)
    assert [config.model_config(resolved, name).rope_theta for name in stages] == [5e5] * (len(stages) - 1) + [2e4]
    c.stages.pretrain.rope_theta = 0.0
    resolved = config.resolve(c)
    assert [config.model_config(resolved, name).rope_theta for name in stages] == [1e4] * (len(stages) - 1) + [2e4]
