"""The server as clients see it: openai's own client, and plain HTTP."""

import asyncio
import dataclasses
import json
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import openai
import pytest

from tanuki_jax import serve
from tanuki_jax.data.chat import encode_chat
from tanuki_jax.errors import UserError
from tanuki_jax.evaluate.score import sequence_scores
from tanuki_jax.serve.app import Access, Api
from tanuki_jax.serve.errors import ApiError
from tanuki_jax.serve.exchange import Exchange
from tanuki_jax.serve.requests import ServedModel
from tanuki_jax.serve.server import Server
from tests.serve.conftest import CFG, LENGTH, NAME, SLOTS

TURNS = [{"role": "user", "content": "月は?"}]


def ask(running, path, body=None, method=None, **headers):
    """Status, headers and body of an answer."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(running.address(path), data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def chat(running, **options):
    return running.client.chat.completions.create(**{"model": NAME, "messages": TURNS, "temperature": 0, **options})


def prompt_of(running):
    return encode_chat(running.tokenizer, TURNS, add_generation_prompt=True)[0]


def metric(running, name):
    return float(re.search(rf"^tanuki_serve_{name} (\S+)$", ask(running, "/metrics")[2], re.MULTILINE)[1])


def test_an_answer_is_what_generate_gives_whole_and_in_a_stream(running):
    ids = running.generate(prompt_of(running), 12)
    text = running.text(prompt_of(running), ids)
    answer = chat(running, max_tokens=12)
    assert answer.choices[0].message.content == text and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt_of(running)), 12)
    chunks = list(chat(running, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == text and len(chunks) > 6
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == answer.usage and not chunks[-1].choices


def test_a_seed_repeats_a_sample_which_is_generates_and_other_samples_differ(running):
    def sample(seed, n=1):
        answer = chat(running, temperature=1.0, top_p=0.9, seed=seed, max_tokens=8, n=n)
        return [choice.message.content for choice in answer.choices]

    ids = running.generate(prompt_of(running), 8, 1.0, 0.9, seed=7)
    first, second, third = sample(7, 3)
    assert [first] == sample(7) == [running.text(prompt_of(running), ids)]
    assert len({first, second, third, *sample(8)}) == 4


def test_many_at_once_get_what_they_get_alone(running):
    prompts = [running.tokenizer.encode("狸が山の奥で月を見ていました。3と2を足すと")[: 1 + i] for i in range(12)]

    def complete(prompt):
        choice = running.client.completions.create(model=NAME, prompt=prompt, max_tokens=10, temperature=0).choices[0]
        return choice.text

    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(complete, prompts))
    assert together == [complete(prompt) for prompt in prompts]
    assert together == [running.text(p, running.generate(p, 10)) for p in prompts]
    both = running.client.completions.create(model=NAME, prompt=prompts[3:5], max_tokens=10, temperature=0, n=2)
    assert [c.text for c in both.choices] == [together[3]] * 2 + [together[4]] * 2 and both.choices[3].index == 3


def test_stop_strings_and_stop_ids_end_an_answer(running):
    whole = chat(running, max_tokens=16).choices[0].message.content
    stop = whole[4:7]
    answer = chat(running, max_tokens=16, stop=["nowhere", stop]).choices[0]
    assert answer.message.content == whole[: whole.index(stop)] and answer.finish_reason == "stop"
    streamed = chat(running, max_tokens=16, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == whole[: whole.index(stop)]
    ids = running.generate(prompt_of(running), 16)
    cut = chat(running, max_tokens=16, extra_body={"stop_token_ids": [ids[5]]}).choices[0]
    assert cut.message.content == running.text(prompt_of(running), ids[: ids.index(ids[5])])


def test_options_of_vllm_change_the_answer(running):
    one = chat(running, temperature=2, seed=1, max_tokens=8, extra_body={"top_k": 1}).choices[0].message.content
    assert one == chat(running, max_tokens=8).choices[0].message.content
    penalised = chat(running, max_tokens=16, extra_body={"repetition_penalty": 5.0}, logprobs=True)
    tokens = [t.token for t in penalised.choices[0].logprobs.content]
    spelt = [token for token in tokens if token]  # the vocabulary has rows without a piece
    assert len(set(spelt)) == len(spelt) > 8


def test_echoed_log_probabilities_are_those_of_score_and_equal_floats_mark_the_greedy(running):
    ids = running.tokenizer.encode("狸が山の奥で、3と2を足すと")
    answer = running.client.completions.create(
        model=NAME, prompt=[ids, ids[:5]], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    for choice, row in zip(answer.choices, (ids, ids[:5]), strict=True):
        given = choice.logprobs
        assert given.token_logprobs[0] is None and given.top_logprobs[0] is None and len(given.tokens) == len(row) + 1
        [(total, is_greedy)] = sequence_scores(CFG, running.params, [row], [[0] + [1] * (len(row) - 1)])
        np.testing.assert_allclose(sum(given.token_logprobs[1:-1]), total, atol=1e-4)
        pairs = list(zip(given.token_logprobs[1:], given.top_logprobs[1:], strict=True))
        assert is_greedy == all(p == max(top.values()) for p, top in pairs[:-1])
        assert pairs[-1][0] == max(pairs[-1][1].values())  # what was chosen is the likeliest
        assert all(p in top.values() for p, top in pairs)
        assert choice.text.startswith(running.tokenizer.decode(row))
        for token, offset in zip(given.tokens, given.text_offset, strict=True):
            assert token.startswith("bytes:") or choice.text.startswith(token, offset)
    scored = running.client.completions.create(model=NAME, prompt=ids, max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].logprobs.token_logprobs == answer.choices[0].logprobs.token_logprobs[:-1]
    assert scored.choices[0].text == running.tokenizer.decode(ids)


def test_nothing_is_compiled_once_it_is_ready(running, caplog):
    ids = running.tokenizer.encode("狸が山の奥で、3と2を足すと")
    before = jax.config.jax_log_compiles
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level("WARNING"):
            for options in (
                dict(prompt=ids[:1], max_tokens=1),
                dict(prompt=(ids * 8)[: LENGTH - 5], max_tokens=5, temperature=1, extra_body={"top_k": 3, "min_p": 0.1}),
                dict(prompt=[ids, ids[:3], ids * 2], max_tokens=3, n=2, logprobs=5, temperature=0),
                dict(prompt=(ids * 8)[: LENGTH - 1], max_tokens=0, logprobs=1, echo=True),
                dict(prompt=ids, max_tokens=20, logprobs=0, echo=True, extra_body={"repetition_penalty": 1.3}),
            ):
                running.client.completions.create(model=NAME, **options)
                if options.get("n", 1) == 1:
                    list(running.client.completions.create(model=NAME, stream=True, **options))
    finally:
        jax.config.update("jax_log_compiles", before)
    assert not [record.getMessage() for record in caplog.records if "ompil" in record.getMessage()]


def test_log_probabilities_of_a_chat_are_of_its_tokens(running):
    choice = chat(running, max_tokens=10, logprobs=True, top_logprobs=3).choices[0]
    data = bytes(byte for t in choice.logprobs.content for byte in t.bytes)
    assert data.decode("utf-8", "replace").startswith(choice.message.content.rstrip("\ufffd"))
    for token in choice.logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob and len(token.top_logprobs) == 3
    streamed = chat(running, max_tokens=10, logprobs=True, top_logprobs=3, stream=True)
    content = [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert content == choice.logprobs.content


def test_the_tokenizer_is_there_for_clients_that_have_none(running):
    tokenizer = running.tokenizer
    info = json.loads(ask(running, "/tokenizer_info")[2])
    assert info["eos_token"] == tokenizer.eos_token and info["chat_template"] == tokenizer.chat_template
    for text in ("狸🦝 a", tokenizer.eos_token, ""):
        for special in (True, False):
            found = json.loads(ask(running, "/tokenize", {"prompt": text, "add_special_tokens": special})[2])
            assert found["tokens"] == tokenizer.encode_prompt(text, special) and found["max_model_len"] == LENGTH
    found = json.loads(ask(running, "/tokenize", {"messages": TURNS})[2])
    assert found["tokens"] == prompt_of(running)
    assert json.loads(ask(running, "/detokenize", {"tokens": tokenizer.encode("狸🦝")})[2]) == {"prompt": "狸🦝"}
    for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": "\ud800"}), ("/detokenize", {"tokens": ["a"]})):
        assert ask(running, path, body)[0] == 400


def test_models_health_and_metrics(running):
    assert [m.id for m in running.client.models.list()] == [NAME] and running.client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="not here"):
        running.client.models.retrieve("other")
    status, _, body = ask(running, "/health")
    assert status == 200 and json.loads(body)["status"] == "ready"
    before = metric(running, "completion_tokens_total")
    chat(running, max_tokens=5)
    assert metric(running, "completion_tokens_total") == before + 5 and metric(running, "slots") == SLOTS


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"model": NAME, "messages": TURNS, "max_tokens": 100}, 400),
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", {"model": "x", "messages": TURNS}, 404),
        ("/v1/chat/completions", {"model": NAME, "messages": TURNS, "user": "a" * 60_000}, 413),
        ("/v1/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": "a" * 40_000}]}, 400),
        ("/v1/completions", None, 405),
        ("/v1/nothing", None, 404),
        ("/../../etc/passwd", None, 404),
    ],
)
def test_errors_have_openais_shape(running, path, body, status):
    found, headers, text = ask(running, path, body)
    assert found == status and headers["Content-Type"] == "application/json"
    error = json.loads(text)["error"]
    assert error["message"] and set(error) == {"message", "type", "param", "code"}


def test_a_client_that_leaves_frees_its_slot(running):
    for _ in range(2 * SLOTS):
        stream = chat(running, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    assert chat(running, max_tokens=3).choices[0].finish_reason == "length"
    assert metric(running, "slots_busy") <= 1  # the last one's, until the next turn


def test_a_flood_is_refused_with_the_time_to_come_back_and_the_rest_is_answered(running):
    def flood(_):
        try:
            return len(chat(running, n=SLOTS, extra_body={"ignore_eos": True}).choices)
        except openai.RateLimitError as error:
            assert error.response.headers["Retry-After"] == "1"
            return 0

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(flood, range(8))) == {0, SLOTS}


def test_the_page_is_small_and_asks_nobody_else(running):
    status, headers, page = ask(running, "/")
    assert status == 200 and len(page.encode()) <= 15_000 and "innerHTML" not in page and '<link rel="stylesheet' not in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'sha256-" in policy
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    texts = re.search(r"const TEXTS = \{\n  ja: \{(.*?)\},\n  en: \{(.*?)\},\n\};", page, re.DOTALL)
    names = [re.findall(r"(\w+): \"", part) for part in texts.groups()]
    assert names[0] == names[1] and set(re.findall(r"data-text=\"(\w+)\"", page)) <= set(names[0])
    assert {"ready", "busy", "stopped"} <= set(re.findall(r"say\(\"(\w+)\"", page)) <= set(names[0])
    assert {"invalid_api_key", "loading", "context_length_exceeded"} <= set(names[0])  # codes of errors
    assert "event.keyCode === 229" in page  # the Enter that ends a composition in Safari
    labelled = re.findall(r"<label[^>]*>.*?</label>", page, re.DOTALL)
    assert len(re.findall(r"<(?:input|select|textarea)", page)) == sum("<input" in x or "<select" in x for x in labelled) + 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403), ({"Host": "localhost"}, 200)],
)
def test_no_other_site_reaches_a_server_of_this_machine(running, headers, status):
    assert ask(running, "/v1/models", **headers)[0] == status


def respond(app, path, headers=(), method="GET", receive=None):
    """The status that an application gives, without a socket."""
    sent = []

    async def call():
        async def empty():
            return {"type": "http.request", "body": b""}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": list(headers), "root_path": ""}
        await app(scope, receive or empty, send)

    asyncio.run(call())
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent)


class Idle:
    """An engine that is not ready."""

    state, note = "loading", "program 3 of 9 is being compiled"
    metrics = type("None", (), {"count": lambda *_: None, "render": lambda *_: ""})


def test_a_key_is_asked_for_compared_and_never_shown(tokenizer, caplog):
    app = Api(Idle(), ServedModel("m", tokenizer, 512, 64), Access(("key-a", "鍵"), loopback=False)).app()
    for key, status in (("key-a", 200), ("鍵", 200), ("key-b", 401), ("", 401), ("\xff", 401)):
        found, body = respond(app, "/v1/models", [(b"authorization", b"Bearer " + key.encode())])
        assert found == status and b"key-" not in body
    assert respond(app, "/v1/models")[0] == 401 and respond(app, "/")[0] == 200
    assert "key-" not in caplog.text


def test_until_it_is_ready_health_says_what_it_does(tokenizer):
    app = Api(Idle(), ServedModel("m", tokenizer, 512, 64), Access(loopback=False)).app()
    status, body = respond(app, "/health")
    assert status == 503 and "program 3 of 9" in json.loads(body)["message"]


def test_an_unexpected_error_is_one_500_without_details(tokenizer, caplog):
    api = Api(Idle(), ServedModel("m", tokenizer, 512, 64), Access(loopback=False))
    api._describe = lambda: 1 / 0
    status, body = respond(api.app(), "/v1/models")
    assert status == 500 and b"division" not in body and "division" in caplog.text


def test_a_body_that_does_not_come_is_no_error_of_the_server(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr("tanuki_jax.serve.app.BODY_SECONDS", 0.01)
    app = Api(Idle(), ServedModel("m", tokenizer, 512, 64), Access(loopback=False)).app()

    async def leave():
        return {"type": "http.disconnect"}

    async def wait():
        await asyncio.sleep(60)

    assert respond(app, "/tokenize", method="POST", receive=leave)[0] == 499 and not caplog.text
    assert respond(app, "/tokenize", method="POST", receive=wait)[0] == 408


def test_a_model_that_cannot_be_served_is_one_error(loaded):
    with pytest.raises(UserError, match="no room"), serve.background(loaded, serve.Options(max_length=1)):
        pass
    with (
        pytest.raises(UserError, match="65 is more than the 64 tokens"),
        serve.background(loaded, serve.Options(max_length=65)),
    ):
        pass
    with pytest.raises(UserError, match=r"fewer --slots"), serve.background(loaded, serve.Options(slots=10**9)):
        pass
    broken = dataclasses.replace(loaded, params={})
    with pytest.raises(UserError, match="the engine has failed"), serve.background(broken, serve.Options(slots=1)):
        pass


def test_a_server_whose_thread_ends_gives_no_url(loaded, monkeypatch):
    async def end(*_):
        raise SystemExit(3)  # as uvicorn does

    monkeypatch.setattr(Server, "serve", end)
    options = serve.Options(slots=1, compile_first=False)
    with pytest.raises(UserError, match=r"has ended: SystemExit\(3\)"), serve.background(loaded, options):
        pytest.fail("there is no server")


def test_whoever_is_cancelled_while_an_answer_comes_leaves_no_task_behind():
    class Client:
        async def receive(self):
            await asyncio.Event().wait()

    class Silent:
        cancelled = 0

        def submit(self, jobs, sends):
            return jobs

        def cancel(self, rows):
            self.cancelled += len(rows)

    async def leave():
        with Exchange(engine, ["a job"]) as exchange:
            task = asyncio.create_task(exchange.collect([], Client()))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await asyncio.sleep(0)
            return asyncio.all_tasks() - {asyncio.current_task()}

    engine = Silent()
    assert not asyncio.run(leave()) and engine.cancelled == 1


def test_api_errors_are_ascii():
    assert ApiError(400, "\ud800 鍵").body().isascii()
