import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tanuki_jax import files
from tanuki_jax.cli.main import main
from tanuki_jax.cli.verbs import _prefetch_weights
from tests import tiny_recipe
from tests.tiny_recipe import CONFIG, STAGES, times

VERBS = ("run", "train", "upcycle", "tokenizer train", "tokenizer report", "data prepare", "data inspect")
VERBS += ("score", "generate", "chat")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny_recipe.trained(tmp_path_factory.getbasetemp())


def answer(capsys, *flags):
    """stdout of a command that must succeed."""
    capsys.readouterr()
    assert main(flags) == 0
    return capsys.readouterr().out


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_of_every_verb_imports_nothing_heavy():
    code = f"""
import sys
from tanuki_jax.cli.main import main
for verb in ["", *{VERBS!r}]:
    try:
        main([*verb.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0
print(sorted({{"jax", "flax", "numpy", "orbax", "ml_collections", "tokenizers"}} & sys.modules.keys()))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    assert all(f"tanuki {verb}" in found.stdout for verb in VERBS)


def test_no_verb_at_all_prints_the_help(capsys):
    assert "tanuki run --config=configs/nano.py" in answer(capsys)


# --- what the verbs do --------------------------------------------------------------------------------------------------

ROWS = ["狸が住んでいます。", "What is the sum of 1, 2, 3?"]


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "texts.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in ROWS))


def scored(capsys, checkpoint, file):
    out = answer(capsys, "score", f"--checkpoint={checkpoint}", f"--input={file}", "--json")
    return json.loads(out)["rows"]


def test_score_prints_one_document_of_log_probabilities(trained, texts, tmp_path, capsys):
    found = scored(capsys, trained / "stages/dpo", texts)
    assert [row.keys() for row in found] == [{"logprob", "tokens"}] * 2
    for row in found:  # after four steps every token is still about as likely as any other
        assert row["logprob"] / row["tokens"] == pytest.approx(-np.log(768), abs=0.5)
    parts = write(tmp_path / "parts.jsonl", json.dumps({"prompt": ROWS[1][:8], "completion": ROWS[1][8:]}))
    [part] = scored(capsys, trained / "stages/dpo", parts)
    assert part["tokens"] < found[1]["tokens"] and part["logprob"] > found[1]["logprob"]


def test_a_stages_directory_means_its_newest_step(trained, texts, capsys):
    home = trained / "stages/sft"
    assert scored(capsys, home, texts) == scored(capsys, home / "checkpoints/4", texts)


def test_upcycle_by_copy_changes_no_score_and_by_noise_does(trained, texts, tmp_path, capsys):
    before = [row["logprob"] for row in scored(capsys, trained / "stages/pretrain", texts)]
    for strategy, equal in (("copy", True), ("noise", False)):
        output = tmp_path / strategy
        flags = [f"--checkpoint={trained / 'stages/pretrain'}", f"--output={output}", f"--strategy={strategy}"]
        assert "experts" in answer(capsys, "upcycle", *flags, "--n_experts=4", "--noise_std=0.1", "--router_std=1")
        after = [row["logprob"] for row in scored(capsys, output, texts)]
        assert (after == pytest.approx(before, abs=1e-3)) == equal


def test_generate_continues_and_is_repeatable(trained, capsys):
    flags = ["generate", f"--checkpoint={trained / 'stages/dpo'}", "--prompt=狸は", "--max_new_tokens=5", "--json"]
    found = json.loads(answer(capsys, *flags))
    assert found.keys() == {"prompt", "text", "tokens"} and found["prompt"] == "狸は" and found["tokens"] <= 5
    assert json.loads(answer(capsys, *flags)) == found


def test_what_a_verb_will_read_is_the_newest_weights_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(files, "advise_willneed", asked.extend)
    for step in (7, 20, 3):
        for name in ("params/a/0.0", "optimizer/mu/0", "meta/metadata"):
            path = tmp_path / f"checkpoints/{step}" / name
            path.parent.mkdir(parents=True)
            path.touch()
        os.utime(tmp_path / f"checkpoints/{step}/params", (step, step))
    for name in ("model-1.safetensors", "pytorch_model.bin"):
        (tmp_path / name).touch()
    _prefetch_weights(tmp_path)
    expected = {"model-1.safetensors", "checkpoints/20/params/a/0.0", "checkpoints/20/meta/metadata"}
    assert {str(path.relative_to(tmp_path)) for path in asked} == expected
    asked.clear()
    _prefetch_weights(tmp_path / "checkpoints/3")
    assert {path.name for path in asked} == {"0.0", "metadata"}
    _prefetch_weights(tmp_path / "gone")
    main(["upcycle", f"--checkpoint={tmp_path}", f"--output={tmp_path / 'mixture'}", "--dry_run"])
    assert len(asked) == 2  # a dry run times the disk, and reads little


def test_tokenizer_report_and_data_inspect_print_one_document(trained, texts, tmp_path, capsys):
    tokenizer = f"--tokenizer={trained / 'stages/pretrain/tokenizer'}"
    report = json.loads(answer(capsys, "tokenizer", "report", tokenizer, f"--input={texts}", "--json"))
    [figures] = report["domains"][str(texts)].values()
    assert figures["lines"] == 2 and figures["round_trip"] == 1.0 and figures["special"] == 0
    answer(capsys, "data", "prepare", f"--input={texts}", tokenizer, f"--output={tmp_path / 'store'}")
    found = json.loads(answer(capsys, "data", "inspect", f"--data={tmp_path / 'store'}", tokenizer, "--json"))
    assert (found["kind"], found["rows"], len(found["shown"])) == ("text", 2, 2)
    assert [d["parts"][0]["text"].removesuffix("</s>") for d in found["shown"]] == ROWS
    [store] = (trained / "data").glob("store-dialogues-*")
    shown = json.loads(answer(capsys, "data", "inspect", f"--data={store}", tokenizer, "--json"))["shown"]
    assert all(part["trained"] == part["text"].endswith("</s>") for d in shown for part in d["parts"])


def test_tokenizer_train_writes_a_tokenizer(trained, tmp_path, capsys):
    [text] = (trained / "data").glob("rules-documents_ja-*.jsonl")
    output = tmp_path / "new"
    answer(capsys, "tokenizer", "train", f"--input={text}", f"--output={output}", "--vocab_size=640")
    assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"} <= {path.name for path in output.iterdir()}


# --- bad input ----------------------------------------------------------------------------------------------------------

TALK = {"role": "user", "content": "こんにちは"}
RUN, TRAIN = ["run", CONFIG, "--workdir={new}"], ["train", CONFIG, "--workdir={new}", "--stage=pretrain"]
READY = [*TRAIN, "--config.tokenizer.path={tokenizer}", "--config.scoring.prompts=0"]
PREPARE = ["data", "prepare", "--tokenizer={tokenizer}", "--output={new}"]
FROM = ["--checkpoint={run}/stages/pretrain"]
WEIGHTS = "--config.stages.pretrain.mixture."
# What is given: flags, contents of the file that they name as {file}, and the words that the message must have.
BAD = {
    "unknown verb": (["runn"], None, ["runn", "run"]),
    "missing flag": (["score", *FROM], None, ["tanuki score", "--input", "--help"]),
    "unknown flag": (["score", *FROM, "--input={file}", "--quick"], None, ["--quick"]),
    "no sub-verb": (["data"], None, ["prepare|inspect"]),
    "config for a verb without one": (["score", CONFIG, *FROM, "--input={file}"], None, ["tanuki score", "--config"]),
    "not a number": ([*RUN, "--config.seed=one"], None, ["seed", "one"]),
    # config
    "missing config": (["run", "--config=nowhere.py", "--workdir={new}"], None, ["nowhere.py", "configs/"]),
    "no config": (["run", "--workdir={new}"], None, ["--config is missing"]),
    "config with an error": (["run", "--config={file}", "--workdir={new}"], "def get_config(:", ["bad.py"]),
    "config that raises": (["run", "--config={file}", "--workdir={new}"], "1 / 0", ["bad.py", "division"]),
    "config of something else": (
        ["run", "--config={file}", "--workdir={new}"],
        "def get_config(): return 3",
        ["group of keys"],
    ),
    "config that imports": (["run", "--config={file}", "--workdir={new}"], "import nowhere", ["bad.py", "nowhere"]),
    "unknown key": ([*RUN, "--config.stages.pretrain.stepz=3"], None, ["stepz", "steps"]),
    "wrong type": ([*RUN, "--config.stages.pretrain.steps=many"], None, ["steps", "many"]),
    "unknown stage": (["train", CONFIG, "--workdir={new}", "--stage=rlhf"], None, ["--stage", "'rlhf'", "pretrain", "dpo"]),
    "no weight": ([*RUN, f"{WEIGHTS}ja=(0.0,)", f"{WEIGHTS}synthetic=(0.0,)"], None, ["stages.pretrain.mixture", "sum to 0"]),
    "batch and mesh": (
        [*RUN, "--config.stages.pretrain.batch_size=12", "--config.mesh.fsdp=8"],
        None,
        ["batch_size 12", "8 groups of devices"],
    ),
    "mesh and devices": ([*RUN, "--config.mesh.data=3"], None, ["mesh", "8 devices"]),
    "vocabulary": ([*READY, "--config.model.vocab_size=128"], None, ["model.vocab_size 128", "720", "768"]),
    "unknown rules": ([*READY, "--config.data.ja=rules:poems"], None, ["data.ja", "rules:poems", "documents_ja"]),
    "kind of rows": ([*READY, "--config.data.ja=rules:pairs"], None, ["stage pretrain", "'ja'", "pair", "text"]),
    "another workdir": (["run", CONFIG, "--workdir={run}", "--config.seed=1"], None, ["--workdir", "seed was 0, is 1"]),
    "workdir that is a file": (["run", CONFIG, "--workdir={file}"], "", ["--workdir", "bad"]),
    # data
    "missing data": ([*READY, "--config.data.ja={file}.jsonl"], None, ["bad", "no such file"]),
    "data not named": ([*READY, "--config.data.ja="], None, ["data.ja is empty", "--config.data.ja="]),
    "too little data": ([*READY, "--config.data.ja={file}"], '{"text": "狸"}', ["stage pretrain", "'ja'", "too little"]),
    "empty corpus": ([*PREPARE, "--input={file}"], "", ["bad.jsonl", "empty"]),
    "empty corpus of a stage": ([*READY, "--config.data.ja={file}"], "", ["bad.jsonl", "empty"]),
    "nothing to learn pieces from": (["tokenizer", "train", "--input={file}", "--output={new}"], "", ["tokenizer", "empty"]),
    "nothing to report on": (["tokenizer", "report", "--tokenizer={tokenizer}", "--input={file}"], "", ["no text"]),
    "no text": ([*PREPARE, "--input={file}"], '{"text": "a"}\n{"txt": "b"}\n', ["bad.jsonl:2", "text", "txt"]),
    "text that is none": ([*PREPARE, "--input={file}"], '{"text": 3}\n', ["bad.jsonl:1", "text"]),
    "no JSON": ([*PREPARE, "--input={file}"], '{"text": "a"}\n{"text": \n', ["bad.jsonl:2", "not JSON"]),
    "no object": ([*PREPARE, "--input={file}"], "[3]\n", ["bad.jsonl:1", "JSON object", "list"]),
    "no UTF-8": ([*PREPARE, "--input={file}"], b'{"text": "a"}\n{"text": "\xff"}\n', ["bad.jsonl:2", "UTF-8", "byte 10"]),
    "lone surrogate": ([*PREPARE, "--input={file}"], '{"text": "a"}\n{"text": "\\ud800"}\n', ["bad.jsonl:2", "surrogate"]),
    "cut gzip": ([*PREPARE, "--input={file}"], gzip.compress(b'{"text": "a"}\n' * 99)[:-9], ["bad.jsonl.gz", "gzip"]),
    "no assistant": ([*PREPARE, "--input={file}"], json.dumps({"messages": [TALK]}), ["bad.jsonl:1", "assistant turn"]),
    "no messages": ([*PREPARE, "--input={file}"], '{"messages": []}', ["bad.jsonl:1", "conversation is empty"]),
    "unknown role": (
        [*PREPARE, "--input={file}"],
        json.dumps({"messages": [TALK, {"role": "tanuki", "content": "ぽん"}]}),
        ["bad.jsonl:1", "message 1", "'tanuki'", "chat template"],
    ),
    "two kinds": (
        [*PREPARE, "--input={file}"],
        '{"text": "a"}\n' + json.dumps({"messages": [TALK, {**TALK, "role": "assistant"}]}),
        ["bad.jsonl:2", "dialogue", "text"],
    ),
    "unknown kind of file": ([*PREPARE, "--input={tokenizer}/tokenizer.model"], None, ["tokenizer.model", ".jsonl"]),
    "nothing to score": (["score", *FROM, "--input={file}"], '{"messages": []}', ["row 1", "text"]),
    "no store": (["data", "inspect", "--data={empty}", "--tokenizer={tokenizer}"], None, ["manifest.json", "data prepare"]),
    # what is read and written
    "no tokenizer": (["data", "prepare", "--tokenizer={empty}", "--input={file}", "--output={new}"], "", ["tokenizer.json"]),
    "no checkpoints": (
        ["generate", "--checkpoint={empty}", "--prompt=a"],
        None,
        ["no checkpoints/<step>", "stage's directory"],
    ),
    "no such checkpoint": (["score", "--checkpoint={new}", "--input={file}"], '{"text": "a"}', ["no checkpoints/<step>"]),
    "output of data": (["data", "prepare", "--tokenizer={tokenizer}", "--input={file}", "--output={empty}"], "", ["--output"]),
    "output of a tokenizer": (["tokenizer", "train", "--input={file}", "--output={empty}"], "", ["--output", "already"]),
    "output of upcycling": (["upcycle", *FROM, "--output={empty}"], None, ["--output", "already"]),
    "upcycling a mixture": (["upcycle", "--checkpoint={run}/stages/sft", "--output={new}"], None, ["mixture already"]),
    "experts": (["upcycle", *FROM, "--output={new}", "--n_experts=2", "--top_k=3"], None, ["top_k 3", "n_experts 2"]),
    "folder as a file": ([*PREPARE, "--input={folder}"], None, ["folder.txt"]),
    "output under a file": (["data", "prepare", "--tokenizer={tokenizer}", "--input={file}", "--output={file}/a"], "", ["bad"]),
    "damaged tokenizer": (["data", "prepare", "--tokenizer={damaged}", "--input={file}", "--output={new}"], "", ["damaged"]),
    "damaged workdir": (["run", CONFIG, "--workdir={damaged}"], None, ["damaged", "recipe.json"]),
    "sampling": (["generate", *FROM, "--prompt=a", "--top_p=2"], None, ["--top_p"]),
    "another architecture": (
        [*READY, "--config.stages.pretrain.init_from={run}/stages/pretrain", "--config.model.d_ff=32"],
        None,
        ["stages/pretrain", "another architecture", "d_ff 24 (here 32)"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_says_what_and_where(case, trained, tmp_path, capsys):
    flags, contents, words = BAD[case]
    suffix = ".py" if "config" in case else ".jsonl.gz" if isinstance(contents, bytes) and contents[:1] == b"\x1f" else ".jsonl"
    file = write(tmp_path / f"bad{suffix}", contents or "") if contents is not None else tmp_path / f"bad{suffix}"
    places = {name: tmp_path / name for name in ("new", "empty", "damaged")} | dict(folder=tmp_path / "folder.txt")
    for name in ("empty", "damaged", "folder"):
        places[name].mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "recipe.json"):
        write(places["damaged"] / name, "{")
    given = set(tmp_path.rglob("*"))
    before = times(trained)
    capsys.readouterr()
    code = main(
        [flag.format(**places, file=file, run=trained, tokenizer=trained / "stages/pretrain/tokenizer") for flag in flags]
    )
    found = capsys.readouterr()
    assert code == 1 and found.out == ""
    *progress, line = found.err.splitlines()
    assert line.startswith("tanuki: ") and all(word in line for word in words), line
    assert not any(p.startswith(("tanuki: ", "Traceback")) for p in progress)
    assert flags[0] in ("run", "train") or not progress
    made = set(tmp_path.rglob("*")) - given
    assert not [path for path in made if "tmp" in path.name or path.name == "done.json"]
    assert flags[0] in ("run", "train") or not made  # no --output
    assert times(trained) == before


def test_a_missing_stage_is_named_before_anything_is_trained(trained, tmp_path, capsys):
    assert main(["train", CONFIG, f"--workdir={tmp_path}", "--stage=dpo", "--config.scoring.prompts=0"]) == 1
    assert "dpo needs stage sft, which is not finished" in capsys.readouterr().err


def test_the_stages_of_the_tiny_recipe_are_those_of_the_paper(trained):
    assert {path.name for path in (trained / "stages").iterdir()} == set(STAGES)
