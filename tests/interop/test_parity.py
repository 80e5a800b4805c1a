import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import interop
from tanuki_jax.cli.main import main
from tests.interop.llama import dense, drawn, nested, write
from tests.interop.make_parity import (
    CASES,
    CFG,
    FFN,
    HERE,
    LENGTH,
    ROWS,
    directory,
    drawn_by_us,
    ids,
    llama_logits,
    mixtral,
    transformers_logits,
    upcycled,
)
from tests.tiny import apply


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return directory(tmp_path_factory.mktemp("parity") / "llama")


@pytest.fixture(scope="module")
def mixtures(llama, tmp_path_factory):
    """Our checkpoint of each case."""
    return {case: upcycled(llama[0], case, tmp_path_factory.mktemp("parity") / "mixture") for case in CASES}


def logits(cfg, params, tokens=None):
    tokens = ids() if tokens is None else tokens
    batch = {
        "tokens": jnp.int32(tokens),
        "segment_ids": jnp.ones(tokens.shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    }
    return apply(cfg, params, batch).hidden @ params["head"]


def dense_of(home):
    """Our model and parameters of a Llama directory, in float32."""
    opened = interop.open_llama(home)
    named = {
        name: np.stack([w.read(i) for i in range(w.shape[0])]) if name.startswith("layers/") else w.read()
        for name, w in opened.tree.items()
    }
    return opened.cfg, jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), nested(named))


def stored(name):
    with np.load(HERE / f"{name}.npz") as found:
        return dict(found)


def assert_close(found, expected):
    assert found.shape == expected.shape == (ROWS, LENGTH, CFG.vocab_size)
    assert expected.std() > 0.3  # the comparison is not of zeros
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


# --- with what transformers gave ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_an_upcycled_directory_computes_what_mixtral_of_transformers_does(case, mixtures):
    expected, ours = stored(case), mixtures[case]
    for name, array in drawn_by_us(case, ours.params).items():  # else it would be another mixture
        np.testing.assert_allclose(array, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)
    assert_close(logits(ours.cfg, ours.params), expected["logits"])


def test_a_directory_computes_what_llama_of_transformers_does(llama):
    assert_close(logits(*dense_of(llama[0])), stored("llama")["logits"])


def test_by_copy_mixtral_says_what_llama_said_and_by_noise_something_else():
    dense, copied, noisy = (stored(name)["logits"] for name in ("llama", "copy", "noise"))
    np.testing.assert_allclose(copied, dense, rtol=0, atol=1e-4)
    assert np.abs(noisy - dense).max() > 0.1


def test_the_noise_is_that_which_was_asked_for(llama):
    found, (_, arrays) = stored("noise"), llama
    for name in FFN:
        published = np.stack([arrays[f"model.layers.{i}.mlp.{name}_proj.weight"].T for i in range(CFG.n_layers)])
        assert (found[name] - published[:, None]).std() == pytest.approx(0.05, rel=0.05)
    assert found["router"].std() == pytest.approx(0.5, rel=0.15)


def test_the_fixtures_are_small():
    assert sum(path.stat().st_size for path in HERE.iterdir()) < 60_000


# --- with the transformers that is installed ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_mixtral_of_the_transformers_that_is_installed_does(case, llama, mixtures):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    ours = mixtures[case]
    state = mixtral(llama[1], drawn_by_us(case, ours.params))
    assert_close(logits(ours.cfg, ours.params), transformers_logits(state))


WAYS = {
    "as above": dict(),
    "one file": dict(shards=0),
    "bfloat16": dict(dtype="bfloat16"),
    "rope_parameters": dict(rope_theta=..., rope_scaling=..., rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    "defaults": dict(rope_theta=..., rope_scaling=..., rms_norm_eps=..., attention_bias=..., mlp_bias=..., hidden_act=...),
    "tied, with a head of its own all the same": dict(tie_word_embeddings=True),
    "tied": dict(tie_word_embeddings=True, without=["lm_head.weight"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_directory_computes_what_the_transformers_that_is_installed_reads_from_it(way, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    keys = dict(WAYS[way])
    arrays = drawn(CFG, 6, keys.pop("dtype", "float32"))
    for name in keys.pop("without", ()):
        del arrays[name]
    home = write(tmp_path / "llama", CFG, arrays, **{"shards": 2, **keys})
    assert_close(logits(*dense_of(home)), llama_logits(home))


# --- with a tokenizer -----------------------------------------------------------------------------------------------

TEXTS = ["狸が住んでいます。", "What is the sum of 1, 2, 3?", "The tanuki lived deep in the mountains."]


def test_scores_of_a_copy_are_those_of_the_dense_directory(tokenizer, tmp_path, capsys):
    cfg = dense(vocab_size=512)
    home = write(tmp_path / "llama", cfg, drawn(cfg, seed=8))
    names = ("tokenizer.json", "tokenizer_config.json")
    for name in names:
        (home / name).write_bytes((tokenizer.directory / name).read_bytes())
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    output = tmp_path / "mixture"
    assert main(["upcycle", f"--checkpoint={home}", f"--output={output}", "--strategy=copy", "--router_std=1"]) == 0
    assert all((output / "tokenizer" / name).read_bytes() == (home / name).read_bytes() for name in names)
    capsys.readouterr()
    assert main(["score", f"--checkpoint={output}", f"--input={tmp_path / 'texts.jsonl'}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]

    cfg, params = dense_of(home)
    for row, text in zip(found, TEXTS, strict=True):
        tokens = np.array([tokenizer.encode(text)])
        z = np.asarray(logits(cfg, params, tokens), np.float64)[0, :-1]
        logprobs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        assert row["tokens"] == tokens.shape[1] - 1
        assert row["logprob"] == pytest.approx(logprobs[np.arange(len(z)), tokens[0, 1:]].sum(), abs=1e-3)
