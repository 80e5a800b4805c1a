"""The server under other people's clients, bad requests in bulk, and clients that leave; minutes."""

import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from tanuki_jax import serve
from tests import tiny_recipe
from tests.serve.conftest import NAME, SLOTS
from tests.serve.test_requests import TURN, WRONG_CHATS, WRONG_COMPLETIONS
from tests.serve.test_server import ask, chat, metric

pytestmark = pytest.mark.slow

VALUES = [
    None,
    True,
    -1,
    10**30,
    1.5,
    -1e308,
    "",
    "x" * 200,
    "\ud800",
    [],
    [[]],
    [None],
    {},
    {"a": [{}]},
    "\x00",
    "{{ 7 * 7 }}",
]
FIELDS = [
    "messages",
    "prompt",
    "n",
    "seed",
    "stop",
    "temperature",
    "max_tokens",
    "top_k",
    "logprobs",
    "stream_options",
    "model",
]
TEXT = ["", "\x00", "{{ 7 * 7 }}"]
IN_ORDER = {  # of these values, by route and field
    "chat/completions": {"prompt": [None], "logprobs": [None, True]},
    "completions": {"messages": [None], "prompt": TEXT, "logprobs": [None, True]},
}
IN_ORDER_ANYWHERE = {
    **dict(
        n=[None, True], seed=[None, True, -1], temperature=[None, True, 1.5], max_tokens=[None, True], top_k=[None, True, -1]
    ),
    **dict(stop=[None, "\ud800", [], [None], "x" * 200, *TEXT], stream_options=[None, {}]),
}


def requests():
    """Path, body, and whether it is to be refused."""
    whole = json.dumps({"model": NAME, "messages": [TURN], "max_tokens": 2}).encode()
    for cut in range(0, len(whole), 7):
        yield "/v1/chat/completions", whole[:cut], True
    for body in (b"\xff\xfe", b"[" * 5000, b'"' + b"a" * 5000, b"null", b"3", b"[]", b"{}", b'{"model": NaN}', b"{" * 5000):
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
            yield path, body, True
    for fields, *_ in WRONG_CHATS:
        yield "/v1/chat/completions", {"model": NAME, "messages": [TURN], "max_tokens": 2, **fields}, True
    for fields, *_ in WRONG_COMPLETIONS:
        yield "/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 2, **fields}, True
    contents = (("chat/completions", {"messages": [TURN]}), ("completions", {"prompt": "a"}))
    for field, value, (path, content) in itertools.product(FIELDS, VALUES, contents):
        in_order = value in (IN_ORDER_ANYWHERE | IN_ORDER[path]).get(field, [])
        yield f"/v1/{path}", {"model": NAME, "max_tokens": 2, **content, field: value}, not in_order


def test_hundreds_of_malformed_requests_are_refused_with_a_message_and_none_is_an_error_of_the_server(running):
    refused = 0
    for path, body, is_wrong in requests():
        status, _, text = ask(running, path, body, "POST")
        assert 400 <= status < 500 if is_wrong else status == 200, (path, body, text)
        if status >= 400:
            assert json.loads(text)["error"]["message"], (path, body)
            refused += 1
    assert refused >= 200
    assert chat(running, max_tokens=2).choices[0].finish_reason == "length"


def test_clients_that_leave_at_any_moment_lose_no_slot(running):
    def visit(number):
        rng = random.Random(number)
        options = dict(max_tokens=rng.randint(1, 25), temperature=rng.choice([0, 1]), extra_body={"ignore_eos": True})
        leaves = rng.random() < 0.3
        client = running.client.with_options(timeout=rng.uniform(0.001, 0.05) if leaves and rng.random() < 0.5 else 60)
        fields = dict(model=NAME, messages=[TURN], **options)
        try:
            if not leaves or rng.random() < 0.5:
                return client.chat.completions.create(**fields).usage.completion_tokens == options["max_tokens"]
            with client.chat.completions.create(**fields, stream=True) as stream:
                for _ in itertools.islice(stream, rng.randint(0, 5)):
                    pass
        except (openai.APITimeoutError, openai.RateLimitError):
            return True
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(visit, range(300)))
    answer = chat(running, max_tokens=20, n=SLOTS, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 20 * SLOTS
    assert metric(running, "queue") == 0 and metric(running, "slots_busy") <= SLOTS


def test_a_conversation_of_several_turns_in_fastchats_way(running):
    """Each turn sends all turns before it, with system message and without, and nulls where nothing is asked for."""
    messages = [{"role": "system", "content": "s"}]
    for question in ("月は?", "3と2を足すと?"):
        messages.append({"role": "user", "content": question})
        answer = chat(running, messages=messages, n=1, max_tokens=3, temperature=0.7, stop=None, user=None)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    assert len(messages) == 5


# --- the lm-evaluation-harness ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return tiny_recipe.trained(tmp_path_factory.getbasetemp()) / "stages/sft"


@pytest.fixture(scope="module")
def address(stage):
    with serve.background(stage, serve.Options(slots=4)) as url:
        yield url


@pytest.fixture
def task(tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"q": f"{question}\n{n}+{m}=", "choices": [f"{n + m}です。", f" {n}", "山にいる。", "</s>🦝"], "gold": n % 4}
        for question, n, m in itertools.product(("Question", "質問"), range(2, 7), range(3))
    ]
    rows.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

    def make(output_type, **options):
        return {
            "task": f"tiny_{output_type}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "output_type": output_type,
            "doc_to_text": "{{q}}",
            **options,
        }

    return make


def evaluate(lm, task, **options):
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra harness")
    return lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0, log_samples=True, **options)


def remote(kind, address, path):
    models = pytest.importorskip("lm_eval.models.openai_completions", reason="needs the extra harness")
    return getattr(models, kind)(
        base_url=f"{address}/{path}", model="sft", tokenizer_backend="remote", num_concurrent=1, max_retries=1, max_length=255
    )


def test_multiple_choice_over_http_is_that_of_the_harness_in_process(stage, address, task):
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    from tanuki_jax.evaluate.harness import Harness

    choice = task("multiple_choice", doc_to_choice="{{choices}}", doc_to_target="{{gold}}", metric_list=[{"metric": "acc"}])
    near, far = evaluate(Harness(stage), dict(choice)), evaluate(remote("LocalCompletionsAPI", address, "completions"), choice)
    assert near["results"]["tiny_multiple_choice"]["acc,none"] == far["results"]["tiny_multiple_choice"]["acc,none"]
    ours, theirs = (
        [response for sample in found["samples"]["tiny_multiple_choice"] for response in sample["filtered_resps"]]
        for found in (near, far)
    )
    assert len(ours) == 120
    np.testing.assert_allclose([p for p, _ in theirs], [p for p, _ in ours], rtol=1e-6, atol=1e-5)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]


def test_answers_over_http_are_those_of_the_harness_in_process(stage, address, task):
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    from tanuki_jax.evaluate.harness import Harness

    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    until = task("generate_until", doc_to_target="x", generation_kwargs=options, metric_list=[{"metric": "exact_match"}])

    def answers(lm, **settings):
        found = evaluate(lm, json.loads(json.dumps(until)), **settings)
        return [sample["resps"][0][0] for sample in found["samples"]["tiny_generate_until"]]

    def assert_equal(far, near):
        """Of bytes that spell no character the server saves more than a whole text's decoding does."""
        pairs = [(a, b) for a, b in zip(far, near, strict=True) if "\ufffd" not in b]
        assert len(pairs) >= 3 and all(a == b for a, b in pairs)

    assert_equal(answers(remote("LocalCompletionsAPI", address, "completions")), answers(Harness(stage)))
    over_http = answers(remote("LocalChatCompletion", address, "chat/completions"), apply_chat_template=True)
    assert_equal(over_http, answers(Harness(stage), apply_chat_template=True))
