"""One request: what it sends, and what comes of the many things that servers answer."""

import asyncio
import email.utils
import time

import pytest

from tanuki_jax.endpoint import Job, Overflow, Refused
from tanuki_jax.endpoint.client import retry_after
from tanuki_jax.endpoint.reply import Failure, is_overflow, read
from tanuki_jax.errors import UserError
from tests.endpoint.chains import client, question
from tests.endpoint.faulty_server import Behaviour, answer_text, serve

ID = "00000000000000ab"


def ask(server, job, **settings):
    async def work():
        async with client(server, **settings) as opened:
            return await opened.ask(job, ID)

    return asyncio.run(work())


def start(server, **settings):
    async def work():
        async with client(server, **settings) as opened:
            return opened.endpoint.model

    return asyncio.run(work())


def test_a_request_and_its_answer(server):
    answer = ask(server, question("狸", sampling={"stop": ["\n"], "temperature": 0.0}), repetition_penalty=1.1)
    (body,) = server.bodies
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "狸"}],
        "seed": 0xAB,
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 512,
        "repetition_penalty": 1.1,
        "stop": ["\n"],
    }
    assert answer.text == answer_text(body)
    assert answer.finish_reason == "stop" and answer.model == "tiny"
    assert answer.usage == {"prompt_tokens": 1, "completion_tokens": 5} and answer.logprobs == {}


@pytest.mark.parametrize("job", [question("x", sampling={"logprobs": 2}), Job(prompt="x", sampling={"logprobs": 2})])
def test_log_probabilities_of_the_first_token(server, job):
    assert ask(server, job).logprobs == {"yes": -0.25, "no": -1.5}


def test_a_prompt_goes_to_completions(server):
    answer = ask(server, Job(prompt="<|user|>"))
    assert server.bodies[0]["prompt"] == "<|user|>" and "messages" not in server.bodies[0]
    assert answer.text == answer_text(server.bodies[0])


def test_a_key_is_sent_where_one_is_named_and_no_other(server, monkeypatch):
    monkeypatch.setenv("TINY_KEY", "sesame\n")
    ask(server, question("x"))
    ask(server, question("x"), api_key_env="TINY_KEY")
    assert "uthorization" not in server.headers[0]
    assert "authorization: bearer sesame\r\n" in server.headers[1].lower()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(base_url="127.0.0.1:80"), "base_url is '127.0.0.1:80'; it must be an address"),
        (dict(base_url="http://127.0.0.1:99999/v1"), "it must be an address"),
        (dict(base_url="http://[::1/v1"), "it must be an address"),
        (dict(base_url="http:///v1"), "it must be an address"),
        (dict(base_url="http://127.0.0.1:9/v1"), r"cannot be reached \(.*\); start its server, or correct base_url"),
        (dict(base_url="http://me:secret@127.0.0.1:9/v1"), "base_url has a password or key"),
        (dict(model="huge"), "has no model 'huge'; it has tiny"),
        (dict(api_key_env="NOT_SET"), r"NOT_SET \(api_key_env\) is not set"),
    ],
)
def test_endpoints_that_do_not_work(server, settings, message):
    with pytest.raises(UserError, match=message) as raised:
        start(settings.pop("base_url", server), **settings)
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


def test_an_address_without_v1(server):
    with pytest.raises(UserError, match="404.*base_url usually ends in /v1"):
        start(server.url.removesuffix("/v1"))


def test_a_wrong_key_is_not_shown(monkeypatch):
    monkeypatch.setenv("TINY_KEY", "wrong-key-123")
    with serve(Behaviour(keys=("right",))) as server:
        with pytest.raises(UserError, match=r"the key in \$TINY_KEY is refused") as raised:
            start(server, api_key_env="TINY_KEY")
        assert "wrong-key-123" not in str(raised.value) and "provided: ***" in str(raised.value)
        with pytest.raises(UserError, match="it wants a key"):
            start(server)
        monkeypatch.setenv("TINY_KEY", "right")
        assert start(server, api_key_env="TINY_KEY") == "tiny"


def test_an_endpoint_without_a_model_has_the_only_one():
    with serve(Behaviour(models=("a",))) as server:
        assert start(server) == "a"
    with serve(Behaviour(models=("a", "b"))) as server, pytest.raises(UserError, match="it has a, b; name one"):
        start(server)


def test_answers_that_are_cut_or_refused(server):
    assert ask(server, question("<cut>")).finish_reason == "length"
    for text in ("<filter>", "<refuse>"):
        with pytest.raises(Refused):
            ask(server, question(text))
    with pytest.raises(Failure) as failure:
        ask(server, question("<empty>"))
    assert failure.value.kind == "empty" and failure.value.usage == {"prompt_tokens": 7, "completion_tokens": 5}


def test_a_prompt_that_is_too_long():
    with serve(Behaviour(context=10)) as server, pytest.raises(Overflow) as overflow:
        ask(server, question("x" * 11))
    assert overflow.value.reason == "overflow" and "maximum context length" in overflow.value.row["message"]


FAULTS = {
    "error_500": "server_error",
    "rate_limit": "rate_limit",
    "time_out": "time_out",
    "cut_body": "cut_body",
    "cut_stream": "cut_body",
    "html": "html",
    "garbage": "bad_json",
    "no_choices": "no_choices",
    "null_content": "empty",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_apart(fault):
    with serve(Behaviour(share=1.0, faults=(fault,), retry_after=0.25)) as server, pytest.raises(Failure) as failure:
        ask(server, question("x"), timeout_seconds=0.3 if fault == "time_out" else 20.0)
    assert failure.value.kind == FAULTS[fault]
    assert failure.value.retry_after == (0.25 if fault == "rate_limit" else None)


@pytest.mark.parametrize(
    "value, kind",
    [
        ("<html>busy</html>", "html"),
        ("busy", "bad_json"),
        (None, "bad_json"),
        ([], "bad_json"),
        ({}, "no_choices"),
        ({"choices": None}, "no_choices"),
        ({"choices": [None]}, "no_choices"),
        ({"error": {"message": "upstream"}}, "no_choices"),
        ({"choices": [{"message": None}]}, "empty"),
        ({"choices": [{"message": {"content": 3}}]}, "empty"),
        ({"choices": [{"message": {"content": ["x"]}, "finish_reason": "length"}]}, "empty"),
        ({"choices": [{"message": {"content": " \n"}}]}, "empty"),
    ],
)
def test_json_that_is_no_answer(value, kind):
    with pytest.raises(Failure) as failure:
        read(value)
    assert failure.value.kind == kind


def test_half_a_character_is_replaced():
    answer = read({"choices": [{"message": {"content": "狸\ud83d"}}]})
    assert answer.text == "狸\N{REPLACEMENT CHARACTER}"


def test_a_model_that_was_cut_while_it_thought():
    answer = read({"choices": [{"message": {"content": None}, "finish_reason": "length"}]})
    assert (answer.text, answer.finish_reason, answer.usage) == ("", "length", {})


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",
        "context_length_exceeded",
        "the request exceeds the available context size, try increasing it",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "the prompt has 300 tokens, and max_tokens is 512: longer than the context of 512",
    ],
)
def test_servers_words_for_a_prompt_that_is_too_long(message):
    assert is_overflow(message)
    assert not is_overflow("temperature must be at most 2") and not is_overflow("unknown field: top_k")


def test_how_long_a_server_asks_to_wait():
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after": "20", "retry-after-ms": "300"}) == 0.3
    assert retry_after({"retry-after": "-3"}) == 0.0
    assert retry_after({}) is retry_after({"retry-after": "soon"}) is None
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 27 < retry_after({"retry-after": date}) <= 31
