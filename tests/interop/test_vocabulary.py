"""Rows of the vocabulary that no piece needs: cut on the way out, added on the way in."""

import functools
import json
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tanuki_jax import checkpoint, config
from tanuki_jax.cli.main import main
from tests.tiny import apply, init, small

CFG = small(vocab_size=640, n_heads=4, head_dim=8)


@functools.cache
def made(home, tokenizer):
    """A checkpoint of a padded model with its tokenizer."""
    meta = {"stage": "one", "model": config.to_dict(CFG), "data_fingerprint": ""}
    checkpoint.save_params(home, init(CFG, jax.random.key(0)), meta)
    shutil.copytree(tokenizer, home / "tokenizer")
    return home


@pytest.fixture
def home(tmp_path_factory, tokenizer):
    return made(tmp_path_factory.getbasetemp() / "padded", tokenizer.directory)


@pytest.fixture
def pieces(tokenizer):
    return tokenizer.vocab_size


def export(home, output, *flags):
    assert main(["export", f"--checkpoint={home}", f"--output={output}", *flags]) == 0
    return load_file(output / "model.safetensors"), json.loads((output / "config.json").read_text())


def load(home):
    loaded = checkpoint.load(home)
    return loaded.cfg, {p: np.asarray(w) for p, w in flax.traverse_util.flatten_dict(loaded.params, sep="/").items()}


def logits(home):
    loaded = checkpoint.load(home)
    tokens = jnp.arange(20, dtype=jnp.int32)[None]
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": tokens}
    return np.asarray(apply(loaded.cfg, loaded.params, batch).hidden @ loaded.params["head"])


@pytest.mark.parametrize("more", [0, 100, 400])
def test_only_the_embedding_and_the_head_are_cut_or_padded(more, pieces, home, tmp_path):
    size = pieces + more
    assert pieces < CFG.vocab_size
    whole, before = export(home, tmp_path / "whole")
    found, after = export(home, tmp_path / "other", f"--vocab_size={size}")
    assert after == {**before, "vocab_size": size}
    assert found.keys() == whole.keys()
    for name, array in whole.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            kept = min(size, CFG.vocab_size)
            assert found[name].shape == (size, CFG.d_model) and found[name].dtype == array.dtype
            assert found[name][:kept].tobytes() == array[:kept].tobytes()
            assert not found[name][kept:].any()
        else:
            assert found[name].tobytes() == array.tobytes(), name


def test_what_is_cut_can_be_padded_again(pieces, home, tmp_path):
    export(home, tmp_path / "hf", f"--vocab_size={pieces}")
    arguments = ["import", f"--hf={tmp_path / 'hf'}", f"--output={tmp_path / 'back'}", f"--vocab_size={CFG.vocab_size}"]
    assert main(arguments) == 0
    (cfg, found), (_, expected) = load(tmp_path / "back"), load(home)
    assert cfg.vocab_size == CFG.vocab_size and found.keys() == expected.keys()
    for name, wanted in expected.items():
        wanted = wanted.copy()
        if name == "embed/table":
            wanted[pieces:] = 0
        elif name == "head":
            wanted[:, pieces:] = 0
        assert found[name].dtype == wanted.dtype
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)
    ours, theirs = logits(tmp_path / "back"), logits(home)
    np.testing.assert_allclose(ours[..., :pieces], theirs[..., :pieces], rtol=1e-5, atol=1e-6)
    assert not ours[..., pieces:].any()


@pytest.mark.parametrize("size", [-1, 1, -8])
def test_pieces_of_the_tokenizer_are_not_cut_off(size, pieces, home, tmp_path, capsys):
    size = pieces - 1 if size == -1 else size
    export(home, tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    for verb in ([f"--hf={tmp_path / 'hf'}"], [f"--checkpoint={home}"]):
        name = "import" if verb[0].startswith("--hf") else "export"
        assert main([name, *verb, f"--output={tmp_path / 'other'}", f"--vocab_size={size}"]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert (
            line.startswith("tanuki: ") and "--vocab_size" in line and f"{size}" in line and (size < 0 or f"{pieces}" in line)
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_not_exact_is_said(pieces, home, tmp_path, capsys):
    for size, words in ((CFG.vocab_size, ", exact\n"), (pieces, f"cut from 640 to {pieces}"), (768, "padded from 640 to 768")):
        capsys.readouterr()
        export(home, tmp_path / str(size), f"--vocab_size={size}")
        assert words in capsys.readouterr().out
