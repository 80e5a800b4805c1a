import ast
import dataclasses
import json
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, model
from tanuki_jax.cli.main import main
from tanuki_jax.interop import export as module
from tests import tiny_recipe
from tests.interop import make_export
from tests.interop.llama import dense, nested
from tests.interop.published import (
    assert_same_bits,
    config_json,
    export,
    import_,
    made,
    opened,
    random,
    read_directory,
    save,
    stage,
    stored,
)
from tests.tiny import QUICK, apply, with_options

REAL = ("llama", "mixtral", "tanuki")  # directories that transformers wrote
STAGES = tiny_recipe.STAGES


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Kind -> what transformers wrote, our checkpoint of it, what we make of that."""
    base = tmp_path_factory.mktemp("real")
    made = {kind: import_(make_export.HERE / kind, base / f"{kind}-ours") for kind in REAL}
    return {kind: (make_export.HERE / kind, home, export(home, base / f"{kind}-back")) for kind, home in made.items()}


# --- with what transformers gave ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REAL)
def test_what_transformers_wrote_comes_back_to_the_last_bit(kind, real):
    theirs, _, back = real[kind]
    assert_same_bits(read_directory(back), read_directory(theirs))
    before, after = config_json(theirs), config_json(back)
    free = {"attention_dropout", "initializer_range", "use_cache", "pretraining_tp", "max_position_embeddings"}
    free |= {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "transformers_version"}
    free |= {"bos_token_id", "eos_token_id", "pad_token_id"}  # of the tokenizer, which these have not
    same = before.keys() - free
    assert {name: after.get(name) for name in same} == {name: before[name] for name in same}


@pytest.mark.parametrize("rounded", [True, False])
def test_norms_are_exported_in_bfloat16_where_it_holds_them_and_come_back_bit_by_bit(rounded, tmp_path, capsys):
    cfg = dense(param_dtype="bfloat16", n_heads=4, head_dim=6)
    named = random(cfg)
    if not rounded:
        named["layers/norm_mlp"] = named["layers/norm_mlp"] + np.float32(2**-12)
    home = save(tmp_path / "ours", cfg, named)
    back = export(home, tmp_path / "hf")
    dtypes = {name: array.dtype.name for name, array in read_directory(back).items()}
    norms = {name for name in dtypes if "norm" in name}
    assert {dtypes[name] for name in norms} == {"bfloat16" if rounded else "float32"}
    assert {dtypes[name] for name in dtypes.keys() - norms} == {"bfloat16"}
    said = capsys.readouterr().out
    assert ("norms in float32" in said) != rounded and ", exact" in said
    assert_same_bits(stored(import_(back, tmp_path / "again"))[1], named)


def in_float32(home):
    """Model and parameters of a published directory, computed in float32."""
    cfg, named = opened(home)
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), nested(named))
    return with_options(cfg, param_dtype="float32", dtype="float32", **QUICK), params


def logits(cfg, params):
    tokens = make_export.ids()
    batch = {
        "tokens": jnp.int32(tokens),
        "segment_ids": jnp.ones(tokens.shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    }
    return np.asarray(apply(cfg, params, batch).hidden @ params["head"])


def said(cfg, params):
    prompts = make_export.ids()[:, : make_export.PROMPT].tolist()
    return model.generate(cfg, params, prompts, model.Sampling(make_export.NEW))


@pytest.mark.parametrize("kind", REAL)
def test_exported_weights_say_what_transformers_said(kind, real):
    cfg, params = in_float32(real[kind][2])
    with np.load(real[kind][0] / "expected.npz") as expected:
        assert expected["logits"].std() > 1  # the comparison is not of zeros
        np.testing.assert_allclose(logits(cfg, params), expected["logits"], rtol=0, atol=1e-4)
        assert said(cfg, params) == expected["said"].tolist()
        if kind == "tanuki":  # what makes it no Mixtral can be seen
            found = logits(dataclasses.replace(cfg, gate_scale=1.0), params)
            assert np.abs(found - expected["logits"]).max() > 1e-2


def test_the_fixtures_are_small():
    assert sum(path.stat().st_size for path in make_export.HERE.rglob("*") if path.is_file()) < 60_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", REAL)
def test_the_transformers_that_is_installed_says_what_we_say(kind, real, monkeypatch, tmp_path):
    pytest.importorskip("torch", reason="needs the extra `parity`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
    loaded = from_pretrained(transformers, real[kind][2], monkeypatch, tmp_path)
    assert type(loaded).__name__ == f"{kind.capitalize()}ForCausalLM"
    theirs, answer = make_export.answers(loaded)
    ours = in_float32(real[kind][2])
    np.testing.assert_allclose(logits(*ours), theirs, rtol=0, atol=1e-4)
    assert said(*ours) == answer.tolist()
    loaded.save_pretrained(tmp_path / "again")
    assert_same_bits(
        opened(tmp_path / "again")[1], {name: w.astype(np.float32) for name, w in opened(real[kind][2])[1].items()}
    )


def from_pretrained(transformers, home, monkeypatch, scratch):
    """As users do; code that comes with the weights goes to a directory of the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(scratch / "modules"))
    return transformers.AutoModelForCausalLM.from_pretrained(home, trust_remote_code=True, **make_export.PLAIN).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_of_a_trained_recipe_says_the_same_in_transformers(name, tmp_path_factory, tmp_path, monkeypatch, capsys):
    home = tiny_recipe.trained(tmp_path_factory.getbasetemp()) / "stages" / name
    back = export(home, tmp_path / "back")
    assert_same_bits(opened(back)[1], stored(home)[1])
    assert config_json(back)["architectures"] == ["LlamaForCausalLM" if name == "pretrain" else "TanukiForCausalLM"]
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
    loaded = from_pretrained(transformers, back, monkeypatch, tmp_path)
    tokenizer, prompt = transformers.AutoTokenizer.from_pretrained(back), "昔々、狸は"
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    new = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)[0, ids.shape[1] :].tolist()
    new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
    capsys.readouterr()
    assert main(["generate", f"--checkpoint={home}", f"--prompt={prompt}", "--max_new_tokens=12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == tokenizer.decode(new)


# --- our own checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [module.PIECE, 1000, 30])  # all of an array, a few rows, less than one
@pytest.mark.parametrize(("kind", "dtype"), [("llama", "bfloat16"), ("mixtral", "float32"), ("tanuki", "bfloat16")])
def test_a_checkpoint_comes_back_to_the_last_bit(kind, dtype, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", piece)
    cfg, theirs, mine, _ = made(kind, dtype)
    back = export(save(tmp_path / "ours", cfg, mine), tmp_path / "back")
    assert_same_bits(read_directory(back), theirs)
    cfg_again, again = stored(import_(back, tmp_path / "again"))
    assert_same_bits(again, mine)
    assert cfg_again == cfg


@pytest.mark.parametrize("name", ["pretrain", "dpo"])
def test_a_stage_is_exported_with_all_that_belongs_to_it(name, tokenizer, tmp_path, capsys):
    home = tmp_path / "ours"
    cfg, named = stage(home, name, tokenizer)
    capsys.readouterr()
    back = export(home, tmp_path / "back")
    mixture = name != "pretrain"
    assert ("trust_remote_code=True" in capsys.readouterr().out) == mixture
    assert_same_bits(opened(back)[1], named)
    # A Unigram's tokenizer.model stays behind: llama.cpp would read it as another kind of model.
    same = {path.name for path in tokenizer.directory.iterdir()} - {"tokenizer.model"}
    assert same >= {"tokenizer.json", "tokenizer_config.json"}
    assert all((back / file).read_bytes() == (tokenizer.directory / file).read_bytes() for file in same)
    ours = {"config.json", "generation_config.json", "README.md", "model.safetensors"}
    assert {path.name for path in back.iterdir()} == same | ours | ({"modeling_tanuki.py"} if mixture else set())
    special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    assert special.items() <= config_json(back).items()
    assert json.loads((back / "generation_config.json").read_text()) == {"do_sample": False, **special}
    assert config_json(back)["vocab_size"] == cfg.vocab_size == 768


def test_one_step_is_exported_as_its_stage_is_and_twice_the_same(tmp_path):
    cfg, _, mine, _ = made("tanuki", n_layers=1)
    home = save(tmp_path / "ours", cfg, mine, step=4)
    back, again = export(home, tmp_path / "a/back"), export(home / "checkpoints/4", tmp_path / "b/back")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in back.iterdir()}


def test_experts_of_another_width_than_the_dense_ffn_are_exported(tmp_path):
    cfg = dense(n_layers=1, n_experts=4, expert_d_ff=20, normalized_gate=False)  # d_ff is 40
    mine = random(cfg)
    back = export(save(tmp_path / "ours", cfg, mine), tmp_path / "back")
    assert config_json(back)["intermediate_size"] == 20
    found, arrays = opened(back)
    assert_same_bits(arrays, mine)
    assert found == dataclasses.replace(cfg, d_ff=20, expert_d_ff=0)


@pytest.mark.slow
def test_upcycled_checkpoints_are_exported(tmp_path):
    cfg, _, mine, _ = made("llama", "bfloat16", n_layers=1)
    home, mixture = save(tmp_path / "dense", cfg, mine), tmp_path / "mixture"
    flags = ["--strategy=groups", "--n_experts=4", "--top_k=2", "--expert_d_ff=20", "--no_normalized_gate"]
    assert main(["upcycle", f"--checkpoint={home}", f"--output={mixture}", *flags]) == 0
    found, arrays = stored(mixture)
    back = export(mixture, tmp_path / "back")
    written = config_json(back)
    assert (written["model_type"], written["intermediate_size"], written["num_local_experts"]) == ("mixtral", 20, 4)
    again, same = opened(back)
    assert_same_bits(same, arrays)
    assert again == dataclasses.replace(found, d_ff=20, expert_d_ff=0)


def test_a_few_matrices_are_in_memory_at_a_time(tmp_path, monkeypatch):
    cfg, _, mine, _ = made("tanuki", n_layers=2)
    home, read, sizes, most = save(tmp_path / "ours", cfg, mine), [], [], []

    def counting(path, opening=checkpoint.open_lazy, **how):
        def counted(array):
            def reading(*at):
                result = array.read(*at)
                read.append(weakref.ref(result))
                sizes.append(result.nbytes)
                most.append(sum(reference() is not None for reference in read))
                return result

            return dataclasses.replace(array, read=reading)

        found = opening(path, **how)
        return dataclasses.replace(found, tree={name: counted(array) for name, array in found.tree.items()})

    monkeypatch.setattr(checkpoint, "open_lazy", counting)
    smallest = min(array.nbytes // (cfg.n_layers if "layers/" in name else 1) for name, array in mine.items())
    monkeypatch.setattr(module, "PIECE", smallest // (module.AHEAD + 1))  # as with real sizes, no window spans two arrays
    export(home, tmp_path / "back")
    assert len(read) == 3 + cfg.n_layers * (7 + 3 * cfg.n_experts)
    assert max(sizes) <= mine["embed/table"].nbytes < mine["layers/moe/up"][0].nbytes  # expert by expert
    # One is written, one is read and one waits between them, and a thread holds what it has handed over until it runs again.
    assert max(most) <= 3 + module.THREADS + 1 < len(read) / 4


# --- the model card -------------------------------------------------------------------------------------------------


def card(home, tmp_path):
    return (export(home, tmp_path / "back") / "README.md").read_text()


def test_the_card_says_how_the_model_was_trained_and_what_it_scored(tmp_path):
    home = tmp_path / "stages/dpo"
    cfg, _ = stage(home, "dpo")
    scores = {"exact_match": 0.25, "prompts": 30, "pair_accuracy": 0.75, "families": {"sum": 0.5}, "seconds": 12.5}
    (home / "done.json").write_text(json.dumps({"entry": {"name": "dpo", "scores": scores}}))
    text = card(home, tmp_path)
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert "library_name: transformers" in front
    total, active = model.count_parameters(cfg)
    assert "# 極小の狸" in body and f"{total:,} parameters" in body and f"{active:,} active" in body
    assert "TanukiForCausalLM" in body and "trust_remote_code=True" in body
    rows = [line for line in body.splitlines() if line.startswith("|")]
    stages = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:7]]
    assert [(row[0], row[1]) for row in stages] == list(
        zip(STAGES, ("pretrain", "upcycle", "pretrain", "sft", "dpo"), strict=True)
    )
    assert [row[2] for row in stages] == ["4 steps", "", "4 steps", "4 steps", "4 steps"]
    assert stages[0][3] == "ja 0.5, synthetic 0.5" and stages[4][3] == "pairs 1"
    assert "| exact_match | 0.25 |" in rows and "| pair_accuracy | 0.75 |" in rows
    assert "seconds" not in body and "families" not in body


def test_a_card_names_no_stage_that_came_later(tmp_path):
    """A base model was never trained on answers; nor did it see the long rows of DPO."""
    home = tmp_path / "stages/pretrain"
    stage(home, "pretrain")
    text = card(home, tmp_path)
    assert "| pretrain |" in text
    assert not any(f"| {later} |" in text for later in STAGES[1:])
    assert config_json(tmp_path / "back")["max_position_embeddings"] == 64


def test_without_a_recipe_the_card_has_a_name_and_sizes(real):
    for kind, (_, home, back) in real.items():
        text = (back / "README.md").read_text()
        assert f"# {home.name}" in text and f"{kind.capitalize()}ForCausalLM" in text
        assert "## Training" not in text and "## Scores" not in text
        assert ("trust_remote_code" in text) == (kind == "tanuki")


# --- the class of the normalised gate -------------------------------------------------------------------------------


def test_only_the_normalised_gate_comes_with_code(real):
    code = Path(module.__file__).with_name("modeling_tanuki.py").read_bytes()
    for kind, (_, _, back) in real.items():
        assert [path.name for path in back.glob("*.py")] == (["modeling_tanuki.py"] if kind == "tanuki" else [])
        assert ("auto_map" in config_json(back)) == (kind == "tanuki")
    back = real["tanuki"][2]
    assert (back / "modeling_tanuki.py").read_bytes() == code
    tree = ast.parse(code)
    classes = {f"modeling_tanuki.{node.name}" for node in tree.body if isinstance(node, ast.ClassDef)}
    assert set(config_json(back)["auto_map"].values()) <= classes
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= {"torch", "transformers"}  # nothing of ours, which those who load it have not
