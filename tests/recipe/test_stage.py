"""What a stage may start from, and which data it accepts when it goes on."""

import json
import shutil

import jax
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, parallel
from tanuki_jax.cli.main import main
from tanuki_jax.recipe import placement
from tanuki_jax.train.optimizer import make_optimizer
from tests import tiny_recipe
from tests.tiny_recipe import CONFIG

ROWS = [{"text": "".join(chr(0x3042 + (7 * i + j * j) % 60) for j in range(150))} for i in range(60)]
RECIPE = """
from ml_collections import ConfigDict
from tests import tiny_recipe
from tanuki_jax import config

def get_config():
    c = tiny_recipe.get_config()
    c.model.n_layers = 1
    c.scoring.prompts = 0
    c.data = dict(ja={data!r})
    c.tokenizer.update(dict(vocab_size=400, sources=()))
    row = dict(mixture=dict(ja=(1.0,)), seq_len=32, batch_size=8, save_every=2)
    c.stages = ConfigDict()
    c.stages.scratch = config.stage("pretrain", moe=True, steps=3, **row)
    c.stages.more = config.stage("pretrain", init_from="scratch", restore="all", steps=2, **row)
    return c
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A workdir whose two stages are done, with the recipe and its data beside it."""
    home = tmp_path_factory.mktemp("stages")
    write(home, ROWS)
    (home / "recipe.py").write_text(RECIPE.format(data=str(home / "ja.jsonl")))
    assert run(home) == 0
    return home


def write(home, rows):
    (home / "ja.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(home, *flags):
    return main(["run", f"--config={home / 'recipe.py'}", f"--workdir={home / 'run'}", *flags])


LOW = ("--config.model.param_dtype=bfloat16", "--config.stages.scratch.optimizer.moment_dtype=bfloat16")
TIGHT = ("--config.model.capacity_factor=1.0", "--config.mesh.fsdp=2", "--config.mesh.data=2", "--config.mesh.context=2")


def test_with_bfloat16_and_little_room_a_stage_goes_on_bit_by_bit_and_on_the_same_devices_only(home, tmp_path, capfd):
    """As after a kill behind the save of step 2."""
    flags = [f"--config={home / 'recipe.py'}", f"--workdir={tmp_path / 'run'}", "--stage=scratch", *LOW, *TIGHT]
    assert main(["train", *flags]) == 0
    stage = tmp_path / "run/stages/scratch"
    whole = checkpoint.load(stage).params
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(whole)} == {"float32", "bfloat16"}
    shutil.rmtree(stage / "checkpoints/3")
    (stage / "done.json").unlink()
    changed = {
        "stages.scratch.gradient_accumulation_steps was 1, is 2": "--config.stages.scratch.gradient_accumulation_steps=2",
        "mesh.data was 2, is 1; mesh.fsdp was 2, is 4": ["--config.mesh.data=1", "--config.mesh.fsdp=4"],
    }
    for words, flag in changed.items():
        capfd.readouterr()
        assert main(["train", *flags, *([flag] if isinstance(flag, str) else flag)]) == 1
        assert f"stage scratch: {words}. With model.capacity_factor 1" in capfd.readouterr().err
    assert main(["train", *flags]) == 0
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(stage).params, whole)


def adam_steps(home, name):
    """How many steps Adam's moments of a stage's last checkpoint have seen."""
    loaded = checkpoint.load(home / "run" / "stages" / name)
    recipe = config.resolve(loaded.meta["recipe"])
    optimizer = make_optimizer(recipe.stages[name].optimizer)
    abstract, _ = placement.state_shardings(loaded.cfg, optimizer, parallel.make_mesh(config.Mesh()))
    opened = checkpoint.Checkpoints(loaded.stage_directory, keep=checkpoint.KEEP_ALL)
    state = opened.restore(opened.latest(), abstract)
    opened.close()
    return int(state.opt_state[0].count), int(state.step)


def test_a_mixture_from_random_weights_and_a_stage_that_carries_its_moments(home):
    assert checkpoint.load(home / "run" / "stages" / "scratch").cfg.n_experts == 4
    assert adam_steps(home, "scratch") == (3, 3)
    assert adam_steps(home, "more") == (5, 2)  # Adam goes on; steps, and with them the schedule, begin anew


def test_changed_data_is_refused_unless_it_is_meant(home, capsys):
    done = home / "run" / "stages" / "more" / "done.json"
    kept = done.read_text()
    write(home, [*ROWS, {"text": "狸"}])
    done.unlink()
    assert run(home) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "its data is not what the checkpoint" in message and "--allow_data_change" in message
    assert run(home, "--allow_data_change") == 0
    assert json.loads(done.read_text())["entry"]["tokens"] == json.loads(kept)["entry"]["tokens"]


def test_a_stage_starts_from_a_mixture_of_another_run(tmp_path, tmp_path_factory, capsys):
    other = tiny_recipe.trained(tmp_path_factory.getbasetemp()) / "stages" / "continued"
    start = ["train", CONFIG, "--stage=sft", f"--config.tokenizer.path={other / 'tokenizer'}", "--config.scoring.prompts=0"]
    start += [f"--config.stages.sft.init_from={other}", f"--workdir={tmp_path / 'run'}"]
    assert main(start) == 1
    assert "another architecture: n_experts 4 (here 0)" in capsys.readouterr().err
    start[-1] = f"--workdir={tmp_path / 'mixture'}"
    assert main([*start, "--config.stages.sft.moe=True"]) == 0
    assert checkpoint.load(tmp_path / "mixture" / "stages" / "sft").cfg.n_experts == 4
