import collections
import dataclasses
import json
import math
import os
import re
import shutil
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, model, parallel, upcycle
from tanuki_jax.cli.main import main
from tanuki_jax.upcycle import identity_check, stream
from tests import tiny_recipe
from tests.interop.llama import DTYPES, INDEX, dense, drawn, flat, nested, save_file, settings, shapes, write
from tests.tiny import apply, with_options
from tests.upcycle.sources import CFG, COPY, LLAMA, NOISY, E, Source, named, save, shape

# --- the same as on a tree ------------------------------------------------------------------------------------------


class Case(NamedTuple):
    strategy: dict
    sources: tuple = (Source(),)
    shape: dict = {}
    dtype: str = ""
    seed: int = 0


NOISE, DROP = dict(strategy="noise", noise_std=0.05), dict(strategy="drop", drop_ratio=0.5)
GROUPS = dict(strategy="groups", router_std=0.3)
FOUR = dict(n_experts=8, top_k=4, expert_d_ff=10)  # parts of the FFN
BF16 = Source("llama", "bfloat16")
CASES = {
    "copy": Case(COPY),
    "copy, narrower": Case(dict(strategy="copy", router_std=0.0), shape=dict(router_bias=True), dtype="bfloat16"),
    "noise": Case(NOISE, seed=7),
    "noise, Hugging Face": Case(NOISE, (LLAMA,), seed=7),
    "noise, bfloat16": Case(NOISE, (BF16,), dict(normalized_gate=False, top_k=3)),
    "noise, wider": Case(NOISE | dict(router_init="uniform", router_std=1.0), (BF16,), dict(gate_scale=2.5), "float32"),
    "noise, narrower": Case(NOISE, dtype="bfloat16"),
    "noise, some layers": Case(NOISE, (LLAMA,), dict(first_dense=1, router_bias=True)),
    "drop": Case(DROP, seed=1),
    "drop, bfloat16, every second layer": Case(DROP, (Source("ours", "bfloat16"),), dict(moe_every=2)),
    "groups": Case(GROUPS, shape=FOUR),
    "groups, bfloat16": Case(GROUPS, (BF16,), FOUR | dict(first_dense=2, normalized_gate=False)),
    "two checkpoints": Case(NOISE, (Source(), Source("llama", seed=1)), dict(first_dense=1)),
    "three checkpoints": Case(COPY, (LLAMA, Source(seed=1), Source("llama", seed=2)), dict(n_experts=7, first_dense=1)),
    "two checkpoints of two dtypes": Case(GROUPS, (Source(), Source("llama", "bfloat16", 1)), FOUR),
}
EXACT = ("copy", "groups")
# Whose parts other cases have: "noise, Hugging Face"; "noise, narrower" and "some layers"; "two checkpoints of two dtypes"; all
# of several checkpoints.
SLOW = ("noise", "copy, narrower", "groups", "two checkpoints")
# Those whose identity check is compared with the whole models: both gates, dense layers, another scale, both dtypes.
COMPARED = (
    "copy",
    "noise, bfloat16",
    "noise, wider",
    "noise, some layers",
    "drop, bfloat16, every second layer",
    "groups, bfloat16",
)


def in_dtype(params, dtype):
    """A tree as it is stored: norms in float32."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: jnp.asarray(w).astype("float32" if model.is_vector(path[-1].key) else dtype), params
    )


def expected_of(case):
    """Parameters of the dense models in the dtype of the output, and of the mixture, made on trees."""
    dtype = case.dtype or case.sources[0].dtype
    trees = [in_dtype(nested(flat(CFG, drawn(CFG, source.seed, source.dtype))), dtype) for source in case.sources]
    cfg = dataclasses.replace(upcycle.moe_config(CFG, **shape(**case.shape)), param_dtype=dtype)
    options = config.Upcycle(**case.strategy)
    return cfg, trees, upcycle.upcycle(trees[0], cfg, options, jax.random.key(case.seed), trees[1:])


def plan(case, place):
    return stream.plan([place(s) for s in case.sources], shape(**case.shape), case.strategy, case.seed, case.dtype)


def logits(cfg, params, seed):
    """Of the tokens that the probe draws, by the whole model, in float32."""
    tokens = jax.random.randint(jax.random.fold_in(jax.random.key(seed), 2), (1, identity_check.TOKENS), 0, CFG.vocab_size)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(identity_check.TOKENS)[None]}
    cfg = with_options(cfg, dtype="float32", attention_impl="reference", expert_impl="reference")
    return np.asarray(apply(cfg, params, batch).hidden @ params["head"].astype("float32"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_what_is_streamed_is_what_upcycling_a_tree_gives(name, place, tmp_path):
    case = CASES[name]
    cfg, trees, expected = expected_of(case)
    job = plan(case, place)
    assert job.cfg == cfg
    identity = stream.write(job, tmp_path / "mixture", {"model": config.to_dict(job.cfg)})
    loaded = checkpoint.load(tmp_path / "mixture")
    assert loaded.cfg == cfg
    found, expected_named = named(loaded.params), named(expected)
    assert found.keys() == expected_named.keys()
    for path, array in expected_named.items():
        assert found[path].dtype == array.dtype, path
        if case.strategy["strategy"] in EXACT:
            np.testing.assert_array_equal(found[path], array, err_msg=path)
        else:
            np.testing.assert_allclose(*(np.float32(w) for w in (found[path], array)), rtol=1e-6, atol=3e-8, err_msg=path)

    if name in COMPARED:
        dense_cfg = dataclasses.replace(CFG, param_dtype=cfg.param_dtype)
        before, after = logits(dense_cfg, trees[0], case.seed), logits(cfg, loaded.params, case.seed)
        assert identity.spread == pytest.approx(before.std(), rel=1e-5)
        assert identity.difference == pytest.approx(np.abs(before - after).max(), rel=1e-5, abs=3e-6)
    if len(case.sources) == 1:
        assert (identity.difference < 1e-5) == (case.strategy["strategy"] in EXACT)


# --- from the command line ------------------------------------------------------------------------------------------


def test_a_checkpoint_of_ours_and_one_of_hugging_face_give_the_same(mixture, ours, tmp_path):
    assert main(["upcycle", f"--checkpoint={ours}", f"--output={tmp_path / 'mixture'}", *NOISY, "--seed=7"]) == 0
    found, expected = (named(checkpoint.load(path).params) for path in (tmp_path / "mixture", mixture))
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_the_output_loads_on_a_mesh(mixture):
    _, _, expected = expected_of(CASES["noise, Hugging Face"])
    for sizes in ((1, 8), (2, 4)):
        loaded = checkpoint.load(mixture, parallel.make_mesh(config.Mesh(*sizes), jax.devices()))
        assert len(loaded.params["layers"]["moe"]["gate"].sharding.device_set) == 8
        for (path, found), array in zip(named(loaded.params).items(), named(expected).values(), strict=True):
            np.testing.assert_allclose(found, array, rtol=1e-6, atol=3e-8, err_msg=path)


def test_what_is_said_at_the_end_is_what_came_out(place, tmp_path, capsys):
    output = tmp_path / "deep/er/mixture"
    flags = [
        *NOISY,
        "--no_normalized_gate",
        "--top_k=3",
        "--first_dense=1",
        "--param_dtype=bfloat16",
        "--seed=7",
        "--router_std=0.25",
    ]
    assert main(["upcycle", f"--checkpoint={place(LLAMA)}", f"--output={output}", *flags]) == 0
    found = capsys.readouterr().out
    loaded = checkpoint.load(output)
    sizes = {path: array.size for path, array in named(loaded.params).items()}
    idle = sum(size for path, size in sizes.items() if re.search("moe/(gate|up|down)", path)) // E  # one expert of four
    dense_size = sum(w.size for w in drawn(CFG).values())
    assert f"{dense_size:,} -> {sum(sizes.values()):,} ({sum(sizes.values()) - idle:,} active for a token), bfloat16" in found
    assert "4 experts, top-3, plain gate, in 2 of 3 layers" in found and "noise of N(0, 0.05^2)" in found
    assert "normal, std 0.25" in found and re.search(r"seed +7\n", found) and str(output) in found
    assert re.search(r"identity .*differ by at most \d\.\d\de[-+]\d\d .*not the dense model's function", found)
    assert (loaded.cfg.normalized_gate, loaded.cfg.first_dense, loaded.cfg.param_dtype) == (False, 1, "bfloat16")
    assert [path.name for path in output.parent.iterdir()] == ["mixture"]


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        ("float32", ["--strategy=copy"]),
        ("bfloat16", ["--strategy=groups", "--expert_d_ff=20", "--top_k=2"]),
        ("bfloat16", ["--strategy=groups", "--expert_d_ff=10", "--top_k=4"]),
    ],
    ids=["copy", "groups of two in bfloat16", "groups of four in bfloat16"],
)
def test_an_exact_strategy_is_called_exact(dtype, flags, place, tmp_path, capsys):
    source = place(Source("llama", dtype))
    assert main(["upcycle", f"--checkpoint={source}", f"--output={tmp_path / 'm'}", f"--n_experts={E}", *flags]) == 0
    assert "exact up to the order of sums" in capsys.readouterr().out


def test_groups_that_round_the_weights_are_not_called_exact(place, tmp_path, capsys):
    flags = ["--strategy=groups", "--expert_d_ff=8", "--n_experts=5", "--top_k=5"]
    source = place(Source("llama", "bfloat16"))
    assert main(["upcycle", f"--checkpoint={source}", f"--output={tmp_path / 'm'}", *flags]) == 0
    found = capsys.readouterr().out
    assert "exact" not in found and "weights of down, which 5 parts, no power of two, round" in found


def test_the_meta_of_the_output_says_what_it_is_and_where_it_comes_from(place, tmp_path):
    home = save(tmp_path / "dense", CFG, drawn(CFG), step=42)
    for source in (home, Path(place(LLAMA))):
        output = tmp_path / f"of-{source.name}"
        job = stream.plan([str(source)], shape(), COPY, 5)
        stream.run(job, output)
        meta = checkpoint.load(output).meta
        assert (meta["step"], meta["stage"]) == (0, "upcycle")
        assert meta["upcycle"]["strategy"] == "copy" and meta["upcycle"]["seed"] == 5 and meta["upcycle"]["from"] == str(source)


def test_a_step_of_a_stage_can_be_upcycled_and_the_newest_is_the_default(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "dense", keep=2)
    trees = [jax.tree.map(jnp.asarray, nested(flat(CFG, drawn(CFG, seed)))) for seed in range(2)]
    for step, params in enumerate(trees, 1):
        checkpoints.save_items(step, {"params": params}, {"model": config.to_dict(CFG)})
    checkpoints.close()
    for place, params in (("dense", trees[1]), ("dense/checkpoints/1", trees[0])):
        [source] = stream.plan([str(tmp_path / place)], shape(), COPY, 0).sources
        np.testing.assert_array_equal(source.tree["head"].read(), params["head"])


def test_the_tokenizer_goes_along(tokenizer, tmp_path):
    cfg = dense(vocab_size=512, n_layers=1)
    for kind, make in (("ours", save), ("llama", write)):
        home = make(tmp_path / kind, cfg, drawn(cfg))
        directory = home if kind == "llama" else home / "tokenizer"
        shutil.copytree(tokenizer.directory, directory, dirs_exist_ok=True)
        (directory / "special_tokens_map.json").write_text("{}")
        stream.run(stream.plan([str(home)], shape(), COPY, 0), tmp_path / f"{kind}-mixture")
        loaded = checkpoint.load(tmp_path / f"{kind}-mixture")
        found = {path.name: path.read_bytes() for path in loaded.tokenizer_directory.iterdir()}
        names = {"special_tokens_map.json", *(path.name for path in tokenizer.directory.glob("tokenizer*"))}
        assert found == {name: (directory / name).read_bytes() for name in names}


@pytest.mark.slow
def test_a_stage_of_a_recipe_starts_from_the_output(tokenizer, tmp_path):
    cfg = config.model_config(config.load([tiny_recipe.CONFIG]), "pretrain")
    home = write(tmp_path / "llama", cfg, drawn(cfg))
    output = tmp_path / "mixture"
    assert main(["upcycle", f"--checkpoint={home}", f"--output={output}", f"--n_experts={E}", "--strategy=copy"]) == 0
    stage = "--config.stages.continued."
    flags = [f"{stage}init_from={output}", f"{stage}moe=True", f"{stage}steps=2", "--config.scoring.prompts=0"]
    flags += ["--config.scoring.pairs=0", f"--config.tokenizer.path={tokenizer.directory}"]
    workdir = tmp_path / "run"
    assert main(["train", tiny_recipe.CONFIG, f"--workdir={workdir}", "--stage=continued", *flags]) == 0
    started, ended = checkpoint.load(output), checkpoint.load(workdir / "stages/continued")
    assert ended.meta["step"] == 2
    for (path, a), b in zip(named(started.params).items(), named(ended.params).values(), strict=True):
        assert 0 < np.abs(a - b).max() < 0.01, path  # two steps at a rate of 1e-3


# --- reading and writing --------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """A function that has every reading of a dense checkpoint told to `notice(directory, name, row, array)`."""

    def watch(notice):
        open_dense = stream.open_dense

        def opened(path, dtype):
            found = open_dense(path, dtype)

            def telling(name, stored):
                def read(*row):
                    array = stored.read(*row)
                    notice(found.stage_directory, name, row, array)
                    return array

                return dataclasses.replace(stored, read=read)

            return dataclasses.replace(found, tree={name: telling(name, stored) for name, stored in found.tree.items()})

        monkeypatch.setattr(stream, "open_dense", opened)

    return watch


@pytest.mark.parametrize("name", ["noise", "two checkpoints"])
def test_a_layer_is_read_alone_and_once(name, place, watched, tmp_path):
    counts = collections.Counter()
    watched(lambda home, name, row, _: counts.update([(home, name, *row)]))
    stream.run(plan(CASES[name], place), tmp_path / "mixture")
    assert max(counts.values()) <= 2
    expected = {("embed/table",), ("norm_final",), ("head",)}
    expected |= {(path, i) for path in flat(CFG, drawn(CFG)) if path.startswith("layers/") for i in range(CFG.n_layers)}
    for source in CASES[name].sources:
        assert {read[1:] for read in counts if read[0] == Path(place(source))} == expected


def test_what_has_been_read_is_let_go(watched, tmp_path):
    cfg = dense(vocab_size=4000, n_layers=6)  # the table is larger than all of the layers
    home = write(tmp_path / "llama", cfg, drawn(cfg), dtype="float32")
    layer = 4 * sum(math.prod(s) for name, s in shapes(cfg).items() if name.startswith("model.layers.0."))
    alive, held = [], {}

    def held_now():
        return sum(size for ref, size in alive if ref() is not None)

    def notice(_, name, row, array):
        if row and row[0] not in held and row[0] >= 2:  # the first two layers are read beside the table
            at_once, deadline = held_now(), time.monotonic() + 10
            # While no more is read, the layer before this one stays, and no other.
            while (in_the_end := held_now()) > layer and time.monotonic() < deadline:
                time.sleep(0.001)
            held[row[0]] = at_once, in_the_end
        alive.append((weakref.ref(array if array.base is None else array.base), array.nbytes))

    watched(notice)
    stream.run(stream.plan([str(home)], shape(), NOISE, 0), tmp_path / "mixture")
    assert list(held) == list(range(2, cfg.n_layers))
    for at_once, in_the_end in held.values():
        assert at_once <= 2 * layer and in_the_end <= layer, f"bytes held when a layer begins: {held}; a layer has {layer}"


def test_blocks_are_those_of_the_checkpoint_and_each_comes_once(place, monkeypatch, tmp_path):
    found = []
    save_streaming = checkpoint.save_streaming

    def noticed(home, cfg, blocks, meta):
        def noting():
            for name, index, array in blocks:
                found.append((name, index, array.shape, array.dtype.name))
                yield name, index, array

        save_streaming(home, cfg, noting(), meta)

    monkeypatch.setattr(checkpoint, "save_streaming", noticed)
    job = plan(Case(NOISE, (BF16,), dict(first_dense=1, router_bias=True)), place)
    stream.run(job, tmp_path / "mixture")
    expected = set()
    for name, axes, sizes in model.named_parameters(job.cfg):
        leading = 2 if axes.startswith("LE") and len(axes) == 4 else 1 if axes.startswith("L") else 0
        dtype = model.parameter_dtype(job.cfg, name)
        expected |= {(name, index, sizes[leading:], dtype) for index in np.ndindex(*sizes[:leading])}
    assert len(found) == len(set(found)) and set(found) == expected


# --- before it is done ----------------------------------------------------------------------------------------------

TANUKI_8B = dict(vocab_size=65_024, n_layers=32, d_model=4096, d_ff=14_336, n_heads=32, n_kv_heads=8, head_dim=128)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Tanuki-8B as a Hugging Face directory that takes no room."""
    home = tmp_path_factory.mktemp("large") / "tanuki-8b"
    cfg = config.ModelConfig(**TANUKI_8B)
    home.mkdir()
    (home / "config.json").write_text(json.dumps(settings(cfg)))
    files = collections.defaultdict(dict)
    for name, size in shapes(cfg).items():
        files[f"model-{name.split('.')[2] if '.layers.' in name else 'outer'}.safetensors"][name] = ("bfloat16", size)
    for file, tensors in files.items():
        save_file(home / file, tensors)
    (home / INDEX).write_text(json.dumps({"weight_map": {name: file for file, names in files.items() for name in names}}))
    yield home
    shutil.rmtree(home)


def test_the_8b_that_takes_no_room_has_its_size(large):
    sizes = [path.stat() for path in large.glob("*.safetensors")]
    assert sum(s.st_size for s in sizes) > 2 * 7_512_264_704 and sum(s.st_blocks * 512 for s in sizes) < 1e6


def test_a_dry_run_foretells_the_8x8b_and_writes_nothing(large, tmp_path, monkeypatch, capsys):
    seen, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (seen.extend(tmp_path.rglob("*")), fsync(file)))
    output = tmp_path / "not/there/yet"
    assert main(["upcycle", f"--checkpoint={large}", f"--output={output}", "--strategy=copy", "--dry_run"]) == 0
    found = capsys.readouterr().out
    assert "7,512,264,704 -> 46,973,325,312 (13,150,457,856 active for a token), bfloat16" in found
    assert "8 experts, top-2" in found and "32 of 32 layers" in found
    assert f"{2 * 46_973_325_312 / 1e9:,.2f} GB" in found
    assert re.search(r"time +about (\d+[smhd])+, at [\d,]+ MB/s", found)
    [memory] = re.findall(r"memory +about ([\d.]+) GiB", found)
    assert 2 < float(memory) < 10  # a layer of the dense model has 0.4 GiB, the table 0.5, the whole 14
    assert not list(tmp_path.iterdir())
    assert not seen, f"a kill would leave {seen}"


def test_a_dry_run_takes_every_option_and_needs_a_whole_checkpoint(place, tmp_path, capsys):
    flags = ["upcycle", f"--output={tmp_path / 'mixture'}", "--dry_run"]
    more = ["--strategy=groups", "--expert_d_ff=10", "--n_experts=8", "--top_k=4", "--first_dense=1", "--param_dtype=bfloat16"]
    assert main([*flags, f"--checkpoint={place(LLAMA)},{place(Source(seed=1))}", *more]) == 0
    found = capsys.readouterr().out
    assert "groups of 4 parts, from 2 dense checkpoint(s)" in found and "in 2 of 3 layers" in found and "bfloat16" in found
    home = shutil.copytree(place(LLAMA), tmp_path / "broken")
    (home / "model-00003-of-00003.safetensors").unlink()
    assert main([*flags, f"--checkpoint={home}"]) == 1
    assert "model-00003-of-00003.safetensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_the_strategies_and_dtypes_of_the_command_line_are_all_tried():
    assert {case.strategy["strategy"] for case in CASES.values()} == set(config.CHOICES["strategy"])
    assert {case.dtype or case.sources[0].dtype for case in CASES.values()} == set(config.CHOICES["param_dtype"]) == {*DTYPES}
