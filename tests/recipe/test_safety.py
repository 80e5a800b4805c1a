"""Secrets stay where they are, nothing is written outside a run's directory, and what is loaded is data, never code."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tanuki_jax import config, interop
from tanuki_jax.data.chat import encode_chat
from tanuki_jax.errors import UserError
from tests import tiny_recipe
from tests.recipe.test_resume import ROOT

SECRETS = {
    name: f"s3cret-{name}-value" for name in ("WANDB_API_KEY", "HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "AWS_SECRET")
}


# --- secrets ----------------------------------------------------------------------------------------------------------------


def test_no_secret_of_the_environment_is_printed_or_stored(tmp_path):
    """In none of the files of a run, the checkpoints and the report among them."""
    command = [
        sys.executable,
        "-m",
        "tanuki_jax.cli",
        "train",
        tiny_recipe.CONFIG,
        f"--workdir={tmp_path}",
        "--stage=pretrain",
        "--config.scoring.prompts=0",
    ]
    env = {**os.environ, **SECRETS, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = [done.stdout.encode(), done.stderr.encode()]
    for text in [*said, *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())]:
        assert b"s3cret" not in text and not any(name.encode() in text for name in SECRETS)


@pytest.mark.parametrize(
    "files",
    [
        "s3://key:password@bucket/*.jsonl",
        "texts/*.jsonl,https://user@host/file.jsonl",
        "https://host/f.jsonl?X-Amz-Signature=abc&x=1",
        "https://host/f.jsonl?a=1&access_token=abc",
    ],
)
def test_an_address_with_a_secret_is_refused_for_configs_are_stored(files):
    c = tiny_recipe.get_config()
    c.data.ja = files
    with pytest.raises(UserError, match="data.ja.files has a password or key") as error:
        config.resolve(c)
    assert "abc" not in str(error.value) and "password@" not in str(error.value)


@pytest.mark.parametrize("files", ["gs://bucket/a/*.jsonl.gz", "texts/a@b.jsonl", "https://host/f.jsonl?download=true"])
def test_other_addresses_are_not(files):
    c = tiny_recipe.get_config()
    c.data.ja = files
    config.resolve(c)


# --- paths ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../up", "a/b", "/etc", "..", ".hidden", "", "a\nb", "a\0b", "~", "x" * 200])
@pytest.mark.parametrize("group", ["stages", "data"])
def test_names_that_would_leave_the_workdir_are_refused(name, group):
    values = config.to_dict(config.resolve(tiny_recipe.get_config()))
    values[group][name] = values[group]["pretrain" if group == "stages" else "ja"]
    with pytest.raises(UserError, match="becomes a file's"):
        config.resolve(values)


def test_japanese_names_are_names():
    values = config.to_dict(config.resolve(tiny_recipe.get_config()))
    values["stages"]["事前学習.v2-b"] = values["stages"]["pretrain"]
    config.resolve(values)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_weights_that_lie_elsewhere_are_not_read(tmp_path, file):
    settings = dict(model_type="llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    settings |= dict(num_key_value_heads=1, vocab_size=8, rms_norm_eps=1e-5, max_position_embeddings=8)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    with pytest.raises(UserError, match="must lie beside it"):
        interop.import_huggingface(tmp_path, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


# --- code -------------------------------------------------------------------------------------------------------------------

WATCHED = """
import os, sys
from pathlib import Path
from tanuki_jax import checkpoint
from tanuki_jax.data.tokenizer import Tokenizer

def load():
    loaded = checkpoint.load(Path(sys.argv[1]))
    tokenizer = Tokenizer(loaded.tokenizer_directory)
    assert tokenizer.decode(tokenizer.encode("狸は山に住む")) == "狸は山に住む"

load()  # imports what it needs
seen = []
BAD = ("pickle.find_class", "marshal.loads", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
sys.addaudithook(lambda event, arguments: seen.append((event, arguments)) if event in BAD else None)
load()
print(seen)
"""


def test_loading_a_checkpoint_and_its_tokenizer_runs_no_code(tmp_path_factory):
    """As Python itself tells: nothing is unpickled, no process started, no address called."""
    home = tiny_recipe.trained(tmp_path_factory.getbasetemp()) / "stages/sft"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WATCHED, str(home)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch caught') }}",
        "{% for m in messages %}{{ m.update(a=1) }}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_chat_template_cannot_reach_python(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of = dict(chat_template=template, chat_templates={"default": template}, named={"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(UserError):
        encode_chat(SimpleNamespace(**of), [{"role": "user", "content": "x"}])
    assert not list(tmp_path.iterdir())
