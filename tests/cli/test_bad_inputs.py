"""A user's mistakes in config files, flags, plans and checkpoints: each is one line and exit code 1, and nothing is written."""

import json

import pytest

from tanuki_jax.cli.main import main

HEAD = "from tanuki_jax import config\ndef get_config():\n    c = config.recipe(data=dict(a='a.txt'))\n"
STAGE = "    c.stages.one = config.stage('pretrain', mixture=dict(a=(1.0,)), steps=3)\n"
VALID = HEAD + STAGE + "    return c\n"
RUN = ["run", "--config={file}", "--workdir={new}"]
PLAN = ["plan", "--config={file}", "--stage=one"]
LONG = "x" * 5000
DIGITS = "1" * 5000

# What is given: flags, what {file} holds, and words that the line must have.
FILES = {
    "no file": (["run", "--config={new}.py", "--workdir={new}"], "", ["--config", "no such file", "new.py"]),
    "no name": (["run", "--config=", "--workdir={new}"], "", ["--config is missing", "configs/nano.py"]),
    "no flag": (["run", "--workdir={new}"], "", ["--config is missing"]),
    "nothing after the flag": (["run", "--config", "--workdir={new}"], "", ["--config is missing"]),
    "a directory": (["run", "--config={empty}", "--workdir={new}"], "", ["--config", "directory", "FILE.py"]),
    "a text": (["run", "--config={text}", "--workdir={new}"], "", ["--config", "not a Python file", "get_config()"]),
    "a file after a space": (["run", "--config", "{new}.py", "--workdir", "{new}"], "", ["no such file", "new.py"]),
    "two files": ([*RUN, "--config={file}"], VALID, ["--config", "more than once"]),
    "a name too long": (["run", f"--config={LONG}.py", "--workdir={new}"], "", ["--config", "name too long"]),
    "no function": (RUN, "a = 1", ["mine.py", "no get_config()"]),
    "no function but a name": (RUN, "get_config = 3", ["mine.py", "no get_config()"]),
    "nothing returned": (RUN, "def get_config(): pass", ["mine.py", "get_config() must return", "None"]),
    "a number returned": (RUN, "def get_config(): return 3", ["mine.py", "group of keys", "3"]),
    "an empty dictionary": (RUN, "def get_config(): return {}", ["no stages"]),
    "odd names": (RUN, "def get_config(): return {3: 4}", ["3"]),
    "a syntax error": (RUN, "x = 1\ndef get_config(:", ["mine.py, line 2", "not Python", "def get_config(:"]),
    "an indent": (RUN, "def get_config():\nreturn 3", ["mine.py, line 2", "indented block"]),
    "a NUL": (RUN, "x = '\0'", ["mine.py", "not Python"]),
    "other bytes": (RUN, b"x = '\xff'", ["mine.py, line 1", "utf-8"]),
    "an import": (RUN, "import nowhere", ["mine.py, line 1", "nowhere"]),
    "a division": (RUN, "def get_config():\n    return 1 / 0", ["mine.py, line 2", "division by zero", "1 / 0"]),
    "an end": (RUN, "import sys\nsys.exit(3)", ["mine.py, line 2", "ended the program"]),
    "an exception without words": (RUN, "raise RuntimeError", ["mine.py, line 1", "failed"]),
    "a missing stage": (
        RUN,
        VALID.replace("return c", "c.stages.sft.steps = 3"),
        ["mine.py, line 5", "no 'sft'", "it has one"],
    ),
    "a missing item": (RUN, VALID.replace("return c", "c.stages['sft']"), ["mine.py, line 5", "no 'sft'", "it has one"]),
    "a misspelt group": (RUN, HEAD + "    c.modle.n_layers = 3", ["mine.py, line 4", "no 'modle'", "mean 'model'"]),
    "a dictionary's key": (RUN, "def get_config():\n    return {}['sft']", ["mine.py, line 2", "no 'sft'"]),
    "a wrong type in the file": (RUN, HEAD + "    c.model.n_layers = 'three'", ["line 4", "n_layers must be int", "'three'"]),
    "an unknown key in the file": (RUN, HEAD.replace("data=", "dat="), ["mine.py, line 3", "unknown key 'dat'", "'data'"]),
    "an unknown key of a stage": (
        RUN,
        VALID.replace("steps=", "stepz="),
        ["mine.py, line 4", "unknown key 'stepz'", "'steps'"],
    ),
    "a new key": (RUN, VALID.replace("return c", "c.model.layers = 3; return c"), ["unknown key 'model.layers'"]),
    "an argument too many": (
        ["run", "--config={file}:x", "--workdir={new}"],
        VALID,
        ["get_config()", "takes no argument", ":x"],
    ),
    "an argument too few": (
        RUN,
        "def get_config(root): return root",
        ["get_config(root)", "needs an argument", "mine.py:ROOT"],
    ),
    "an argument that is wrong": (
        ["run", "--config={file}:x", "--workdir={new}"],
        "def get_config(n):\n    return int(n)",
        ["mine.py, line 2", "'x'"],
    ),
    "a file that the file opens": (
        RUN,
        "def get_config():\n    open('/nowhere/x')",
        ["mine.py, line 2", "no such file", "/nowhere/x"],
    ),
}
KEYS = {
    "no number": ("seed=abc", ["--config.seed", "'abc'", "whole number"]),
    "a float for an int": ("stages.one.steps=1e3", ["--config.stages.one.steps", "'1e3'", "whole number"]),
    "None": ("seed=None", ["--config.seed", "'None'", "whole number"]),
    "no value": ("seed", ["--config.seed", "no value"]),
    "an empty value": ("seed=", ["--config.seed", "whole number"]),
    "digits": (f"seed={DIGITS}", ["--config.seed", "whole number"]),
    "digits of a float": (f"model.norm_eps={DIGITS}", ["model.norm_eps is inf"]),
    "no bool": ("tensorboard=maybe", ["--config.tensorboard", "True or False"]),
    "no float": ("model.norm_eps=abc", ["--config.model.norm_eps", "a number"]),
    "no tuple": ("stages.one.mixture.a=0.5x", ["--config.stages.one.mixture.a", "tuple", "(0.5"]),
    "a tuple of NaN": ("stages.one.mixture.a=(nan,)", ["--config.stages.one.mixture.a", "tuple"]),
    "a tuple of text": ("stages.one.mixture.a=('x',)", ["stages.one.mixture.a must be float", "'x'"]),
    "brackets": (f"stages.one.phase_start_tokens={'(' * 3000}", ["phase_start_tokens", "tuple"]),
    "a name without quotes": ("tokenizer.sources=ja", ["--config.tokenizer.sources", "('name',)"]),
    "no dictionary": ("stages.one.mixture=3", ["--config.stages.one.mixture", "dictionary"]),
    "half a dictionary": ("stages.one.lora.targets={'attn/*'", ["--config.stages.one.lora.targets", "dictionary"]),
    "a dictionary of numbers": ("tokenizer.language_weights={1: 2}", ["tokenizer.language_weights", "names"]),
    "a group": ("model=3", ["--config.model", "group of keys", "--config.model.KEY=VALUE"]),
    "a stage": ("stages.one=3", ["stages.one is a group of keys"]),
    "all stages": ("stages=3", ["stages is a group of keys", "--config.stages.NAME.KEY=VALUE"]),
    "another stage": ("stages.two.steps=3", ["stages has no 'two'", "it has one"]),
    "another source": ("data.b=b.txt", ["data has no 'b'", "it has a"]),
    "below a value": ("seed.x=3", ["seed is one value"]),
    "a misspelt key": ("stages.one.stepz=4", ["unknown key 'stages.one.stepz'", "'steps'"]),
    "an unknown group": ("zzz.a=4", ["unknown key 'zzz'", "known here"]),
    "no key": ("=3", ["unknown key ''"]),
    "dots": ("..=3", ["unknown key ''"]),
    "no choice": ("stages.one.kind=finetune", ["stages.one.kind is 'finetune'", "pretrain"]),
    "a bool for a number": ("seed=True", ["--config.seed", "whole number"]),
    "a negative rate": ("stages.one.optimizer.learning_rate=-1", ["stages.one.optimizer.learning_rate is -1.0", "at least 0"]),
    "a rate of NaN": ("stages.one.optimizer.learning_rate=nan", ["learning_rate is nan", "at least 0"]),
    "clipping below 0": ("stages.one.optimizer.clip_norm=-1.0", ["clip_norm is -1.0; it must be 0 (off) or more"]),
    "a beta of 1": ("stages.one.optimizer.beta2=1.0", ["beta2 is 1.0", "below 1"]),
    "no rows": ("stages.one.batch_size=0", ["stages.one.batch_size is 0", "at least 1"]),
    "rows beyond all": (f"stages.one.batch_size={10**30}", ["stages.one.batch_size is 1000", "at most 10,000,000"]),
    "no port": ("prometheus_port=99999", ["prometheus_port is 99999", "65,535"]),
    "a negative port": ("prometheus_port=-1", ["prometheus_port is -1"]),
    "a seed beyond 64 bits": (f"seed={2**63}", ["seed is 9223372036854775808"]),
    "a parent with a long name": (f"stages.one.init_from={LONG}", ["stages.one.init_from", "neither a stage"]),
    "a parent that is no name": ("stages.one.init_from=a\0b", ["stages.one.init_from", "neither a stage"]),
    "the same warm-up twice": (
        "stages.one.optimizer.warmup_ratio=0.1 --config.stages.one.optimizer.warmup_steps=1",
        ["both set"],
    ),
}
FROM, TOKENIZER = "--checkpoint={empty}", ["tokenizer", "train", "--input=x", "--output={new}"]
FLAGS = {
    "no verb": (["runn"], ["runn"]),
    "a verb twice": (["run", "run", "--config={file}", "--workdir={new}"], ["unrecognized arguments: run"]),
    "a config of another verb": (["score", "--config={file}", FROM, "--input=x"], ["tanuki score", "takes no --config"]),
    "a flag like the config's": ([*RUN, "--configs=3"], ["--configs=3"]),
    "an empty workdir": (["run", "--config={file}", "--workdir="], ["--workdir", "empty"]),
    "a workdir too long": (["run", "--config={file}", f"--workdir={LONG}"], ["--workdir", "name too long"]),
    "a workdir of NUL": (["run", "--config={file}", "--workdir=a\0b"], ["--workdir", "NUL"]),
    "a workdir below a file": (["run", "--config={file}", "--workdir={file}/a"], ["mine.py/a"]),
    "a stage without a name": (["train", "--config={file}", "--workdir={new}", "--stage="], ["--stage", "empty"]),
    "no stage of it": (["train", "--config={file}", "--workdir={new}", "--stage=two"], ["--stage", "'two'", "one"]),
    "vocabulary below 0": (
        ["tokenizer", "train", "--input=x", "--output={new}", "--vocab_size=-5"],
        ["--vocab_size", "-5", "at least 1"],
    ),
    "no vocabulary": (
        ["tokenizer", "train", "--input=x", "--output={new}", "--vocab_size=many"],
        ["--vocab_size", "whole number"],
    ),
    "coverage of 2": (
        ["tokenizer", "train", "--input=x", "--output={new}", "--character_coverage=2"],
        ["--character_coverage", "at most 1"],
    ),
    "coverage of NaN": (
        ["tokenizer", "train", "--input=x", "--output={new}", "--character_coverage=nan"],
        ["--character_coverage", "nan"],
    ),
    "language_weights of nothing": ([*TOKENIZER, "--language_weights=ja"], ["--language_weights", "ja=0.65,en=0.35"]),
    "a share of NaN": ([*TOKENIZER, "--language_weights=ja=nan"], ["--language_weights", "ja=nan", "above 0"]),
    "a share below 0": ([*TOKENIZER, "--language_weights=ja=0.5,en=-1"], ["--language_weights", "en=-1", "above 0"]),
    "a share twice": ([*TOKENIZER, "--language_weights=ja=0.5,ja=0.5"], ["--language_weights", "ja=0.5", "twice"]),
    "rows below 0": (
        ["data", "inspect", "--data={empty}", "--tokenizer={empty}", "--rows=-1"],
        ["--rows", "it is -1", "at least 0"],
    ),
    "rows of 1e3": (["data", "inspect", "--data={empty}", "--tokenizer={empty}", "--rows=1e3"], ["--rows", "whole number"]),
    "no length": (["data", "inspect", "--data={empty}", "--tokenizer={empty}", "--seq_len=-8"], ["--seq_len", "-8"]),
    "workers below 0": (
        ["data", "prepare", "--input=x", "--tokenizer={empty}", "--output={new}", "--workers=-1"],
        ["--workers", "-1"],
    ),
    "shards of nothing": (
        ["data", "prepare", "--input=x", "--tokenizer={empty}", "--output={new}", "--shard_characters=0"],
        ["--shard_characters", "at least 1"],
    ),
    "no new tokens": (["generate", FROM, "--prompt=a", "--max_new_tokens=0"], ["--max_new_tokens", "it is 0", "at least 1"]),
    "temperature of NaN": (["generate", FROM, "--prompt=a", "--temperature=nan"], ["--temperature", "nan"]),
    "temperature below 0": (["generate", FROM, "--prompt=a", "--temperature=-1"], ["--temperature", "-1"]),
    "a temperature of nearly 0": (["chat", FROM, "--temperature=1e-30"], ["--temperature", "0, or at least 0.001"]),
    "infinite temperature": (["chat", FROM, "--temperature=inf"], ["--temperature", "inf"]),
    "top_p of 2": (["generate", FROM, "--prompt=a", "--top_p=2"], ["--top_p", "it is 2", "at most 1"]),
    "top_p of 0": (["chat", FROM, "--top_p=0"], ["--top_p", "at least 1e-06"]),
    "a seed of text": (["generate", FROM, "--prompt=a", "--seed=abc"], ["--seed", "'abc'", "whole number"]),
    "a seed too large": (["generate", FROM, "--prompt=a", f"--seed={2**64}"], ["--seed", "at most"]),
    "no prompt": (["generate", FROM], ["--prompt"]),
    "rows of a model below 0": (["export", FROM, "--output={new}", "--vocab_size=-1"], ["--vocab_size", "-1"]),
    "an unknown format": (["export", FROM, "--output={new}", "--format=gguf"], ["--format", "gguf", "peft"]),
    "experts of -1": (["upcycle", FROM, "--output={new}", "--n_experts=-1"], ["--n_experts", "-1"]),
    "top_k of 1.5": (["upcycle", FROM, "--output={new}", "--top_k=1.5"], ["--top_k", "whole number"]),
    "noise of infinity": (["upcycle", FROM, "--output={new}", "--noise_std=inf"], ["--noise_std", "inf"]),
    "digits for a flag": (["upcycle", FROM, "--output={new}", f"--seed={DIGITS}"], ["--seed"]),
}
PLANS = {
    "no slice": ("v7-3", ["--topology", "'v7-3'", "v5p-256"]),
    "an empty name": ("", ["--topology", "v5p-256"]),
    "a pair of chips": ("v6e-2", ["no slice 'v6e-2'", "v6e-4"]),
    "three chips": ("v6e-3", ["no slice 'v6e-3'"]),
    "nothing": ("v5p-0", ["no slice 'v5p-0'", "v5p-8"]),
    "too large": ("v6e-512", ["no slice 'v6e-512'", "v6e-256"]),
    "no slices": ("0xv6e-8", ["no slice '0xv6e-8'"]),
    "slices beyond all": ("99999xv6e-256", ["chips", "65,536"]),
    "digits for a slice": (f"v6e-{DIGITS}", ["--topology"]),
}
READERS = {
    "score": ["score", "--input=x.jsonl"],
    "generate": ["generate", "--prompt=a"],
    "chat": ["chat"],
    "export": ["export", "--output={new}"],
    "upcycle": ["upcycle", "--output={new}"],
}
PLACES = {
    "nothing": ("{new}", ["new"]),
    "an empty directory": ("{empty}", ["no checkpoints/<step>"]),
    "a file": ("{file}", ["mine.py"]),
    "a step that is empty": ("{hollow}", ["hollow", "step 3"]),
    "meta that is no JSON": ("{damaged}", ["damaged", "step 3"]),
    "meta that is a list": ("{list}", ["list", "step 3"]),
    "meta without a model": ("{bare}", ["bare", "step 3", "'model' is missing"]),
    "meta of a model that cannot be": ("{odd}", ["odd", "step 3", "d_model is -1"]),
    "meta of another version": ("{other}", ["other", "step 3", "unknown key 'widht'"]),
    "one step's directory": ("{damaged}/checkpoints/3", ["damaged", "step 3"]),
}
META = {
    "damaged": "{",
    "list": "[]",
    "bare": "{}",
    "odd": json.dumps({"model": {"d_model": -1}}),
    "other": json.dumps({"model": {"widht": 3}}),
}


def refused(flags, words, directory, contents, capsys):
    """Runs the command line in an empty directory with a config file; it must say one line, exit 1 and write nothing."""
    file, text, empty = directory / "mine.py", directory / "text.txt", directory / "empty"
    file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    text.write_text("hello")
    empty.mkdir()
    for name in ("hollow", *META):
        (directory / name / "checkpoints/3/meta").mkdir(parents=True)
        if name in META:
            (directory / name / "checkpoints/3/meta/metadata").write_text(META[name])
    places = {name: directory / name for name in ("new", "empty", "hollow", *META)} | {"file": file, "text": text}
    before = set(directory.rglob("*"))
    capsys.readouterr()
    code = main([fill(flag, places) for flag in flags])
    found = capsys.readouterr()
    assert code == 1 and found.out == "", found
    [line] = found.err.splitlines()
    assert line.startswith("tanuki: ") and "Traceback" not in line and len(line) < 6000
    assert all(word in line for word in words), line
    assert set(directory.rglob("*")) == before


def fill(flag, places):
    for name, path in places.items():
        flag = flag.replace("{" + name + "}", str(path))
    return flag


def test_there_are_more_than_sixty():
    assert sum(map(len, (FILES, KEYS, FLAGS, PLANS))) + len(READERS) * len(PLACES) > 150


@pytest.mark.parametrize("case", FILES)
def test_a_config_file_with_a_mistake(case, tmp_path, capsys):
    flags, contents, words = FILES[case]
    refused(flags, words, tmp_path, contents, capsys)


@pytest.mark.parametrize("case", KEYS)
def test_a_key_set_wrongly(case, tmp_path, capsys):
    given, words = KEYS[case]
    flags = [f"--config.{part}" for part in given.split(" --config.")]
    refused([*RUN, *flags], words, tmp_path, VALID, capsys)


@pytest.mark.parametrize("case", FLAGS)
def test_a_flag_with_a_mistake(case, tmp_path, capsys):
    flags, words = FLAGS[case]
    refused(flags, words, tmp_path, VALID, capsys)


@pytest.mark.parametrize("case", PLANS)
def test_a_slice_that_is_none(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    topology, words = PLANS[case]
    refused([*PLAN, f"--topology={topology}"], words, tmp_path, VALID, capsys)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("verb", READERS)
def test_a_checkpoint_that_is_none(verb, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    path, words = PLACES[place]
    (tmp_path / "x.jsonl").write_text('{"text": "a"}')
    flags = [flag.replace("x.jsonl", str(tmp_path / "x.jsonl")) for flag in READERS[verb]]
    refused([*flags, f"--checkpoint={path}"], words, tmp_path, VALID, capsys)


@pytest.mark.parametrize("spelt", ["--config {file} --workdir {new}", "--workdir={new} --config={file}"])
def test_a_space_is_as_good_as_a_sign(spelt, tmp_path, monkeypatch):
    from tanuki_jax.recipe import run

    ran = []
    monkeypatch.setattr(run, "run_recipe", lambda loaded, workdir, *_: ran.append((loaded.seed, loaded.tensorboard, workdir)))
    (tmp_path / "mine.py").write_text(VALID)
    flags = spelt.replace("{file}", str(tmp_path / "mine.py")).replace("{new}", str(tmp_path / "new")).split()
    assert main(["run", *flags, "--config.seed", "-7", "--config.tensorboard", "false", "--config.seed=9"]) == 0
    assert ran == [(9, False, tmp_path / "new")]


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--work=x", "--config=configs/nano.py"],
        ["train", "--stag=sft", "--workdir=x", "--config=configs/nano.py"],
        ["data", "prepare", "--in=a.txt", "--tokenizer=t", "--output=o"],
        ["export", "--checkpoint=c", "--out=o"],
        ["launch", "gke", "status", "--nam=x"],
    ],
)
def test_a_flag_that_is_cut_short_is_none(words, capsys):
    """Of --slice=2 for --slices=2 nobody would know which flag is meant when another one begins alike."""
    assert main(words) == 1
    assert "unrecognized arguments" in (error := capsys.readouterr().err) or "required" in error
