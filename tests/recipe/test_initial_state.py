"""The optimizer's moments that a stage takes over from a checkpoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import initial_state
from tests.checkpoint.test_checksums import STATE, contents, saved, state_of
from tests.files.test_lock import tree
from tests.tiny import init, small


def test_moments_come_from_a_stage_or_from_one_of_its_steps(tmp_path):
    saved(tmp_path, 2, 5, keep=9).close()
    before = tree(tmp_path)
    for path, step in ((tmp_path, 5), (tmp_path / "checkpoints/5", 5), (tmp_path / "checkpoints/2", 2)):
        found, wanted = initial_state.load_moments(path, STATE), state_of(step).opt_state
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(a, b)
    assert tree(tmp_path) == before


def test_moments_of_a_checkpoint_without_any_are_an_error(tmp_path):
    checkpoint.save_params(tmp_path, {"w": jnp.ones(4)}, {"model": {}})
    before = tree(tmp_path)
    with pytest.raises(UserError, match="has no optimizer state of this model; set restore='params'"):
        initial_state.load_moments(tmp_path / "checkpoints/0", STATE)
    assert tree(tmp_path) == before


def test_moments_and_meta_are_verified_when_they_are_read(tmp_path):
    """A changed digit of the meta is another model; the moments are half of what restore='all' takes."""
    cfg = small()
    checkpoint.save_params(tmp_path / "model", init(cfg, jax.random.key(0)), {"model": config.to_dict(cfg)})
    meta = next(p for p in contents(tmp_path / "model/checkpoints/0/meta") if "rope_theta" in p.read_text())
    meta.write_text(meta.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(tmp_path / "model")
    saved(tmp_path / "state", 2).close()
    sealed = json.loads((tmp_path / "state/checkpoints/2/sums-0-of-1.json").read_text())
    name = next(n for n in sealed if n.startswith("optimizer/"))
    path = tmp_path / "state/checkpoints/2" / name
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(UserError, match="damaged"):
        initial_state.load_moments(tmp_path / "state", STATE)
