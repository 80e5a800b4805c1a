"""Checkpoints a layer at a time."""

import shutil

import jax
import numpy as np
import pytest
import tensorstore

from tanuki_jax import checkpoint, config, model
from tanuki_jax.checkpoint import checksums
from tanuki_jax.errors import UserError
from tests.checkpoint.test_manager import CFG, mesh, save, state_on
from tests.tiny import init, small

DENSE = small(n_layers=3)


def named(params):
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def params_of(cfg):
    return named(init(cfg, jax.random.key(0)))


def blocks_of(cfg, params):
    """All of a model in blocks as `save_streaming` takes them."""
    for name, _, shape in model.named_parameters(cfg):
        leading = 0 if not name.startswith("layers/") else 2 if "/moe/" in name and len(shape) == 4 else 1
        for index in np.ndindex(*shape[:leading]):
            yield name, index, params[name][index]


def streamed(home, cfg):
    params = params_of(cfg)
    checkpoint.save_streaming(home, cfg, blocks_of(cfg, params), {"model": config.to_dict(cfg)})
    return params


def plainly_saved(home, cfg, dtype="float32"):
    made = jax.tree.map(lambda w: w.astype(dtype), init(cfg, jax.random.key(0)))
    checkpoint.save_params(home, made, {"model": config.to_dict(cfg)})
    return named(made)


def assert_reads(opened, params):
    """Row by row and whole, to the last bit."""
    assert opened.tree.keys() == params.keys()
    for name, array in params.items():
        stored = opened.tree[name]
        assert (stored.shape, stored.dtype) == (array.shape, array.dtype.name)
        np.testing.assert_array_equal(stored.read(), array, err_msg=name)
        if name.startswith("layers/"):
            for row in range(len(array)):
                found = stored.read(row)
                assert found.dtype == array.dtype and found.shape == array.shape[1:]
                np.testing.assert_array_equal(found, array[row], err_msg=name)


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(1, 1), (2, 4), (1, 8)], ids=str)
def trained(request, tmp_path_factory):
    """A checkpoint as training writes it, from some mesh, and its parameters."""
    home = tmp_path_factory.mktemp("trained")
    state, _ = state_on(mesh(*request.param))
    save(home, state)
    return home, named(state.params)


def test_what_training_wrote_is_read_a_layer_at_a_time(trained):
    home, params = trained
    opened = checkpoint.open_lazy(home)
    assert opened.cfg.architecture == CFG.architecture and opened.meta["step"] == 1 and opened.stage_directory == home
    assert_reads(opened, params)


def chunks(home, names):
    """Shape of a chunk on disk of each parameter."""
    [params] = home.glob("checkpoints/*/params")
    found = {}
    for name in names:
        store = {"driver": "ocdbt", "base": f"file://{params}/", "path": f"{name.replace('/', '.')}/"}
        found[name] = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result().chunk_layout.read_chunk.shape
    return found


def test_what_training_writes_is_chunked_by_layer(trained):
    home, params = trained
    for name, shape in chunks(home, params).items():
        assert not name.startswith("layers/") or shape[0] == 1, name


def test_what_is_not_stacked_lies_in_a_few_chunks(trained):
    home, params = trained
    for name, shape in chunks(home, params).items():
        if not name.startswith("layers/"):
            assert np.prod(params[name].shape) / np.prod(shape) <= 8, f"{name} {params[name].shape} in chunks of {shape}"


def test_chunks_are_not_larger_than_what_may_be_held(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.manager, "CHUNK", 1 << 12)
    params = plainly_saved(tmp_path, DENSE)
    for name, shape in chunks(tmp_path, params).items():
        assert np.prod(shape) * 4 <= 1 << 12, name
        assert not name.startswith("layers/") or shape[0] == 1, name
    assert_reads(checkpoint.open_lazy(tmp_path), params)


def test_checkpoints_from_before_the_chunks_are_read_too(tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoint.manager, "_by_layer", lambda tree: jax.tree.map(lambda _: checkpoint.manager.ocp.SaveArgs(), tree)
    )
    params = plainly_saved(tmp_path, DENSE)
    assert {shape[0] for name, shape in chunks(tmp_path, params).items() if name.startswith("layers/")} == {3}
    assert_reads(checkpoint.open_lazy(tmp_path), params)
    found = named(checkpoint.load(tmp_path).params)
    assert all((found[name] == array).all() for name, array in params.items())


def test_bfloat16_stays_bfloat16_but_norms_are_float32_also_those_of_before_they_always_were(tmp_path):
    cfg = small(param_dtype="bfloat16")
    saved = plainly_saved(tmp_path, cfg, "bfloat16")
    assert {array.dtype.name for array in saved.values()} == {"bfloat16"}
    expected = {name: array.astype(model.parameter_dtype(cfg, name)) for name, array in saved.items()}
    assert {name for name, array in expected.items() if array.dtype == np.float32} == {
        "norm_final",
        "layers/norm_attn",
        "layers/norm_mlp",
    }
    assert_reads(checkpoint.open_lazy(tmp_path), expected)
    found = named(checkpoint.load(tmp_path).params)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_checkpoint_is_opened_in_another_dtype(tmp_path):
    cfg = small(n_layers=1)
    saved = plainly_saved(tmp_path, cfg)
    opened = checkpoint.open_lazy(tmp_path, "bfloat16")
    assert opened.cfg.param_dtype == "bfloat16"
    other = small(n_layers=1, param_dtype="bfloat16")
    assert_reads(opened, {name: array.astype(model.parameter_dtype(other, name)) for name, array in saved.items()})


def test_the_newest_step_or_the_one_named_is_opened(tmp_path):
    states = [state_on(mesh(1, 1), seed)[0] for seed in (1, 2)]
    save(tmp_path, *states, keep=2)
    for place, state in ((tmp_path, states[1]), (tmp_path / "checkpoints/1", states[0])):
        found = checkpoint.open_lazy(place).tree["norm_final"].read()
        np.testing.assert_array_equal(found, state.params["norm_final"])


# --- writing block by block -----------------------------------------------------------------------------------------

SHAPES = {
    "dense": DENSE,
    "mixture": small(n_layers=3, n_experts=4, router_bias=True),
    "some layers, bfloat16": small(n_layers=3, n_experts=4, first_dense=1, expert_d_ff=24, param_dtype="bfloat16"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_comes_in_blocks_is_restored_whole(shape, tmp_path):
    cfg = SHAPES[shape]
    params = streamed(tmp_path, cfg)
    for where in (None, mesh(1, 8)):
        loaded = checkpoint.load(tmp_path, where)
        assert loaded.cfg.architecture == cfg.architecture and loaded.meta["step"] == 0
        found = named(loaded.params)
        assert found.keys() == params.keys()
        for name, array in params.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert_reads(checkpoint.open_lazy(tmp_path), params)


def test_blocks_may_come_in_any_order(tmp_path):
    cfg = SHAPES["some layers, bfloat16"]
    params = params_of(cfg)
    blocks = list(blocks_of(cfg, params))
    np.random.default_rng(0).shuffle(blocks)
    checkpoint.save_streaming(tmp_path, cfg, iter(blocks), {"model": config.to_dict(cfg)})
    assert_reads(checkpoint.open_lazy(tmp_path), params)


def test_only_a_few_blocks_are_on_their_way_to_the_disk(tmp_path):
    params, sizes = params_of(DENSE), []

    def blocks():
        for name, index, array in blocks_of(DENSE, params):
            pattern = f"{name.replace('/', '.')}/{'.'.join(map(str, index + (0,) * array.ndim))}"
            sizes.append((pattern, array.nbytes))
            for earlier, size in sizes[: -checkpoint.streaming.PREFETCH - 1]:
                [path] = tmp_path.rglob(earlier)
                assert path.stat().st_size == size
            yield name, index, array

    assert checkpoint.streaming.PREFETCH <= 3  # an expert
    checkpoint.save_streaming(tmp_path, DENSE, blocks(), {"model": config.to_dict(DENSE)})
    assert len(sizes) == 3 + 9 * DENSE.n_layers


def test_an_error_among_the_blocks_is_raised_as_it_is(tmp_path):
    params = params_of(DENSE)

    def blocks():
        yield from list(blocks_of(DENSE, params))[:9]
        raise UserError("the tenth block")

    with pytest.raises(UserError, match="^the tenth block$"):
        checkpoint.save_streaming(tmp_path, DENSE, blocks(), {"model": config.to_dict(DENSE)})
    with pytest.raises(UserError, match="has no checkpoints/<step>"):
        checkpoint.locate(tmp_path)


# --- damage ---------------------------------------------------------------------------------------------------------


def read_all(opened):
    for stored in opened.tree.values():
        for row in range(stored.shape[0]):
            stored.read(row)


def each(files, work):
    for path in list(files):
        work(path)


# A checkpoint of training is packed in files of many arrays, one written in blocks has a file for each block.
PACKED = {
    "cut": lambda p: each((p for p in p.rglob("d/*") if p.is_file()), lambda f: f.write_bytes(f.read_bytes()[:10])),
    "gone": lambda p: each((p for p in p.rglob("d/*") if p.is_file()), lambda f: f.unlink()),
    "zeros": lambda p: each((p for p in p.rglob("d/*") if p.is_file()), lambda f: f.write_bytes(bytes(f.stat().st_size))),
    "manifests gone": lambda p: each(p.rglob("manifest.ocdbt"), lambda f: f.unlink()),
    "no arrays": shutil.rmtree,
}
BLOCKS = {
    "cut": lambda p: (p / "layers.mlp.up/1.0.0").write_bytes((p / "layers.mlp.up/1.0.0").read_bytes()[:100]),
    "empty": lambda p: (p / "layers.mlp.up/1.0.0").write_bytes(b""),
    "gone": lambda p: (p / "layers.mlp.up/1.0.0").unlink(),
    "array gone": lambda p: shutil.rmtree(p / "layers.mlp.up"),
    "shape gone": lambda p: (p / "layers.mlp.up/.zarray").unlink(),
    "shape damaged": lambda p: (p / "layers.mlp.up/.zarray").write_text("{"),
    "metadata gone": lambda p: (p / "_METADATA").unlink(),
    "metadata damaged": lambda p: (p / "_METADATA").write_text("{"),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    home = tmp_path_factory.mktemp("packed")
    plainly_saved(home, DENSE)
    return home


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory):
    home = tmp_path_factory.mktemp("blocks")
    streamed(home, DENSE)
    return home


@pytest.mark.parametrize("damage", PACKED)
def test_damage_to_what_training_wrote_is_one_message(damage, packed, tmp_path):
    home = shutil.copytree(packed, tmp_path / "dense")
    PACKED[damage](home / "checkpoints/0/params")
    with pytest.raises(UserError, match=f"^checkpoint: .*{home}[^\n]*$"):
        read_all(checkpoint.open_lazy(home))


@pytest.mark.parametrize("damage", BLOCKS)
def test_damage_to_blocks_is_one_message(damage, in_blocks, tmp_path):
    home = shutil.copytree(in_blocks, tmp_path / "dense")
    BLOCKS[damage](home / "checkpoints/0/params")
    with pytest.raises(UserError, match=f"^[^\n]*{home}[^\n]*$"):
        read_all(checkpoint.open_lazy(home))


@pytest.mark.parametrize("sums", [True, False])
def test_a_layer_is_read_without_the_others(sums, in_blocks, tmp_path):
    home = shutil.copytree(in_blocks, tmp_path / "dense")
    (home / "checkpoints/0/params/layers.mlp.up/1.0.0").write_bytes(b"damaged")
    if not sums:
        (home / "checkpoints/0/sums-0-of-1.json").unlink()
    stored = checkpoint.open_lazy(home).tree["layers/mlp/up"]
    expected = params_of(DENSE)["layers/mlp/up"]
    np.testing.assert_array_equal(stored.read(0), expected[0])
    np.testing.assert_array_equal(stored.read(2), expected[2])
    with pytest.raises(UserError, match="layers.mlp.up/1.0.0 has 7 bytes" if sums else "layers/mlp/up.*damaged"):
        stored.read(1)


def test_another_number_in_a_block_is_found_when_it_is_read(in_blocks, tmp_path):
    home = shutil.copytree(in_blocks, tmp_path / "dense")
    path = home / "checkpoints/0/params/layers.mlp.up/1.0.0"
    path.write_bytes(path.read_bytes()[:-1] + b"\x3f")
    opened = checkpoint.open_lazy(home)
    opened.tree["layers/mlp/up"].read(0)
    for _ in range(2):
        with pytest.raises(UserError, match="layers.mlp.up/1.0.0 has other contents"):
            opened.tree["layers/mlp/up"].read(1)
    with pytest.raises(UserError, match="layers.mlp.up/1.0.0 has other contents"):
        opened.verify()


def test_what_was_read_is_not_read_again_for_its_sum(in_blocks, monkeypatch):
    seen, real = [], checksums._checksum
    monkeypatch.setattr(checksums, "_checksum", lambda path: (seen.append(path), real(path))[1])
    opened = checkpoint.open_lazy(in_blocks)
    opened.tree["layers/mlp/up"].read(0)
    opened.tree["norm_final"].read()
    opened.verify()
    names = {str(path.relative_to(in_blocks / "checkpoints/0/params")) for path in seen if "/params/" in str(path)}
    assert names >= {"layers.mlp.up/1.0.0", "layers.mlp.up/.zarray", "_METADATA", "head/0.0"}
    assert not names & {"layers.mlp.up/0.0.0", "norm_final/0"}


def test_opening_deletes_nothing(packed, tmp_path):
    home = shutil.copytree(packed, tmp_path / "dense")
    running = home / "checkpoints/7.orbax-checkpoint-tmp"  # a training that saves at this moment
    running.mkdir()
    read_all(checkpoint.open_lazy(home))
    assert running.is_dir()
