import contextlib
import dataclasses
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, model, parallel
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import placement
from tanuki_jax.train.optimizer import make_optimizer
from tests.tiny import init, small

CFG = small(n_experts=4)
OPTIMIZER = make_optimizer(config.Optimizer())
ON_DISK = ("checkpoint: the disk of", "is full", "free some space")


def mesh(data, fsdp):
    return parallel.make_mesh(config.Mesh(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])


def state_on(where, seed=0):
    """A state of random numbers, moments included, and the shapes and shardings to restore it with."""
    abstract, shardings = placement.state_shardings(CFG, OPTIMIZER, where)
    rng = np.random.default_rng(seed)

    def drawn(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed + 7)
        return np.asarray(rng.normal(size=leaf.shape) * 1000).astype(leaf.dtype)

    return jax.device_put(jax.tree.map(drawn, abstract), shardings), abstract


def numbers(state):
    return [
        np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(state)
    ]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(numbers(a), numbers(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def save(directory, *states, keep=1):
    """Saves states as steps 1, 2, ..."""
    saved = checkpoint.Checkpoints(directory, keep)
    for step, state in enumerate(states, 1):
        saved.save(step, state, {"model": config.to_dict(CFG)})
    saved.close()


@contextlib.contextmanager
def opened(directory, keep=1):
    found = checkpoint.Checkpoints(directory, keep)
    yield found
    found.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the state of seed 0 as step 1, written from four devices."""
    directory = tmp_path_factory.mktemp("saved")
    save(directory, state_on(mesh(1, 4))[0])
    return directory


# --- restoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (1, 1), (1, 8), (8, 1)])
def test_a_checkpoint_restores_on_any_mesh_to_the_last_bit(saved, shape):
    expected, abstract = state_on(mesh(*shape))
    with opened(saved) as checkpoints:
        found = checkpoints.restore(checkpoints.latest(), abstract)
    assert_same(found, expected)
    for leaf, like in zip(jax.tree.leaves(found.params), jax.tree.leaves(abstract.params), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def test_params_on_several_devices_are_really_split(saved):
    loaded = checkpoint.load(saved, mesh(1, 8))
    table = loaded.params["embed"]["table"]
    assert {shard.data.shape for shard in table.addressable_shards} == {(CFG.vocab_size, CFG.d_model // 8)}


@pytest.mark.parametrize("where", [None, (2, 2)])
def test_load_needs_nothing_but_the_directory(saved, where):
    loaded = checkpoint.load(saved, where and mesh(*where))
    assert loaded.cfg.architecture == CFG.architecture and loaded.meta["step"] == 1
    assert_same(loaded.params, state_on(mesh(1, 1))[0].params)


def test_a_restored_key_gives_the_same_random_numbers(saved):
    _, abstract = state_on(mesh(2, 2))
    with opened(saved) as checkpoints:
        found = checkpoints.restore(1, abstract)
    assert jax.random.bits(found.key) == jax.random.bits(jax.random.key(7))


# --- what fits a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [("d_ff", 64), ("n_experts", 0), ("top_k", 1), ("normalized_gate", False)])
def test_another_architecture_is_named_by_the_key_that_differs(key, value):
    other = config.to_dict(small(**{"n_experts": 4, key: value}))
    with pytest.raises(UserError, match=f"runs/sft is of another architecture: {key} {value} .here {getattr(CFG, key)}.;"):
        checkpoint.check_architecture("runs/sft", other, CFG)


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_a_checkpoint_is_restored_in_another_dtype(tmp_path, kept):
    """The router's bias is float32 in either."""
    cfg = small(n_experts=4, router_bias=True, param_dtype=kept)
    params = init(cfg, jax.random.key(0))
    checkpoint.save_params(tmp_path, params, {"model": config.to_dict(cfg)})
    other = dataclasses.replace(cfg, param_dtype="float32" if kept == "bfloat16" else "bfloat16")
    mesh = parallel.make_mesh(config.Mesh(fsdp=4, tensor=2))
    loaded = checkpoint.load_for(tmp_path, other, mesh)
    assert loaded.cfg.architecture == other.architecture
    wanted = jax.tree.map(lambda p, s: p.astype(s.dtype), params, model.parameter_shapes(other))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, wanted)
    assert jax.tree.map(lambda p: p.dtype, loaded.params) == jax.tree.map(lambda p: p.dtype, wanted)


def test_how_it_is_computed_may_differ():
    other = small(n_experts=4, remat="full", dtype="bfloat16", rope_theta=5e5, init_std=1.0)
    checkpoint.check_architecture("runs/sft", config.to_dict(other), CFG)


def damage_arrays(step):
    for path in (step / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])


def damage_meta(step):
    for path in (step / "meta").iterdir():
        path.unlink()
    (step / "meta").rmdir()


def without_sums(step):
    """As a run leaves it that is killed between the save and its sums."""
    (step / "sums-0-of-1.json").unlink()
    damage_arrays(step)


def flip_a_bit(step):
    path = max((step / "params").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def lose_a_file(step):
    max((step / "params").rglob("d/*"), key=lambda p: p.stat().st_size).unlink()


@pytest.mark.parametrize(
    "damage, words",
    [
        (damage_arrays, "checkpoints/1 is damaged, params/.* has 10 bytes, and had"),
        (flip_a_bit, "checkpoints/1 is damaged, params/.* has other contents than were written"),
        (lose_a_file, "checkpoints/1 is damaged, params/.* is missing"),
        (without_sums, "step 1.*cannot be read"),
        (damage_meta, "is damaged, meta/"),
    ],
)
def test_a_damaged_checkpoint_is_one_message(damage, words, tmp_path):
    save(tmp_path, state_on(mesh(1, 1))[0])
    damage(tmp_path / "checkpoints/1")
    with pytest.raises(UserError, match=f"{tmp_path}.*{words}"):
        checkpoint.load(tmp_path)


# --- saving -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept(keep, tmp_path):
    states = [state_on(mesh(1, 1), seed)[0] for seed in range(4)]
    save(tmp_path, *states, keep=keep)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {str(step) for step in range(5 - keep, 5)}
    with opened(tmp_path, keep) as checkpoints:
        assert checkpoints.latest() == 4
        for step in range(5 - keep, 5):
            assert_same(checkpoints.restore(step, state_on(mesh(1, 1))[1]), states[step - 1])


def test_looking_into_a_directory_deletes_nothing(tmp_path):
    save(tmp_path, *[state_on(mesh(1, 1), seed)[0] for seed in range(2)], keep=5)
    checkpoint.load(tmp_path)
    checkpoint.read_meta(tmp_path, 1)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk, writing past `size` bytes of a file fails; the cache of compiled programs gets none that are cut."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cached_from = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", cached_from)


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_full_disk_is_one_message_and_the_earlier_checkpoint_stays_good(size, tmp_path):
    (first, abstract), (second, _) = state_on(mesh(1, 4), 0), state_on(mesh(1, 4), 1)
    save(tmp_path, first)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    with pytest.raises(UserError) as error, files_of_at_most(size):
        checkpoints.save(2, second, {"model": config.to_dict(CFG)})
        checkpoints.close()
    assert all(words in str(error.value) for words in ON_DISK) and "\n" not in str(error.value)

    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]  # nothing half-written, and no thread still at it
    with opened(tmp_path) as again:  # the same command once more, with room
        assert again.latest() == 1
        assert_same(again.restore(1, abstract), first)
        again.save(2, second, {"model": config.to_dict(CFG)})
    with opened(tmp_path) as again:
        assert_same(again.restore(2, abstract), second)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


@pytest.mark.slow  # in one process: tests/upcycle/test_stream_failures.py
def test_a_full_disk_under_the_command_line_is_one_line_and_leaves_nothing(tmp_path):
    dense = small()
    checkpoint.save_params(tmp_path / "dense", init(dense, jax.random.key(0)), {"model": config.to_dict(dense)})
    code = """
import resource, sys
from tanuki_jax.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))
sys.exit(main())
"""
    env = {**os.environ, "TANUKI_HUGE_PAGES": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    flags = ["upcycle", "--checkpoint=dense", "--output=mixture", "--n_experts=32"]
    found = subprocess.run([sys.executable, "-c", code, *flags], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.returncode == 1 and found.stdout == ""
    assert "Traceback" not in found.stderr
    [line] = found.stderr.splitlines()
    assert line.startswith("tanuki: ") and all(words in line for words in ON_DISK)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
