"""PEFT's adapters, in and out, against what PEFT itself wrote and computed."""

import functools
import json
import re
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tanuki_jax import checkpoint, config, model
from tanuki_jax.cli.main import main
from tests.interop import make_peft
from tests.tiny import apply, init, small

HERE, CASES = make_peft.HERE, make_peft.CASES
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
SHAPE = dict(vocab_size=28, d_model=12, d_ff=10, n_heads=6, n_kv_heads=2, head_dim=4)
KINDS = {
    "llama": small(**SHAPE),
    "mixtral": small(**SHAPE, n_experts=3, normalized_gate=False),
    "tanuki": small(**SHAPE, n_experts=3),
}
TARGETS = {
    "llama": {"attn/*": 0, "mlp/*": 3, "mlp/down": 1},
    "mixtral": {"attn/*": 0, "moe/*": 3, "moe/down": 1, "moe/router": 2},
    "tanuki": {"attn/*": 0, "moe/*": 3, "moe/down": 1},
}


def tanuki(*arguments):
    return main([str(a) for a in arguments])


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


@functools.cache
def imported_base(base, architecture):
    home = base / f"peft-{architecture.lower()}"
    assert tanuki("import", f"--hf={HERE / f'base-{architecture.lower()}'}", f"--output={home}") == 0
    return home


@pytest.fixture
def base(tmp_path_factory):
    return functools.partial(imported_base, tmp_path_factory.getbasetemp())


@functools.cache
def our_adapters(home, kind):
    """A base and adapters that do something, as checkpoints."""
    cfg, options = KINDS[kind], config.Lora(rank=2, alpha=6.0, targets=TARGETS[kind])
    trained, scales = model.lora.init_adapters(cfg, options, jax.random.key(1))
    rng = np.random.default_rng(2)
    trained, params = (
        jax.tree.map(lambda w: w + jnp.float32(rng.normal(size=w.shape) * 0.2), tree)
        for tree in (trained, init(cfg, jax.random.key(0)))
    )
    meta = {"stage": "one", "model": config.to_dict(cfg), "data_fingerprint": ""}
    checkpoint.save_params(home / f"{kind}-base", params, meta)
    told = checkpoint.adapters_meta(
        home / f"{kind}-lora", home / f"{kind}-base", model.lora.ranks(cfg, options), model.lora.scales(cfg, options)
    )
    checkpoint.save_params(home / f"{kind}-lora", trained, {**meta, "adapter": told})
    return home / f"{kind}-base", home / f"{kind}-lora"


@pytest.fixture
def ours(tmp_path_factory):
    return functools.partial(our_adapters, tmp_path_factory.getbasetemp())


def logits(home):
    """Of the random tokens, by a checkpoint of ours in float32."""
    loaded = checkpoint.load(home)
    tokens = jnp.int32(make_peft.ids())
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}
    return np.asarray(apply(loaded.cfg, loaded.params, batch).hidden @ loaded.params["head"])


def assert_close(found, expected, limit=1e-5):
    assert np.abs(found - expected).max() < limit * np.abs(expected).max()


def refused(capsys, home, *arguments, words=()):
    """One message, exit code 1, and nothing new in the directory."""
    before = sorted(home.rglob("*"))
    capsys.readouterr()
    assert tanuki(*arguments) == 1
    found = capsys.readouterr()
    [line] = found.err.splitlines()
    assert found.out == "" and line.startswith("tanuki: ") and all(word in line for word in words), line
    assert sorted(home.rglob("*")) == before


# --- in: what PEFT wrote --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_imported_adapters_say_what_peft_said(case, base, tmp_path):
    below = base(CASES[case][0])
    assert tanuki("import", f"--hf={HERE / case}", f"--base={below}", f"--output={tmp_path / 'ours'}") == 0
    with np.load(HERE / case / "expected.npz") as expected:
        assert_close(logits(tmp_path / "ours"), expected["logits"])
        assert np.abs(logits(below) - expected["logits"]).max() > 0.1 * np.abs(expected["logits"]).max()


def test_ranks_and_scales_are_those_of_the_patterns(base, tmp_path):
    assert tanuki("import", f"--hf={HERE / 'uneven'}", f"--base={base('Llama')}", f"--output={tmp_path / 'ours'}") == 0
    found = checkpoint.load_adapters(tmp_path / "ours")
    assert found.ranks == {"layers/attn/q": 3, "layers/attn/v": 2, "layers/mlp/up": 2}
    expected = {"layers/attn/q": [7 / 2**0.5, 3 / 3**0.5], "layers/attn/v": [3 / 2**0.5, 0], "layers/mlp/up": [0, 3 / 2**0.5]}
    assert found.meta["adapter"]["scales"] == {path: pytest.approx(scales) for path, scales in expected.items()}


def test_a_llama_comes_back_as_peft_wrote_it(base, tmp_path):
    """Names, shapes and bits are those of PEFT's own file; so are rank and alpha of every module."""
    assert tanuki("import", f"--hf={HERE / 'llama'}", f"--base={base('Llama')}", f"--output={tmp_path / 'ours'}") == 0
    assert tanuki("export", f"--checkpoint={tmp_path / 'ours'}", f"--output={tmp_path / 'peft'}", "--format=peft") == 0
    found, expected = (load_file(home / WEIGHTS) for home in (tmp_path / "peft", HERE / "llama"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name
    mine, theirs = (json.loads((home / SETTINGS).read_text()) for home in (tmp_path / "peft", HERE / "llama"))
    assert set(mine["target_modules"]) == set(theirs["target_modules"])
    for name in mine["target_modules"]:
        for one, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            wanted = {key.removeprefix("mlp."): value for key, value in theirs[patterns].items()}
            assert mine[patterns].get(name, mine[one]) == pytest.approx(wanted.get(name, theirs[one])), name
    assert mine.keys() <= theirs.keys()  # none that PEFT does not know


def test_the_fixtures_are_small():
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 80_000


# --- out ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_in_again_changes_no_bit(kind, ours, tmp_path):
    below, home = ours(kind)
    assert tanuki("export", f"--checkpoint={home}", f"--output={tmp_path / 'peft'}", "--format=peft") == 0
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {WEIGHTS, SETTINGS}
    assert tanuki("import", f"--hf={tmp_path / 'peft'}", f"--base={below}", f"--output={tmp_path / 'back'}") == 0
    found, expected = checkpoint.load_adapters(tmp_path / "back"), checkpoint.load_adapters(home)
    if kind == "tanuki":  # gate and up come back with the rank of both, the other's half being 0
        assert found.ranks == expected.ranks | {"layers/moe/gate": 6, "layers/moe/up": 6}
        assert_close(logits(tmp_path / "back"), logits(home), 1e-6)
        return
    assert found.ranks == expected.ranks
    for one, other in ((found.params, expected.params), (found.scales, expected.scales)):
        for path, wanted in flat(other).items():
            np.testing.assert_array_equal(flat(one)[path], wanted, err_msg=path)


def test_experts_of_a_mixtral_have_tensors_of_their_own(ours, tmp_path):
    _, home = ours("mixtral")
    assert tanuki("export", f"--checkpoint={home}", f"--output={tmp_path / 'peft'}", "--format=peft") == 0
    tensors, sides = load_file(tmp_path / "peft" / WEIGHTS), flat(checkpoint.load_adapters(home).params["lora"])
    stem = "base_model.model.model.layers.{}."
    expected = {}
    for layer in range(2):
        names = {f"self_attn.{n}_proj": (f"attn/{n}", (layer,)) for n in "qkvo"}
        names["block_sparse_moe.gate"] = "moe/router", (layer,)
        for e in range(3):
            for w, ours_is in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                names[f"block_sparse_moe.experts.{e}.{w}"] = f"moe/{ours_is}", (layer, e)
        for name, (path, at) in names.items():
            a, b = (sides[f"layers/{path}/{side}"][at] for side in "ab")
            expected[stem.format(layer) + name + ".lora_A.weight"] = a.reshape(-1, a.shape[-1]).T
            expected[stem.format(layer) + name + ".lora_B.weight"] = b.reshape(b.shape[0], -1).T
    assert tensors.keys() == expected.keys()
    for name, wanted in expected.items():
        np.testing.assert_array_equal(tensors[name], wanted, err_msg=name)


def test_experts_of_tanukis_class_are_one_tensor(ours, tmp_path):
    _, home = ours("tanuki")
    assert tanuki("export", f"--checkpoint={home}", f"--output={tmp_path / 'peft'}", "--format=peft") == 0
    tensors, sides = load_file(tmp_path / "peft" / WEIGHTS), flat(checkpoint.load_adapters(home).params["lora"]["layers"])
    stem = "base_model.model.model.layers.1.mlp.experts"
    assert {n for n in tensors if ".layers.1.mlp.experts" in n} == {
        f"{stem}{part}.lora_{side}.weight" for part in ("", ".base_layer") for side in "AB"
    }
    a, b = tensors[f"{stem}.base_layer.lora_A.weight"], tensors[f"{stem}.base_layer.lora_B.weight"]
    assert (a.shape, b.shape) == ((3 * 6, 12), (20, 6 * 3))
    for e in range(3):  # what PEFT makes of them: B [out, r, E] and A [E, r, in], a product for each expert
        product = b.reshape(20, 6, 3)[..., e] @ a.reshape(3, 6, 12)[e]
        wanted = [sides[f"moe/{part}/a"][1, e] @ sides[f"moe/{part}/b"][1, e] for part in ("gate", "up")]
        np.testing.assert_allclose(product.T, np.concatenate(wanted, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_whole_weights_have_the_adapters_in_them(kind, ours, tmp_path):
    _, home = ours(kind)
    assert tanuki("export", f"--checkpoint={home}", f"--output={tmp_path / 'hf'}") == 0
    assert tanuki("import", f"--hf={tmp_path / 'hf'}", f"--output={tmp_path / 'back'}") == 0
    found, expected = (flat(checkpoint.load(place).params) for place in (tmp_path / "back", home))
    for path, wanted in expected.items():
        assert np.abs(found[path] - wanted).max() <= 1e-6 * np.abs(wanted).max(), path


LOST = r"merged into bfloat16 weights, the adapters lose (\d+)% of what they change .*, and (\d+)% of the weights stay"


@pytest.mark.parametrize("size", [3e-6, 3e-4, 0.3], ids=["swallowed", "rounded", "kept"])
def test_what_bfloat16_swallows_of_adapters_is_told_wherever_they_are_merged(size, tmp_path, capsys):
    cfg, options = small(**SHAPE, param_dtype="bfloat16"), config.Lora(rank=2, targets={"attn/q": 0, "mlp/*": 0})
    below = init(cfg, jax.random.key(0))
    checkpoint.save_params(tmp_path / "base", below, {"model": config.to_dict(cfg)})
    trained, scales = model.lora.init_adapters(cfg, options, jax.random.key(1))
    trained = jax.tree.map(lambda w: w + size, trained)
    ranks, factors = model.lora.ranks(cfg, options), model.lora.scales(cfg, options)
    told = checkpoint.adapters_meta(tmp_path / "sft", tmp_path / "base", ranks, factors)
    checkpoint.save_params(tmp_path / "sft", trained, {"model": config.to_dict(cfg), "adapter": told})

    wide = flat(jax.jit(model.lora.merge)(jax.tree.map(jnp.float32, {**below, **trained, **scales})))
    before, merged = (flat(jax.tree.map(jnp.float32, tree)) for tree in (below, checkpoint.load(tmp_path / "sft").params))
    lost = [(merged[p] - wide[p]).ravel() for p in ranks]
    change = [(wide[p] - before[p]).ravel() for p in ranks]
    share = np.linalg.norm(np.concatenate(lost)) / np.linalg.norm(np.concatenate(change))
    same = np.mean(np.concatenate([(merged[p] == before[p]).ravel() for p in ranks]))
    flags = ["export", f"--checkpoint={tmp_path / 'sft'}"]
    told = {"load": capsys.readouterr().err}
    assert tanuki(*flags, f"--output={tmp_path / 'hf'}") == 0
    found = capsys.readouterr()
    told["export"] = found.err
    assert ", rounded" in found.out and "exact" not in found.out
    for where, text in told.items():
        match = re.search(LOST, text)
        assert bool(match) == (share > 0.01), where
        if match:
            np.testing.assert_allclose([int(n) / 100 for n in match.groups()], [min(share, 1), same], atol=0.02)
    assert (size == 0.3) == (share < 0.01) and (size == 3e-6) == (same > 0.9)
    assert "--format=peft" in told["export"] or size == 0.3
    assert tanuki(*flags, f"--output={tmp_path / 'wide'}", "--param_dtype=float32") == 0
    found = capsys.readouterr()
    assert "cast from bfloat16 to float32" in found.out and ", exact" in found.out and "lose" not in found.err
    assert tanuki("import", f"--hf={tmp_path / 'wide'}", f"--output={tmp_path / 'back'}") == 0
    for path, w in flat(checkpoint.load(tmp_path / "back").params).items():
        np.testing.assert_allclose(w, wide[path], rtol=1e-6, atol=1e-9, err_msg=path)
    loaded = checkpoint.load(tmp_path / "sft", param_dtype="float32")
    assert "lose" not in capsys.readouterr().err
    for path, w in flat(loaded.params).items():
        np.testing.assert_allclose(w, wide[path], rtol=1e-6, atol=1e-9, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_peft_that_is_installed_says_what_we_say(kind, ours, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch, transformers and peft")
    peft = pytest.importorskip("peft", reason="needs torch, transformers and peft")
    transformers = pytest.importorskip("transformers", reason="needs torch, transformers and peft")
    below, home = ours(kind)
    assert tanuki("export", f"--checkpoint={below}", f"--output={tmp_path / 'hf'}") == 0
    assert tanuki("export", f"--checkpoint={home}", f"--output={tmp_path / 'peft'}", "--format=peft") == 0
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, **make_peft.PLAIN)
    assert_close(make_peft.logits(loaded), logits(below))
    adapted = peft.PeftModel.from_pretrained(loaded, tmp_path / "peft")
    assert_close(make_peft.logits(adapted), logits(home))
    if kind == "mixtral":  # it has converted them, so the names are its own by now
        return
    state = peft.get_peft_model_state_dict(adapted)
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    assert {name: tuple(w.shape) for name, w in state.items()} == {name: w.shape for name, w in tensors.items()}
    assert all(torch.equal(w, torch.tensor(tensors[name])) for name, w in state.items())


# --- bad input ------------------------------------------------------------------------------------------------------


def changed(tmp_path, tensors=lambda t: t, case="llama", **settings):
    """A copy of PEFT's directory with other tensors or settings."""
    home = shutil.copytree(HERE / case, tmp_path / "changed")
    save_file(tensors(load_file(home / WEIGHTS)), home / WEIGHTS)
    told = json.loads((home / SETTINGS).read_text())
    (home / SETTINGS).write_text(json.dumps(told | settings))
    return home


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
BAD_SETTINGS = {
    "use_dora": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "lora_bias": True,
    "peft_type": "LOHA",
    "trainable_token_indices": [1, 2],
    "init_lora_weights": "pissa",  # such adapters lie on a base from which they were taken out first
}
BAD_TENSORS = {
    "lora_A without lora_B": (lambda t: {n: w for n, w in t.items() if n != f"{FIRST}.lora_B.weight"}, [f"{FIRST}.lora_A"]),
    "lora_B without lora_A": (lambda t: {n: w for n, w in t.items() if n != f"{FIRST}.lora_A.weight"}, [f"{FIRST}.lora_B"]),
    "the head": (
        lambda t: {
            **t,
            "base_model.model.lm_head.lora_A.weight": np.ones((2, 12), np.float32),
            "base_model.model.lm_head.lora_B.weight": np.ones((28, 2), np.float32),
        },
        ["lm_head"],
    ),
    "the embedding": (
        lambda t: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 28))},
        ["embed_tokens"],
    ),
    "a whole module": (lambda t: {**t, "base_model.model.lm_head.weight": np.ones((28, 12))}, ["lm_head.weight"]),
    "a wider model": (
        lambda t: {n: np.repeat(w, 2, axis=1) if n == f"{FIRST}.lora_A.weight" else w for n, w in t.items()},
        ["layers/attn/q", "--base"],
    ),
    "more layers": (lambda t: {**t, **{n.replace("rs.0.", "rs.7."): w for n, w in t.items() if "rs.0." in n}}, ["--base"]),
    "sides of two ranks": (lambda t: {n: w[:1] if n == f"{FIRST}.lora_A.weight" else w for n, w in t.items()}, [""]),
    "eight bits": (lambda t: {n: np.ones(w.shape, np.int8) for n, w in t.items()}, [WEIGHTS, "int8", "float16"]),
    "nothing": (lambda t: {}, [WEIGHTS]),
}


@pytest.mark.parametrize("key", BAD_SETTINGS)
def test_settings_that_compute_something_else_are_refused(key, base, tmp_path, capsys):
    home = changed(tmp_path, **{key: BAD_SETTINGS[key]})
    arguments = f"--hf={home}", f"--base={base('Llama')}", f"--output={tmp_path / 'ours'}"
    refused(capsys, tmp_path, "import", *arguments, words=[SETTINGS, key, "not supported"])


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_without_a_place_are_refused(case, base, tmp_path, capsys):
    change, words = BAD_TENSORS[case]
    arguments = f"--hf={changed(tmp_path, change)}", f"--base={base('Llama')}", f"--output={tmp_path / 'ours'}"
    refused(capsys, tmp_path, "import", *arguments, words=words)


def test_another_architecture_is_refused(base, tmp_path, capsys):
    for case, below in (("llama", "Mixtral"), ("mixtral", "Llama")):
        arguments = f"--hf={HERE / case}", f"--base={base(below)}", f"--output={tmp_path / 'ours'}"
        refused(capsys, tmp_path, "import", *arguments, words=[WEIGHTS])


def test_adapters_of_ours_know_their_base(ours, tmp_path, capsys):
    below, home = ours("llama")
    assert tanuki("export", f"--checkpoint={home}", f"--output={tmp_path / 'peft'}", "--format=peft") == 0
    loaded = checkpoint.load(below)
    checkpoint.save_params(tmp_path / "other", loaded.params, {**loaded.meta, "stage": "another"})
    arguments = f"--hf={tmp_path / 'peft'}", f"--output={tmp_path / 'ours'}"
    refused(capsys, tmp_path, "import", *arguments, f"--base={tmp_path / 'other'}", words=["another model", "--base"])
    refused(capsys, tmp_path, "import", *arguments, words=["--base"])
    refused(capsys, tmp_path, "import", *arguments, f"--base={home}", words=[str(home), "adapters itself"])
    refused(capsys, tmp_path, "import", *arguments, f"--base={tmp_path / 'none'}", words=[str(tmp_path / "none")])


def test_damaged_and_missing_files_are_named(base, tmp_path, capsys):
    arguments = f"--hf={tmp_path / 'changed'}", f"--base={base('Llama')}", f"--output={tmp_path / 'ours'}"
    home = changed(tmp_path)
    whole = (home / WEIGHTS).read_bytes()
    for damage in (whole[:-9], whole[:20], b"", b"{}" * 20):
        (home / WEIGHTS).write_bytes(damage)
        refused(capsys, tmp_path, "import", *arguments, words=[str(home / WEIGHTS)])
    (home / WEIGHTS).unlink()
    refused(capsys, tmp_path, "import", *arguments, words=[WEIGHTS])
    for text in ("{", "[]", "7"):
        (home / SETTINGS).write_text(text)
        refused(capsys, tmp_path, "import", *arguments, words=[str(home / SETTINGS)])
    (home / SETTINGS).unlink()
    refused(capsys, tmp_path, "import", *arguments, words=[str(home)])


def test_what_has_no_form_in_peft_is_refused(ours, tmp_path, capsys):
    below, _ = ours("mixtral")
    cfg = KINDS["mixtral"]
    flags = f"--checkpoint={tmp_path / 'lora'}", f"--output={tmp_path / 'peft'}", "--format=peft"
    for targets in ({"moe/gate": 0}, {"moe/gate": 1, "moe/up": 2}):
        options = config.Lora(rank=2, targets=targets)
        shutil.rmtree(tmp_path / "lora", ignore_errors=True)
        told = checkpoint.adapters_meta(
            tmp_path / "lora", below, model.lora.ranks(cfg, options), model.lora.scales(cfg, options)
        )
        trained, _ = model.lora.init_adapters(cfg, options, jax.random.key(0))
        checkpoint.save_params(tmp_path / "lora", trained, {**checkpoint.read_meta(below, 0), "adapter": told})
        refused(capsys, tmp_path, "export", *flags, words=["moe/gate", "moe/up", "--format=hf"])
    flags = f"--checkpoint={below}", f"--output={tmp_path / 'peft'}", "--format=peft"
    refused(capsys, tmp_path, "export", *flags, words=[str(below), "no adapters"])
