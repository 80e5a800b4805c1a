from pathlib import Path

from tanuki_jax import files
from tanuki_jax.recipe.workdir import Workdir


def test_what_a_stage_starts_from_is_a_stage_of_the_run_or_a_directory(tmp_path):
    workdir, stages = Workdir(tmp_path), {"pretrain", "sft"}
    assert workdir.init_checkpoint("", stages) is None
    assert workdir.init_checkpoint("pretrain", stages) == workdir.stage_dir("pretrain") == tmp_path / "stages/pretrain"
    assert workdir.init_checkpoint("other/run", stages) == Path("other/run")


def test_a_stage_is_done_once_its_file_is_there(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.done("sft") is None
    files.write_json(workdir.done_file("sft"), {"entry": {"name": "sft"}})
    assert workdir.done("sft") == {"entry": {"name": "sft"}} and workdir.done("pretrain") is None
