"""What the groups about made rows must be, in words that help; and the order of stages that read what others make."""

import pytest

from tanuki_jax import config
from tanuki_jax.config.derived import made_sources, stages_before
from tanuki_jax.errors import UserError

URL = "http://127.0.0.1:8000/v1"


def recipe(**changes):
    """A recipe whose model answers prompts, then judges pairs of its answers; a key is a path with double underscores."""
    c = config.recipe(data=dict(talks="talks.jsonl", answers="synth:answers", pairs=dict(files="synth:pairs", filters="short")))
    c.filters.short = config.filters(max_characters=100)
    c.endpoints.judge = config.endpoint(URL)
    c.synth.answers = config.synth("answer", seeds=dict(prompts="prompts.jsonl"), generator="judge")
    c.synth.pairs = config.synth("preferences", seeds=dict(prompts="synth:answers"), judge="judge", scores="sft")
    c.stages.pretrain = config.stage("pretrain", mixture=dict(talks=(1.0,)), steps=3)
    c.stages.sft = config.stage("sft", init_from="pretrain", mixture=dict(talks=(1.0,), answers=(1.0,)), steps=3)
    c.stages.sampling = config.stage("synth", init_from="sft", synth="pairs")
    c.stages.dpo = config.stage("dpo", init_from="sft", mixture=dict(pairs=(1.0,)), steps=3)
    values = config.to_dict(config.resolve(c))
    for path, value in changes.items():
        *groups, last = path.split("__")
        place = values
        for group in groups:
            place = place[group]
        place[last] = value
    return config.resolve(values)


def test_a_stage_comes_after_what_makes_its_rows():
    made = recipe()
    assert list(made.stages) == ["pretrain", "sft", "sampling", "dpo"]
    assert stages_before(made, "dpo") == {"sft", "sampling"}
    assert list(made_sources(made, "dpo")) == ["pairs", "answers"]
    assert list(made_sources(made, "pretrain")) == []


BAD = {
    "address": (dict(endpoints__judge__base_url="localhost"), ["endpoints.judge.base_url", "'localhost'", "http://127.0.0.1"]),
    "port": (dict(endpoints__judge__base_url="http://a.b:99999/v1"), ["endpoints.judge.base_url", "99999"]),
    "key in address": (dict(endpoints__judge__base_url="https://a.b/?api_key=1"), ["endpoints.judge.base_url", "api_key_env"]),
    "filter": (dict(data__pairs__filters="long"), ["data.pairs.filters", "'long'", "short"]),
    "filter of rows": (dict(synth__pairs__filters="long"), ["synth.pairs.filters", "'long'", "short"]),
    "bounds": (dict(filters__short__min_characters=200), ["filters.short", "200", "100"]),
    "filter's language": (dict(filters__short__language="fr"), ["filters.short.language", "'fr'", "ja, en"]),
    "no judge": (dict(filters__short__min_quality=0.5), ["filters.short.min_quality", "judge", "endpoints"]),
    "judge of a filter": (dict(filters__short__judge="x"), ["filters.short.judge", "'x'", "judge"]),
    "generator": (dict(synth__answers__generator="gpt"), ["synth.answers.generator", "'gpt'", "judge"]),
    "judge": (dict(synth__pairs__judge="gpt"), ["synth.pairs.judge", "'gpt'", "rules"]),
    "no prices": (dict(synth__answers__max_cost=5.0), ["synth.answers.max_cost is 5", "input_price"]),
    "language": (dict(synth__answers__language="fr"), ["synth.answers.language", "'fr'"]),
    "method": (dict(synth__answers__method="ask"), ["synth.answers.method", "'ask'", "persona"]),
    "no tasks": (
        dict(synth__answers__method="persona", synth__answers__seeds=dict(personas="x.jsonl")),
        ["synth.answers.seeds has no tasks", "personas and tasks"],
    ),
    "other seeds": (
        dict(synth__answers__seeds=dict(prompts="x.jsonl", topics="y.jsonl")),
        ["synth.answers.seeds names topics", "prompts"],
    ),
    "nobody judges": (dict(synth__pairs__judge=""), ["synth.pairs.judge is empty", "rules", "better"]),
    "no end": (dict(synth__answers__method="magpie", synth__answers__seeds={}), ["synth.answers.items is 0", "magpie"]),
    "seeds": (dict(synth__pairs__seeds=dict(prompts="synth:x")), ["synth.pairs.seeds.prompts", "'x'", "answers, pairs"]),
    "judge without address": (dict(endpoints__judge__base_url=""), ["synth.pairs.judge", "'judge'", "base_url is empty"]),
    "filter's judge without address": (
        dict(filters__short__judge="judge", endpoints__judge__base_url="", synth__answers__generator=""),
        ["filters.short.judge", "base_url is empty"],
    ),
    "circle of seeds": (dict(synth__answers__seeds=dict(prompts="synth:pairs")), ["dpo, sampling, sft", "circle"]),
    "nobody makes it": (dict(synth__answers__generator=""), ["synth.answers.generator", "kind synth", "synth='answers'"]),
    "source": (dict(data__pairs__files="synth:x"), ["data.pairs", "'synth:x'", "answers, pairs"]),
    "maker of nothing": (dict(stages__sampling__synth=""), ["stages.sampling.synth", "empty"]),
    "maker of the unknown": (dict(stages__sampling__synth="x"), ["stages.sampling.synth", "'x'"]),
    "two generators": (dict(synth__pairs__generator="judge"), ["stages.sampling.synth", "pairs", "'judge'"]),
    "maker without a model": (dict(stages__sampling__init_from=""), ["stages.sampling.init_from", "empty"]),
    "maker that trains": (dict(stages__sampling__mixture=dict(talks=(1.0,))), ["stages.sampling.mixture"]),
    "child of rows": (dict(stages__dpo__init_from="sampling"), ["stages.dpo.init_from", "'sampling'", "'sft'"]),
    "circle of stages": (dict(stages__sampling__init_from="dpo"), ["dpo, sampling", "circle"]),
    "training stage": (dict(stages__dpo__synth="pairs"), ["stages.dpo.synth"]),
    "tokenizer": (dict(tokenizer__sources=("pairs",)), ["tokenizer.sources", "'pairs'", "before all stages"]),
    "name": (dict(endpoints={"../x": {"base_url": URL}}), ["endpoints", "'../x'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_in_words_that_help(name):
    changes, words = BAD[name]
    with pytest.raises(UserError) as error:
        recipe(**changes)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_rows_are_made_by_one_stage():
    values = config.to_dict(recipe())
    values["stages"]["again"] = values["stages"]["sampling"]
    with pytest.raises(UserError, match="makes pairs already"):
        config.resolve(values)


def test_rows_are_not_made_from_themselves():
    values = config.to_dict(recipe())
    values["synth"]["answers"]["seeds"] = {"prompts": "synth:more"}
    values["synth"]["more"] = values["synth"]["answers"] | {"seeds": {"prompts": "synth:answers"}}
    with pytest.raises(UserError, match="would be made from itself"):
        config.resolve(values)


def test_rows_alone_are_a_recipe():
    values = config.to_dict(recipe())
    assert config.resolve({**values, "stages": {}}).synth
