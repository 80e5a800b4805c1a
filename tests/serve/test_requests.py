import json

import pytest

from tanuki_jax.data.chat import encode_chat, stop_ids
from tanuki_jax.model import Sampling
from tanuki_jax.serve.errors import ApiError
from tanuki_jax.serve.requests import ServedModel, read_chat, read_completion, read_json

TURN = {"role": "user", "content": "月は?"}


@pytest.fixture(scope="session")
def served(tokenizer):
    return ServedModel("m", tokenizer, 512, 64)


def chat(served, **fields):
    return read_chat(served, {"model": "m", "messages": [TURN], **fields})


def completion(served, **fields):
    return read_completion(served, {"model": "m", "prompt": "狸", **fields})


def test_a_chat_is_encoded_as_the_template_says_and_runs_to_the_end_of_the_context(served, tokenizer):
    [job] = chat(served).jobs
    assert list(job.prompt) == encode_chat(tokenizer, [TURN], add_generation_prompt=True)[0]
    assert job.sampling == Sampling(64 - len(job.prompt), temperature=1.0, stop=tuple(sorted(stop_ids(tokenizer))))
    assert job.top is None and not job.streams and job.seed != chat(served).jobs[0].seed


def test_every_option_arrives(served, tokenizer):
    request = chat(
        served,
        **dict(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2, max_completion_tokens=3, n=2, seed=-5),
        **dict(stop=["a", "", "b"], stop_token_ids=[9], logprobs=True, top_logprobs=4, stream=True),
        stream_options={"include_usage": True},
    )
    first, second = request.jobs
    stop = tuple(sorted({9, *stop_ids(tokenizer)}))
    assert first.sampling == Sampling(3, 0.5, 0.9, stop, 7, 0.1, 1.2) and (first.top, first.streams) == (4, True)
    assert (first.seed, first.sample, second.sample) == (-5, 0, 1) and first.stop_texts == ("a", "b")
    assert request.include_usage
    [job] = chat(served, ignore_eos=True, stop_token_ids=[9], top_k=-1, temperature=1e-9, stop="x").jobs
    assert job.sampling == Sampling(job.sampling.max_new_tokens, stop=(9,)) and job.stop_texts == ("x",)


def test_nulls_and_what_clients_send_without_need_are_taken(served):
    chat(served, temperature=None, stop=None, tools=None, n=None, logit_bias={}, tools_choice=None)
    chat(served, user="me", store=False, metadata={"a": "b"}, service_tier="auto", presence_penalty=0.0, tools=[])
    chat(served, response_format={"type": "text"}, parallel_tool_calls=True, stop=[None, ""])
    completion(served, stop="", best_of=1, suffix="", user="me")


def test_contents_may_be_parts_and_developers_are_systems(served, tokenizer):
    parts = [{"type": "text", "text": "月"}, {"type": "text", "text": "は?"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts, "name": "x", "type": "text"}]
    [job] = chat(served, messages=messages).jobs
    plain = [{"role": "system", "content": "s"}, TURN]
    assert list(job.prompt) == encode_chat(tokenizer, plain, add_generation_prompt=True)[0]


def test_prompts_are_texts_or_ids_one_or_several(served, tokenizer):
    ids = tokenizer.encode("狸")
    before = tokenizer.encode_prompt("")
    assert [list(job.prompt) for job in completion(served, prompt="狸").jobs] == [[*before, *ids]]
    assert [list(job.prompt) for job in completion(served, prompt=["狸", "3"]).jobs] == [
        [*before, *ids],
        [*before, *tokenizer.encode("3")],
    ]
    assert [job.prompt for job in completion(served, prompt=[5, 6], n=2).jobs] == [(5, 6)] * 2
    assert [job.prompt for job in completion(served, prompt=[[5, 6], [7]]).jobs] == [(5, 6), (7,)]
    assert completion(served, prompt="").jobs[0].prompt
    assert completion(served, prompt=[5, 6], echo=True).prompts[0].text == tokenizer.decode([5, 6])


def test_special_tokens_that_are_written_stay_text(served, tokenizer):
    text = f"{tokenizer.eos_token}a{tokenizer.bos_token}"
    for job in (*completion(served, prompt=text).jobs, *chat(served, messages=[{"role": "user", "content": text}]).jobs):
        assert tokenizer.eos not in job.prompt and tokenizer.bos not in job.prompt[1:]


WRONG_CHATS = [
    (dict(model="x"), 404, "model", "it is 'm'"),
    (dict(model=None), 400, "model", "missing"),
    (dict(foo=1), 400, "foo", "unknown"),
    (dict(messages=[]), 400, "messages", "at least one"),
    (dict(messages="hello"), 400, "messages", "list"),
    (dict(messages=None), 400, "messages", "missing"),
    (dict(messages=[3]), 400, "messages[0]", "object"),
    (dict(messages=[{"role": "user", "content": ""}] * 65), 400, "messages", "65 messages are more than the 64 tokens"),
    ({"\ud800": 1}, 400, None, "no valid Unicode"),
    (dict(messages=[TURN, {"role": "tool", "content": "a"}]), 400, "messages[1].role", "must be one of"),
    (dict(messages=[{"role": "user"}]), 400, "messages[0].content", "text"),
    (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages[0].content[0]", "type text"),
    (dict(messages=[{**TURN, "tool_calls": [1]}]), 400, "messages[0].tool_calls", "not supported"),
    (dict(messages=[{"role": "user", "content": "\ud800"}]), 400, "messages", "surrogate"),
    (dict(temperature=99), 400, "temperature", "at most 2"),
    (dict(temperature="hot"), 400, "temperature", "number"),
    (dict(top_p=0), 400, "top_p", "above 0"),
    (dict(n=-1), 400, "n", "at least 1"),
    (dict(n=0), 400, "n", "at least 1"),
    (dict(n=1000), 400, "n", "at most 128"),
    (dict(seed=2**64), 400, "seed", "at most"),
    (dict(max_tokens=0), 400, "max_tokens", "at least 1"),
    (dict(max_tokens=2, max_completion_tokens=2), 400, "max_tokens", "not both"),
    (dict(max_tokens=60), 400, "max_tokens", r"tokens and the answer may have 60: \d+ in all, but this server takes 64"),
    (dict(top_logprobs=2), 400, "top_logprobs", "logprobs=true"),
    (dict(logprobs=True, top_logprobs=21), 400, "top_logprobs", "at most 20"),
    (dict(tools=[{"type": "function"}]), 400, "tools", "not supported"),
    (dict(response_format={"type": "json_object"}), 400, "response_format", "not supported"),
    (dict(logit_bias={"5": 1}), 400, "logit_bias", "not supported"),
    (dict(frequency_penalty=1), 400, "frequency_penalty", "repetition_penalty"),
    (dict(stop=3), 400, "stop", "text"),
    (dict(stop=["a"] * 99), 400, "stop", "at most"),
    (dict(chat_template="{{ 1 }}"), 400, "chat_template", "unknown"),
]
WRONG_COMPLETIONS = [
    (dict(prompt=None), 400, "prompt", "missing"),
    (dict(prompt=[]), 400, "prompt", "list of texts"),
    (dict(prompt=3), 400, "prompt", "list of texts"),
    (dict(prompt=[[]]), 400, "prompt[0]", "at least one token"),
    (dict(prompt=[True]), 400, "prompt[0]", "at least one token"),
    (dict(prompt=[5, 512]), 400, "prompt", "512; ids of this model are 0 to 511"),
    (dict(prompt=[-1]), 400, "prompt", "-1"),
    (dict(prompt=[10**100]), 400, "prompt", "ids of this model"),
    (dict(prompt=[5] * 64), 400, "prompt", "64 tokens and the answer may have 16: 80 in all, but this server takes 64"),
    (dict(prompt=["a"] * 65, n=2), 400, "n", "128 rows"),
    (dict(max_tokens=0), 400, "max_tokens", "echo"),
    (dict(best_of=2), 400, "best_of", "equals n"),
    (dict(suffix="b"), 400, "suffix", "not supported"),
    (dict(logprobs=21), 400, "logprobs", "at most 20"),
    (dict(messages=[]), 400, "messages", "unknown"),
]


@pytest.mark.parametrize(("fields", "status", "param", "message"), WRONG_CHATS)
def test_a_wrong_chat_is_refused_by_name(served, fields, status, param, message):
    with pytest.raises(ApiError, match=message) as refused:
        chat(served, **fields)
    assert (refused.value.status, refused.value.param) == (status, param)


@pytest.mark.parametrize(("fields", "status", "param", "message"), WRONG_COMPLETIONS)
def test_a_wrong_completion_is_refused_by_name(served, fields, status, param, message):
    with pytest.raises(ApiError, match=message) as refused:
        completion(served, **fields)
    assert (refused.value.status, refused.value.param) == (status, param)
    assert json.loads(refused.value.body())["error"]["message"] == refused.value.message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff{}", b'{"a": NaN}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(ApiError) as refused:
        read_json(body)
    assert refused.value.status == 400
