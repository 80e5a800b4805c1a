"""What a model was published with goes from stage to stage and out again; and paths that lead up and down."""

import json

import pytest

from tanuki_jax import checkpoint
from tanuki_jax.cli.main import main
from tests.interop.published import assert_same_bits, config_json, export, import_, read_directory
from tests.interop.test_settings import FURTHER, SAMPLING, generation_json, given

RECIPE = """
from tanuki_jax import config

def get_config():
    c = config.recipe(tensorboard=False, data=dict(chats={chats!r}), model=dict(n_experts=2, normalized_gate=False))
    row = dict(mixture=dict(chats=(1.0,)), seq_len=32, batch_size=8, steps=1, log_every=1)
    c.stages.first = config.stage({kind!r}, init_from={init_from!r}, **({{}} if {kind!r} == "upcycle" else row))
    return c
"""


def run(base, kind, init_from):
    """The directory of the only stage of a recipe that starts from a directory; its shape and tokenizer are left out."""
    base.mkdir()
    rows = [{"messages": [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Paris"}]}] * 16
    (base / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = RECIPE.format(chats=str(base / "chats.jsonl"), kind=kind, init_from=str(init_from))
    (base / "recipe.py").write_text(text)
    assert main(["run", f"--config={base / 'recipe.py'}", f"--workdir={base / 'run'}"]) == 0
    return base / "run/stages/first"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    base = tmp_path_factory.mktemp("handed")
    home = given(base / "given", generation=SAMPLING, rope_theta=5e5, **{**FURTHER, "max_position_embeddings": 24})
    return import_(home, base / "ours")


def test_a_stage_in_a_run_of_its_own_hands_on_what_it_was_given(imported, tmp_path):
    """Trained on longer rows, then upcycled in another workdir, where no recipe tells how long they were."""
    dense = run(tmp_path / "sft", "sft", imported)
    mixture = run(tmp_path / "up", "upcycle", dense)
    for home, kind in ((dense, "llama"), (mixture, "mixtral")):
        back = export(home, tmp_path / f"{kind}-back")
        told = config_json(back)
        assert generation_json(back) == SAMPLING
        assert (told["model_type"], told["max_position_embeddings"], told["rope_theta"]) == (kind, 32, 5e5)
        assert {name: told[name] for name in ("eos_token_id", "pad_token_id", "initializer_range")} == {
            name: FURTHER[name] for name in ("eos_token_id", "pad_token_id", "initializer_range")
        }
        assert ("something_of_theirs" in told) == (kind == "llama")  # which may mean nothing to another class
    meta = checkpoint.read_meta(*checkpoint.locate(mixture))
    assert meta["longest"] == 32 and meta["published"]["generation"] == SAMPLING


def test_paths_may_lead_up_and_down_again(imported, tmp_path, monkeypatch):
    base = imported.parent
    (base / "here").mkdir()
    monkeypatch.chdir(base / "here")
    assert main(["import", "--hf=../given", "--output=../here/again"]) == 0
    assert main(["export", "--checkpoint=../here/again", "--output=../here/back"]) == 0
    assert_same_bits(read_directory(base / "here/back"), read_directory(base / "given"))
    shape = ["--n_experts=3", "--strategy=copy", "--output=../here/mixture"]
    assert main(["upcycle", "--checkpoint=../here/again", *shape]) == 0
    loaded = checkpoint.load("../here/mixture/checkpoints/0")
    assert loaded.cfg.n_experts == 3 and loaded.stage_directory == base / "here/mixture"
    assert main(["generate", "--checkpoint=../ours", "--prompt=Paris", "--max_new_tokens=1"]) == 0
