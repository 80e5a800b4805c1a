import collections
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, cli, config, model, parallel, upcycle
from tanuki_jax.errors import UserError
from tanuki_jax.upcycle import probe, stream
from tests import tiny_recipe
from tests.interop.llama import DTYPES, INDEX, dense, drawn, flat, nested, save_file, settings, shapes, write
from tests.test_checkpoint import ON_DISK, files_of_at_most
from tests.tiny import apply

CFG = dense()
FFN = ("gate", "up", "down")
E = 4


def named(params):
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def save(home, cfg, arrays, step=0):
    """Published arrays as a checkpoint of ours, as training writes it."""
    cfg = dataclasses.replace(cfg, param_dtype=str(arrays["model.norm.weight"].dtype))
    checkpoints = checkpoint.Checkpoints(home)
    params = jax.tree.map(jnp.asarray, nested(flat(cfg, arrays)))
    checkpoints.save_items(step, {"params": params}, {"model": config.to_dict(cfg), "stage": "pretrain"})
    checkpoints.close()
    return home


class Source(NamedTuple):
    """A dense checkpoint: of ours or of Hugging Face, the same weights for the same seed."""

    kind: str = "ours"
    dtype: str = "float32"
    seed: int = 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where a source lies."""
    made = {}

    def find(source):
        if source not in made:
            home = tmp_path_factory.mktemp("dense") / "-".join(map(str, source))
            arrays = drawn(CFG, source.seed, source.dtype)
            made[source] = save(home, CFG, arrays) if source.kind == "ours" else write(home, CFG, arrays)
        return str(made[source])

    return find


@pytest.fixture(scope="module")
def ours(place):
    return place(Source())


def shape(**overrides):
    plain = dict(n_experts=E, top_k=2, expert_d_ff=0, first_dense=0, moe_every=1)
    return {**plain, "normalized_gate": True, "gate_scale": 1.0, "router_bias": False, **overrides}


# --- the same as on a tree ------------------------------------------------------------------------------------------


class Case(NamedTuple):
    strategy: dict
    sources: tuple = (Source(),)
    shape: dict = {}
    dtype: str = ""
    seed: int = 0


NOISE, DROP = dict(strategy="noise", noise_std=0.05), dict(strategy="drop", drop_ratio=0.5)
COPY, GROUPS = dict(strategy="copy", router_std=0.3), dict(strategy="groups", router_std=0.3)
FOUR = dict(n_experts=8, top_k=4, expert_d_ff=10)  # parts of the FFN
LLAMA, BF16 = Source("llama"), Source("llama", "bfloat16")
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
    "three checkpoints": Case(COPY, (LLAMA, Source(seed=1), Source("llama", seed=2)), dict(n_experts=7)),
    "two checkpoints of two dtypes": Case(GROUPS, (Source(), Source("llama", "bfloat16", 1)), FOUR),
}
EXACT = ("copy", "groups")


def expected_of(case):
    """Parameters of the dense models in the dtype of the output, and of the mixture, made on trees."""
    dtype = case.dtype or case.sources[0].dtype
    trees = [
        jax.tree.map(lambda w: jnp.asarray(w).astype(dtype), nested(flat(CFG, drawn(CFG, source.seed, source.dtype))))
        for source in case.sources
    ]
    cfg = dataclasses.replace(upcycle.mixture_of(CFG, **shape(**case.shape)), param_dtype=dtype)
    options = config.Upcycle(**case.strategy)
    return cfg, trees, upcycle.upcycle(trees[0], cfg, options, jax.random.key(case.seed), trees[1:])


def plan(case, place):
    return stream.plan([place(s) for s in case.sources], shape(**case.shape), case.strategy, case.seed, case.dtype)


def logits(cfg, params, seed):
    """Of the tokens that the probe draws, by the whole model, in float32."""
    tokens = jax.random.randint(jax.random.fold_in(jax.random.key(seed), 2), (1, probe.TOKENS), 0, CFG.vocab_size)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(probe.TOKENS)[None]}
    cfg = dataclasses.replace(cfg, dtype="float32", attention="reference", experts="reference")
    return np.asarray(apply(cfg, params, batch).hidden @ params["head"].astype("float32"))


@pytest.mark.parametrize("name", CASES)
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

    if len(case.sources) == 1:
        dense_cfg = dataclasses.replace(CFG, param_dtype=cfg.param_dtype)
        before, after = logits(dense_cfg, trees[0], case.seed), logits(cfg, loaded.params, case.seed)
        assert identity.spread == pytest.approx(before.std(), rel=1e-5)
        assert identity.difference == pytest.approx(np.abs(before - after).max(), rel=1e-5, abs=3e-6)
        assert (identity.difference < 1e-5) == (case.strategy["strategy"] in EXACT)


# --- from the command line ------------------------------------------------------------------------------------------

NOISY = ("--strategy=noise", "--noise_std=0.05", f"--n_experts={E}")


@pytest.fixture(scope="module")
def mixture(place, tmp_path_factory):
    """What the command line makes of a checkpoint of Hugging Face with `NOISY` and the seed 7."""
    output = tmp_path_factory.mktemp("mixture") / "mixture"
    assert cli.main(["upcycle", f"--checkpoint={place(LLAMA)}", f"--output={output}", *NOISY, "--seed=7"]) == 0
    return output


def test_a_checkpoint_of_ours_and_one_of_hugging_face_give_the_same(mixture, ours, tmp_path):
    assert cli.main(["upcycle", f"--checkpoint={ours}", f"--output={tmp_path / 'mixture'}", *NOISY, "--seed=7"]) == 0
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
    flags = [*NOISY, "--plain_gate", "--top_k=3", "--first_dense=1", "--param_dtype=bfloat16", "--seed=7", "--router_std=0.25"]
    assert cli.main(["upcycle", f"--checkpoint={place(LLAMA)}", f"--output={output}", *flags]) == 0
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
    ],  # sqrt(2) is rounded
    ids=["copy", "groups of two in bfloat16"],
)
def test_an_exact_strategy_is_called_exact(dtype, flags, place, tmp_path, capsys):
    source = place(Source("llama", dtype))
    assert cli.main(["upcycle", f"--checkpoint={source}", f"--output={tmp_path / 'm'}", f"--n_experts={E}", *flags]) == 0
    assert "exact up to rounding" in capsys.readouterr().out


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


def test_a_stage_of_a_recipe_starts_from_the_output(tokenizer, tmp_path):
    cfg = config.model_of(config.load([tiny_recipe.CONFIG]), "pretrain")
    home = write(tmp_path / "llama", cfg, drawn(cfg))
    output = tmp_path / "mixture"
    assert cli.main(["upcycle", f"--checkpoint={home}", f"--output={output}", f"--n_experts={E}", "--strategy=copy"]) == 0
    stage = "--config.stages.continued."
    flags = [f"{stage}init_from={output}", f"{stage}mixture_of_experts=True", f"{stage}steps=2", "--config.scoring.prompts=0"]
    flags += ["--config.scoring.pairs=0", f"--config.tokenizer.path={tokenizer.directory}"]
    workdir = tmp_path / "run"
    assert cli.main(["train", tiny_recipe.CONFIG, f"--workdir={workdir}", "--stage=continued", *flags]) == 0
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

        def opened(path):
            found = open_dense(path)

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
    alive, held = [], {}

    def notice(_, name, row, array):
        held[name, *row] = sum(size for ref, size in alive if ref() is not None)
        alive.append((weakref.ref(array if array.base is None else array.base), array.nbytes))

    watched(notice)
    stream.run(stream.plan([str(home)], shape(), NOISE, 0), tmp_path / "mixture")
    layer = 4 * sum(math.prod(s) for name, s in shapes(cfg).items() if name.startswith("model.layers.0."))
    found = {i: held["layers/attn/q", i] for i in range(2, cfg.n_layers)}  # the first two are read beside the table
    assert max(found.values()) <= 2 * layer, f"bytes held when a layer begins {found}, a layer has {layer}"


def test_blocks_are_those_of_the_checkpoint_and_each_comes_once(place, monkeypatch, tmp_path):
    found = []
    save_streamed = checkpoint.save_streamed

    def noticed(home, cfg, blocks, meta):
        def noting():
            for name, index, array in blocks:
                found.append((name, index, array.shape, array.dtype.name))
                yield name, index, array

        save_streamed(home, cfg, noting(), meta)

    monkeypatch.setattr(checkpoint, "save_streamed", noticed)
    job = plan(Case(NOISE, (BF16,), dict(first_dense=1, router_bias=True)), place)
    stream.run(job, tmp_path / "mixture")
    expected = set()
    for name, axes, sizes in model.named_parameters(job.cfg):
        leading = 2 if axes.startswith("LE") and len(axes) == 4 else 1 if axes.startswith("L") else 0
        dtype = "float32" if name.endswith("bias") else "bfloat16"
        expected |= {(name, index, sizes[leading:], dtype) for index in np.ndindex(*sizes[:leading])}
    assert len(found) == len(set(found)) and set(found) == expected


# --- bad input ------------------------------------------------------------------------------------------------------

GROUPED = ("--strategy=groups", "--expert_d_ff=10")
BAD = {
    "no such directory": (["--checkpoint={new}"], ["--checkpoint", "no such directory"]),
    "a file": (["--checkpoint={file}"], ["--checkpoint", "no such directory"]),
    "an empty directory": (["--checkpoint={empty}"], ["no checkpoints/<step>"]),
    "nothing after the comma": (["--checkpoint={ours},"], ["--checkpoint"]),
    "second is not there": (["--checkpoint={ours},{new}"], ["--checkpoint", "no such directory"]),
    "output is there": (["--output={empty}"], ["--output", "already"]),
    "output is a file": (["--output={file}"], ["--output", "already"]),
    "output below a file": (["--output={file}/mixture"], ["cannot write", "file"]),
    "a mixture of ours": (["--checkpoint={mixture}"], ["mixture already", "dense"]),
    "a mixture in second place": (["--checkpoint={ours},{mixture}"], ["mixture already", "dense"]),
    "Mixtral": (["--checkpoint={mixtral}"], ["mixture already", "dense"]),
    "checkpoints of two shapes": (["--checkpoint={ours},{wide}"], ["shape", "layers/mlp/", "40", "48", "{wide}", "one shape"]),
    "checkpoints of two depths": (["--checkpoint={ours},{deep}"], ["shape", "layers/", "{deep}", "one shape"]),
    "checkpoints with two epsilons": (["--checkpoint={ours},{epsilon}"], ["norm_eps", "0.001", "0.01", "{epsilon}"]),
    "a width that splits unevenly": (["--strategy=groups", "--expert_d_ff=12"], ["d_ff 40", "expert_d_ff 12", "evenly"]),
    "a width beyond the dense one": (["--strategy=groups", "--expert_d_ff=80"], ["d_ff 40", "expert_d_ff 80"]),
    "a negative width": ([*GROUPED, "--expert_d_ff=-10"], ["expert_d_ff", "-10"]),
    "a width without groups": (["--strategy=noise", "--expert_d_ff=10"], ["expert_d_ff 10", "groups"]),
    "experts that are no whole groups": ([*GROUPED, "--n_experts=6"], ["n_experts 6", "4 parts"]),
    "more than all experts": (["--top_k=5"], ["top_k 5", "n_experts 4"]),
    "no experts for a token": (["--top_k=0"], ["top_k 0"]),
    "one expert": (["--n_experts=1", "--top_k=1"], ["two experts"]),
    "no experts": (["--n_experts=0"], ["n_experts 0"]),
    "all layers dense": (["--first_dense=3"], ["first_dense 3"]),
    "every no layer": (["--moe_every=0"], ["moe_every", "0"]),
    "every layer beyond the last": (["--moe_every=4"], ["moe_every 4"]),
    "negative noise": (["--noise_std=-1"], ["noise_std", "-1"]),
    "noise that is no number": (["--noise_std=nan"], ["noise_std", "nan"]),
    "endless noise": (["--noise_std=inf"], ["noise_std", "inf"]),
    "negative router": (["--router_std=-0.1"], ["router_std", "-0.1"]),
    "router that is no number": (["--router_std=nan"], ["router_std", "nan"]),
    "endless router": (["--router_std=inf"], ["router_std", "inf"]),
    "more than all dropped": (["--strategy=drop", "--drop_ratio=1.5"], ["drop_ratio 1.5"]),
    "a share that is no number": (["--strategy=drop", "--drop_ratio=nan"], ["drop_ratio nan"]),
    "gate without scale": (["--gate_scale=0"], ["gate_scale"]),
    "negative gate": (["--gate_scale=-1"], ["gate_scale", "-1"]),
    "gate that is no number": (["--gate_scale=nan"], ["gate_scale", "nan"]),
    "a seed beyond 64 bits": (["--seed=18446744073709551616"], ["seed"]),
    "an unknown strategy": (["--strategy=dropp"], ["--strategy", "dropp"]),
    "an unknown dtype": (["--param_dtype=float16"], ["--param_dtype", "float16"]),
}


@pytest.fixture(scope="module")
def odd(ours, mixture, tmp_path_factory):
    """Names in BAD's flags -> where things lie."""
    base = tmp_path_factory.mktemp("odd")
    (base / "empty").mkdir()
    (base / "file").write_text("file")
    wide, deep = dense(d_ff=48), dense(n_layers=4)
    return dict(
        **dict(ours=ours, mixture=mixture, new=base / "new", empty=base / "empty", file=base / "file"),
        mixtral=write(base / "mixtral", CFG, drawn(CFG), model_type="mixtral", num_local_experts=4),
        wide=write(base / "wide", wide, drawn(wide)),
        deep=write(base / "deep", deep, drawn(deep)),
        epsilon=write(base / "epsilon", CFG, drawn(CFG), rms_norm_eps=0.01),
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, odd, tmp_path, capsys):
    flags, words = BAD[case]
    base = odd["empty"].parent
    given = set(base.rglob("*"))
    usual = {"--checkpoint": "{ours}", "--output": str(tmp_path / "mixture"), "--n_experts": "4"}
    usual |= dict(flag.split("=") for flag in flags)
    capsys.readouterr()
    assert cli.main(["upcycle", *(f"{name}={value}".format(**odd) for name, value in usual.items())]) == 1
    found = capsys.readouterr()
    [line] = found.err.splitlines()
    assert found.out == "" and line.startswith("tanuki: "), line
    assert all(word.format(**odd) in line for word in words), line
    assert not list(tmp_path.iterdir()) and set(base.rglob("*")) == given


SPOILT = {
    "embed/table": ("model.embed_tokens.weight", "embed/table"),
    "q": ("model.layers.1.self_attn.q_proj.weight", "layers/attn/q, layer 1"),
    "norm": ("model.layers.2.post_attention_layernorm.weight", "layers/norm_mlp, layer 2"),
    "down": ("model.layers.2.mlp.down_proj.weight", "layers/mlp/down, layer 2"),
    "gate of a layer that stays dense": ("model.layers.0.mlp.gate_proj.weight", "layers/mlp/gate, layer 0"),
    "head": ("lm_head.weight", "head"),
}


@pytest.mark.parametrize(("kind", "tensor"), [*zip(["ours", "llama"] * 3, SPOILT, strict=True), ("llama", "embed/table")])
def test_a_nan_or_an_infinity_is_named_and_leaves_nothing(kind, tensor, place, tmp_path, capsys):
    theirs, named = SPOILT[tensor]
    arrays = drawn(CFG, dtype="float32" if kind == "ours" else "bfloat16")
    arrays[theirs].flat[-1] = np.nan if len(tensor) % 2 else -np.inf
    home = (save if kind == "ours" else write)(tmp_path / "spoilt", CFG, arrays)
    sources = [place(Source(seed=1)), home] if tensor == "down" else [home]
    given = set(tmp_path.rglob("*"))
    flags = [f"--checkpoint={','.join(map(str, sources))}", f"--output={tmp_path / 'mixture'}", "--first_dense=1"]
    capsys.readouterr()
    assert cli.main(["upcycle", *flags, "--n_experts=4"]) == 1
    found = capsys.readouterr()
    *progress, line = found.err.splitlines()
    assert found.out == "" and line.startswith("tanuki: ") and f"{home} has NaN or Inf in {named};" in line, line
    assert all(text.startswith("upcycle ") for text in progress)
    assert set(tmp_path.rglob("*")) == given


def test_after_an_error_the_same_command_succeeds(tmp_path, capsys):
    arrays = drawn(CFG)
    good = arrays["lm_head.weight"].copy()
    arrays["lm_head.weight"][3, 3] = np.nan
    home = write(tmp_path / "llama", CFG, arrays)
    command = ["upcycle", f"--checkpoint={home}", f"--output={tmp_path / 'mixture'}", "--n_experts=4", "--strategy=copy"]
    assert cli.main(command) == 1
    shutil.rmtree(home)
    write(home, CFG, {**arrays, "lm_head.weight": good})
    assert cli.main(command) == 0
    np.testing.assert_array_equal(checkpoint.load(tmp_path / "mixture").params["head"], good.T)


def damaged(home):
    for path in (p for p in (home / "checkpoints/0/params").rglob("d/*") if p.is_file()):
        path.write_bytes(path.read_bytes()[:10])


def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(ours, tmp_path, capsys):
    home = shutil.copytree(ours, tmp_path / "dense")
    damaged(home)
    given = set(tmp_path.rglob("*"))
    capsys.readouterr()
    assert cli.main(["upcycle", f"--checkpoint={home}", f"--output={tmp_path / 'mixture'}", "--n_experts=4"]) == 1
    found = capsys.readouterr()
    [line] = found.err.splitlines()
    assert found.out == "" and line.startswith("tanuki: checkpoint: ") and str(home) in line
    assert set(tmp_path.rglob("*")) == given


# --- disks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 8_000])  # 8,000: the first expert, after the table
def test_a_full_disk_is_one_message_and_leaves_nothing(size, tmp_path):
    cfg = dense(vocab_size=40, d_ff=200)
    home = write(tmp_path / "llama", cfg, drawn(cfg))
    job = stream.plan([str(home)], shape(), COPY, 0)
    with pytest.raises(UserError) as error, files_of_at_most(size):
        stream.run(job, tmp_path / "mixture")
    assert all(words in str(error.value) for words in ON_DISK) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
    stream.run(job, tmp_path / "mixture")  # with room
    assert checkpoint.load(tmp_path / "mixture").cfg == job.cfg


def test_a_disk_that_is_full_at_the_tokenizer_is_one_message_too(tokenizer, tmp_path):
    cfg = dense(n_layers=1)
    home = write(tmp_path / "llama", cfg, drawn(cfg))
    (home / "tokenizer.json").write_text(" " * 30_000)
    job = stream.plan([str(home)], shape(), COPY, 0)
    with pytest.raises(UserError, match="full"), files_of_at_most(20_000):
        stream.run(job, tmp_path / "mixture")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_full_disk_under_a_dry_run_is_one_message(ours, tmp_path):
    job = stream.plan([ours], shape(), COPY, 0)
    with pytest.raises(UserError, match="full"), files_of_at_most(1_000_000):
        stream.predicted(job, tmp_path / "mixture")
    assert not list(tmp_path.iterdir())


def python(code, *arguments):
    env = {**os.environ, "TANUKI_HUGE_PAGES": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=env, capture_output=True, text=True)


# Root too is then refused what the permissions of a directory refuse: the next program has no CAP_DAC_OVERRIDE.
WITHOUT_PRIVILEGE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""


def test_a_directory_that_may_not_be_written_to_is_one_line(ours, tmp_path):
    code = """
import sys
from tanuki_jax.cli import main
dense, locked, free = sys.argv[1:]
for flags in ([f"--output={locked}/mixture"], [f"--output={locked}/mixture", "--dry_run"], [f"--output={free}"]):
    print("code", main(["upcycle", f"--checkpoint={dense}", "--n_experts=4", "--strategy=copy", *flags]))
"""
    (tmp_path / "locked").mkdir(mode=0o555)
    home = Path(shutil.copytree(ours, tmp_path / "locked_dense"))  # what is only read may be locked
    places = [home, *(path for path in home.rglob("*") if path.is_dir())]
    for path in places:
        path.chmod(0o555)
    found = python(WITHOUT_PRIVILEGE, code, home, tmp_path / "locked", tmp_path / "free")
    for path in places:
        path.chmod(0o755)
    assert re.findall("code (.*)", found.stdout) == ["1", "1", "0"], found.stderr
    assert [line for line in found.stderr.splitlines() if not line.startswith(("tanuki: ", "upcycle "))] == []
    assert found.stderr.count(str(tmp_path / "locked")) == 2 and checkpoint.load(tmp_path / "free").cfg.n_experts == 4
    assert found.stderr.lower().count("permission") == 2
    assert not list((tmp_path / "locked").iterdir())


# --- kills ----------------------------------------------------------------------------------------------------------

# Children of one process that has imported everything: each is told of by what it has read, and gets its signal after so much.
KILLER = """
import dataclasses, json, os, sys, time
from signal import SIGINT, default_int_handler, signal as handle
from tanuki_jax import checkpoint, cli, interop
from tanuki_jax.upcycle import stream

source, directory, kills = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
opened_by = stream.open_dense

def open_slowly(path):
    opened = opened_by(path)
    def slow(stored):
        def read(*row):
            time.sleep(0.03)
            os.write(out, b".")
            return stored.read(*row)
        return dataclasses.replace(stored, read=read)
    return dataclasses.replace(opened, tree={name: slow(stored) for name, stored in opened.tree.items()})

stream.open_dense = open_slowly
ends = []
for number, (signal, reads, delay) in enumerate(kills):
    told, out = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        handle(SIGINT, default_int_handler)  # a shell in the background starts its commands without it
        flags = [f"--checkpoint={source}", f"--output={directory}/{number}", "--n_experts=4", "--noise_std=0.05", "--seed=7"]
        sys.exit(cli.main(["upcycle", *flags]))
    os.close(out)
    seen = 0
    while seen < reads and os.read(told, 1):
        seen += 1
    time.sleep(delay)
    os.kill(child, signal)
    after = 0
    while more := os.read(told, 4096):
        after += len(more)
    ends.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), after))
    os.close(told)
print(json.dumps(ends))
"""
READS = 3 + 9 * CFG.n_layers


def killed(kills, source, directory):
    """How each child ended: its exit code and how much it still read, and what all of them said."""
    found = python(KILLER, source, directory, json.dumps(kills))
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1]), found.stderr


def test_killed_at_any_moment_the_output_is_whole_or_not_there(place, mixture, tmp_path):
    dice = random.Random(1)
    kills = [(signal.SIGKILL, reads, 0) for reads in (*sorted(dice.sample(range(2, READS), 2)), READS)]
    kills += [(signal.SIGKILL, READS, dice.uniform(0.1, 0.6)) for _ in range(2)]  # while all is made final
    ends, _ = killed(kills, place(LLAMA), tmp_path)
    expected = named(checkpoint.load(mixture).params)
    for number, ((end, _), (_, reads, delay)) in enumerate(zip(ends, kills, strict=True)):
        output = tmp_path / str(number)
        assert (end in (-signal.SIGKILL, 0)) if delay else end == -signal.SIGKILL
        assert not output.exists() or reads == READS
        if output.exists():
            found = named(checkpoint.load(output).params)
            assert all((found[name] == array).all() for name, array in expected.items())
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".tmp")} <= {*map(str, range(len(kills)))}

    home = tmp_path / "0"  # the same command once more, beside what the kill left
    assert cli.main(["upcycle", f"--checkpoint={place(LLAMA)}", f"--output={home}", *NOISY, "--seed=7"]) == 0
    assert checkpoint.load(home).cfg == checkpoint.load(mixture).cfg


def test_interrupted_it_ends_at_once_and_leaves_nothing(ours, tmp_path):
    ends, said = killed([(signal.SIGINT, 5, 0.02), (signal.SIGINT, 17, 0.03)], ours, tmp_path)
    assert [code for code, _ in ends] == [130, 130], said
    assert max(after for _, after in ends) <= 9, f"arrays, more than a layer's, still read after the interruption: {ends}"
    assert not list(tmp_path.iterdir())
    assert all(line.startswith(("tanuki: interrupted", "upcycle ")) for line in said.splitlines() if line), said


# --- before it is done ----------------------------------------------------------------------------------------------

TANUKI_8B = dict(vocab_size=65_024, n_layers=32, d_model=4096, d_ff=14_336, n_heads=32, n_kv_heads=8, head_dim=128)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Tanuki-8B as a Hugging Face directory that takes no room."""
    home = tmp_path_factory.mktemp("large") / "tanuki-8b"
    cfg = config.Model(**TANUKI_8B)
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
    assert cli.main(["upcycle", f"--checkpoint={large}", f"--output={output}", "--strategy=copy", "--dry_run"]) == 0
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
    assert cli.main([*flags, f"--checkpoint={place(LLAMA)},{place(Source(seed=1))}", *more]) == 0
    found = capsys.readouterr().out
    assert "groups of 4 parts, from 2 dense checkpoint(s)" in found and "in 2 of 3 layers" in found and "bfloat16" in found
    home = shutil.copytree(place(LLAMA), tmp_path / "broken")
    (home / "model-00003-of-00003.safetensors").unlink()
    assert cli.main([*flags, f"--checkpoint={home}"]) == 1
    assert "model-00003-of-00003.safetensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_the_strategies_and_dtypes_of_the_command_line_are_all_tried():
    assert {case.strategy["strategy"] for case in CASES.values()} == set(config.CHOICES["strategy"])
    assert {case.dtype or case.sources[0].dtype for case in CASES.values()} == set(config.CHOICES["param_dtype"]) == {*DTYPES}
