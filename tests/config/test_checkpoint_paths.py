import pytest

from tanuki_jax.config import checkpoint_paths
from tanuki_jax.errors import UserError


def test_locate_takes_a_stage_or_one_of_its_steps(tmp_path):
    for step in ("2", "10", "9", "11.orbax-checkpoint-tmp-3"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    assert checkpoint_paths.locate(tmp_path) == (tmp_path, 10)
    assert checkpoint_paths.locate(tmp_path / "checkpoints/9") == (tmp_path, 9)


@pytest.mark.parametrize("place", ["nowhere", ".", "checkpoints", "checkpoints/7", "file"])
def test_locate_says_what_it_needs_where_there_is_none(place, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="has no checkpoints/<step>; give a stage's directory"):
        checkpoint_paths.locate(tmp_path / place)


def test_a_step_lies_where_it_is_found(tmp_path):
    for step in (3, 20):
        checkpoint_paths.meta_file(tmp_path, step).parent.mkdir(parents=True)
    assert sorted(checkpoint_paths.list_steps(tmp_path)) == [3, 20]
    assert checkpoint_paths.locate(checkpoint_paths.step_directory(tmp_path, 3)) == (tmp_path, 3)


def test_a_stage_that_is_not_there_has_no_steps(tmp_path):
    assert checkpoint_paths.list_steps(tmp_path / "nowhere") == []
