"""A job's id is a function of what is asked, and of nothing else."""

import dataclasses

import pytest

from tanuki_jax.config.synthesis import Endpoint
from tanuki_jax.endpoint.job import Job, estimate_tokens, seed_of

ENDPOINT = Endpoint(base_url="http://x/v1", model="m")
JOB = Job(messages=[{"role": "user", "content": "狸"}], step="q1", template="t1", item="i1")


def test_an_id_is_the_same_in_every_process():
    assert JOB.id("recipe", ENDPOINT) == "1668e3b822d5419e"
    assert seed_of("1668e3b822d5419e") == 0x22D5419E


@pytest.mark.parametrize(
    "change",
    [
        dict(messages=[{"role": "user", "content": "狐"}]),
        dict(step="q2"),
        dict(sample=1),
        dict(template="t2"),
        dict(item="i2"),
        dict(role="judge"),
        dict(prompt="x"),
        dict(sampling={"temperature": 0.0}),
        dict(sampling={"stop": ["\n"]}),
    ],
    ids=str,
)
def test_an_id_depends_on_all_that_is_asked(change):
    assert dataclasses.replace(JOB, **change).id("recipe", ENDPOINT) != JOB.id("recipe", ENDPOINT)


@pytest.mark.parametrize("change", [dict(model="n"), dict(temperature=0.1), dict(top_p=0.5), dict(max_tokens=9)], ids=str)
def test_an_id_depends_on_the_model_and_its_sampling(change):
    assert JOB.id("recipe", dataclasses.replace(ENDPOINT, **change)) != JOB.id("recipe", ENDPOINT)
    assert JOB.id("other", ENDPOINT) != JOB.id("recipe", ENDPOINT)


def test_an_id_does_not_depend_on_where_and_how_fast_it_is_asked():
    other = dataclasses.replace(ENDPOINT, base_url="http://y/v1", concurrency=1, retries=0, input_price=1.0, api_key_env="K")
    assert JOB.id("recipe", other) == JOB.id("recipe", ENDPOINT)


def test_a_job_that_repeats_the_endpoints_sampling_asks_the_same():
    assert dataclasses.replace(JOB, sampling={"temperature": 0.7}).id("r", ENDPOINT) == JOB.id("r", ENDPOINT)


def test_settings():
    assert JOB.settings(ENDPOINT) == {"temperature": 0.7, "top_p": 1.0, "max_tokens": 512}
    penalty = dataclasses.replace(ENDPOINT, repetition_penalty=1.1)
    assert dataclasses.replace(JOB, sampling={"stop": []}).settings(penalty)["repetition_penalty"] == 1.1
    with pytest.raises(ValueError, match="no top_k"):
        dataclasses.replace(JOB, sampling={"top_k": 3}).settings(ENDPOINT)


def test_tokens_are_estimated_by_characters():
    assert estimate_tokens("") == 0
    assert estimate_tokens("abcdefgh") == 2
    assert estimate_tokens("狸が abcd") == 2 + 2
