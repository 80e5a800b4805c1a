import dataclasses
import json
import shutil

import numpy as np
import pytest

from tanuki_jax import checkpoint, interop
from tanuki_jax.cli.main import main
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.interop import importing
from tests.checkpoint.test_manager import files_of_at_most
from tests.interop import test_huggingface
from tests.interop.llama import INDEX, write
from tests.interop.published import (
    assert_same_bits,
    config_json,
    export,
    fails,
    import_,
    made,
    opened,
    read_directory,
    stored,
)

GATE = "model.layers.1.block_sparse_moe.gate.weight"
W3 = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


# --- there and back -------------------------------------------------------------------------------------------------


# Kind, dtype and number of files (0: one, without index); sizes and numbers that are no one's default.
CASES = {
    "llama in one file": ("llama", "float32", 0, dict(rope_theta=1e6, norm_eps=1e-5)),
    "llama": ("llama", "bfloat16", 3, dict(n_kv_heads=4, vocab_size=91)),
    "mixtral in one file": ("mixtral", "bfloat16", 0, dict(rope_theta=123456.789, norm_eps=3.0000001e-6, top_k=1)),
    "mixtral": ("mixtral", "float32", 3, dict()),
    "fused in one file": ("mixtral, fused", "float32", 0, dict(n_layers=1, n_experts=2, top_k=2, d_ff=7, head_dim=24)),
    "fused": ("mixtral, fused", "bfloat16", 3, dict()),
    "tanuki in one file": ("tanuki", "float32", 0, dict(n_kv_heads=1, head_dim=14, gate_scale=0.30000000000000004, top_k=5)),
    "tanuki": ("tanuki", "bfloat16", 30, dict(n_layers=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_directory_comes_back_to_the_last_bit(case, tmp_path, capsys):
    kind, dtype, shards, shape = CASES[case]
    cfg, theirs, mine, extra = made(kind, dtype, **shape)
    given = write(tmp_path / "given", cfg, theirs, shards, **extra)
    home = import_(given, tmp_path / "ours")
    assert capsys.readouterr().out.startswith(f"{home}: ")
    found, arrays = stored(home)
    assert found == cfg
    assert_same_bits(arrays, mine)
    back = export(home, tmp_path / "back")
    if kind == "mixtral, fused":  # the older layout is the one that every reader knows
        _, theirs, again, _ = made("mixtral", dtype, **shape)
        assert_same_bits(again, mine)
    assert_same_bits(read_directory(back), theirs)

    before, after = config_json(given), config_json(back)
    same = {
        *("architectures", "model_type", "vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
        *({"num_local_experts", "num_experts_per_tok", "sliding_window"} if cfg.n_experts else ()),
        *({"gate_scale"} if kind == "tanuki" else ()),
    }
    assert same <= before.keys()
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert after["rope_parameters"] == {"rope_type": "default", "rope_theta": cfg.rope_theta}
    assert after["torch_dtype"] == after["dtype"] == dtype  # of the weights, not of the config.json that came with them
    assert ("gate_scale" in after, "auto_map" in after) == (kind == "tanuki",) * 2


def test_the_longest_row_comes_back(tmp_path):
    """Servers take no prompt longer than this."""
    cfg, theirs, _, extra = made("llama", n_layers=1)
    given = write(tmp_path / "given", cfg, theirs, max_position_embeddings=8192, **extra)
    back = export(import_(given, tmp_path / "ours"), tmp_path / "back")
    assert config_json(back)["max_position_embeddings"] == 8192


def test_what_is_not_a_number_passes_as_it_is(tmp_path):
    cfg, theirs, _, extra = made("mixtral", n_layers=1, n_experts=3)
    bits = theirs[W3.replace("layers.1", "layers.0")].view(np.uint32)
    bits[0, :4] = [0x7FC00001, 0xFF800000, 0x80000000, 1]  # NaN with a payload, -Inf, -0, the smallest number
    given = write(tmp_path / "given", cfg, theirs, **extra)
    back = export(import_(given, tmp_path / "ours"), tmp_path / "back")
    assert_same_bits(read_directory(back), theirs)


def test_tied_embeddings_come_back_untied(tmp_path):
    cfg, theirs, mine, extra = made("llama", "bfloat16", n_layers=1)
    del theirs["lm_head.weight"]
    given = write(tmp_path / "given", cfg, theirs, **{**extra, "tie_word_embeddings": True})
    home = import_(given, tmp_path / "ours")
    table = theirs["model.embed_tokens.weight"]
    assert_same_bits(stored(home)[1], mine | {"head": np.ascontiguousarray(table.T)})
    back = export(home, tmp_path / "back")
    assert_same_bits(read_directory(back), theirs | {"lm_head.weight": table})
    assert config_json(back)["tie_word_embeddings"] is False


@pytest.mark.parametrize("wide", ["model.norm.weight", GATE, "model.embed_tokens.weight"])
def test_weights_of_two_dtypes_lose_nothing_or_are_refused(wide, tmp_path, capsys):
    """Rounding float32 to the bfloat16 of the rest would not be exact, as the verb says that it is."""
    cfg, theirs, mine, extra = made("mixtral", "bfloat16")
    _, float32, exact, _ = made("mixtral", "float32")
    theirs[wide] = float32[wide]
    if wide == "model.norm.weight":
        mine["norm_final"] = exact["norm_final"]
    elif wide == GATE:
        mine["layers/moe/router"] = mine["layers/moe/router"].astype(np.float32)
        mine["layers/moe/router"][1] = exact["layers/moe/router"][1]
    else:
        mine["embed/table"] = exact["embed/table"]
    given = write(tmp_path / "given", cfg, theirs, **extra)
    if main(["import", f"--hf={given}", f"--output={tmp_path / 'ours'}"]):
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("tanuki: ") and "float32" in line and "bfloat16" in line
        return
    found = stored(tmp_path / "ours")[1]
    for name, array in mine.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), array.astype(np.float32), err_msg=name)


def test_what_mixtrals_config_json_leaves_out_has_mixtrals_defaults(tmp_path):
    """transformers: rope_theta 1e6 and rms_norm_eps 1e-5, where Llama has 1e4 and 1e-6."""
    cfg, theirs, _, extra = made("mixtral")
    home = write(tmp_path / "given", cfg, theirs, **extra, rope_theta=..., rope_scaling=..., rms_norm_eps=...)
    found = interop.open_huggingface(home).cfg
    assert (found.rope_theta, found.norm_eps) == (1e6, 1e-5)


def test_a_snapshot_of_the_hub_is_links(tmp_path):
    cfg, theirs, mine, extra = made("tanuki", n_layers=1)
    given = write(tmp_path / "given", cfg, theirs, **extra)
    (tmp_path / "snapshot").mkdir()
    for file in given.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert_same_bits(opened(tmp_path / "snapshot")[1], mine)


def test_the_tokenizer_comes_along(tokenizer, tmp_path):
    cfg, theirs, _, extra = made("llama", vocab_size=512, n_layers=1)
    given = write(tmp_path / "given", cfg, theirs, **extra)
    for file in tokenizer.directory.iterdir():
        shutil.copy(file, given)
    home = import_(given, tmp_path / "ours")
    copied = {path.name: path.read_bytes() for path in (home / "tokenizer").iterdir()}
    assert copied.keys() >= {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    assert all((given / name).read_bytes() == data for name, data in copied.items())
    assert not {"config.json", INDEX} & copied.keys()
    text = "狸は魚を取りました。"
    assert Tokenizer(checkpoint.load(home).tokenizer_directory).encode(text) == tokenizer.encode(text)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    home = write(tmp_path_factory.mktemp("whole") / "llama", test_huggingface.CFG, test_huggingface.WHOLE)
    return {path.name: path.read_bytes() for path in home.iterdir()}


# What upcycling refuses and importing does not.
OTHER = {"mixtral", "experts in another way"}


@pytest.mark.parametrize("case", [case for case in test_huggingface.BAD if case not in OTHER])
def test_a_bad_llama_is_one_message(case, whole, tmp_path, capsys):
    home, words = test_huggingface.damaged(whole, tmp_path / "given", case)
    fails(capsys, tmp_path, "import", f"--hf={home}", f"--output={tmp_path / 'ours'}", words=words)


def without(*names):
    return lambda arrays: {name: w for name, w in arrays.items() if name not in names}


def changed(name, change):
    return lambda arrays: {**arrays, name: np.ascontiguousarray(change(arrays[name]))}


def added(name, *shape):
    return lambda arrays: {**arrays, name: np.zeros(shape, np.float32)}


def one_layer_fused(arrays):
    other = made("mixtral, fused")[1]
    theirs = {name: w for name, w in arrays.items() if "layers.1.block_sparse_moe" not in name}
    return theirs | {name: w for name, w in other.items() if "layers.1.mlp" in name}


SCALED = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 50.0}
# Kind, what is done to the tensors, keys of config.json, and the words that the message must have.
BAD = {
    "missing expert": ("mixtral", without(W3), {}, ["no tensor", W3]),
    "missing router": ("mixtral", without(GATE), {}, ["no tensor", GATE]),
    "missing experts": ("tanuki", without(DOWN), {}, ["no tensor", DOWN]),
    "missing norm": ("tanuki", without("model.norm.weight"), {}, ["no tensor", "model.norm.weight"]),
    "missing head": ("mixtral", without("lm_head.weight"), {}, ["no tensor", "lm_head.weight"]),
    "narrow expert": ("mixtral", changed(W3, lambda w: w[:-1]), {}, [W3, "shape", "39", "40"]),
    "expert on its side": ("mixtral", changed(W3, np.transpose), {}, [W3, "shape", "[32, 40]"]),
    "experts on their side": ("tanuki", changed(GATE_UP, lambda w: w.swapaxes(1, 2)), {}, [GATE_UP, "[5, 32, 80]"]),
    "fewer experts": ("mixtral, fused", changed(DOWN, lambda w: w[:-1]), {}, [DOWN, "[4, 32, 40]", "[5, 32, 40]"]),
    "wide router": ("mixtral", changed(GATE, lambda w: np.tile(w, (2, 1))), {}, [GATE, "[10, 32]"]),
    "more experts than config.json says": ("mixtral", dict, dict(num_local_experts=4), ["shape"]),
    "fewer experts than config.json says": ("mixtral", dict, dict(num_local_experts=6), ["6"]),
    "two layouts": ("mixtral", one_layer_fused, {}, ["no tensor", "layers.1"]),
    "bias of the router": ("mixtral", added(GATE.replace("weight", "bias"), 5), {}, ["gate.bias", "architecture"]),
    "bias of attention": ("tanuki", added("model.layers.0.self_attn.q_proj.bias", 24), {}, ["q_proj.bias", "architecture"]),
    "shared expert": ("tanuki", added("model.layers.0.mlp.shared_experts.up_proj", 4, 4), {}, ["shared_experts"]),
    "layer too many": ("mixtral", added("model.layers.3.input_layernorm.weight", 32), {}, ["layers.3", "architecture"]),
    "eight bits": ("mixtral", changed(W3, lambda w: w.astype(np.int8)), {}, [W3, "I8"]),
    "float16": ("tanuki", changed(DOWN, lambda w: w.astype(np.float16)), {}, [DOWN, "F16"]),
    # config.json
    "quantized": ("mixtral", dict, dict(quantization_config={"quant_method": "awq", "bits": 4}), ["quantized"]),
    "sliding window": ("mixtral", dict, dict(sliding_window=4096), ["sliding_window", "4096"]),
    "scaled positions": ("mixtral", dict, dict(rope_parameters=SCALED), ["rope_parameters", "yarn"]),
    "another activation": ("tanuki", dict, dict(hidden_act="gelu"), ["hidden_act", "gelu", "silu"]),
    "no experts in config.json": ("mixtral", dict, dict(num_local_experts=...), ["config.json", "num_local_experts"]),
    "experts as text": ("mixtral", dict, dict(num_local_experts="5"), ["config.json", "num_local_experts"]),
    "no top-k": ("tanuki", dict, dict(num_experts_per_tok=...), ["config.json", "num_experts_per_tok"]),
    "top-k above the experts": ("mixtral", dict, dict(num_experts_per_tok=6), ["6", "5"]),
    "gate without scale": ("tanuki", dict, dict(gate_scale=0.0), ["gate_scale"]),
    "scale as text": ("tanuki", dict, dict(gate_scale="much"), ["config.json", "gate_scale"]),
    "no epsilon": ("llama", dict, dict(rms_norm_eps=None), ["config.json", "rms_norm_eps"]),
    "epsilon as text": ("llama", dict, dict(rms_norm_eps="small"), ["config.json", "rms_norm_eps"]),
    "negative epsilon": ("llama", dict, dict(rms_norm_eps=-1e-5), ["config.json", "rms_norm_eps"]),
    "theta as text": ("llama", dict, dict(rope_theta="big"), ["config.json", "rope_theta"]),
    "negative theta": ("llama", dict, dict(rope_theta=-1.0), ["config.json", "rope_theta"]),
    "positions as text": ("llama", dict, dict(rope_parameters="default"), ["config.json", "rope_parameters"]),
    "index of numbers": ("llama", dict, {"index": {W3: 3}}, [INDEX]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_directory_is_one_message(case, tmp_path, capsys):
    kind, damage, settings, words = BAD[case]
    cfg, theirs, _, extra = made(kind)
    index = settings.get("index")
    settings = {name: value for name, value in settings.items() if name != "index"}
    home = write(tmp_path / "given", cfg, damage(theirs), **{**extra, **settings})
    if index:
        (home / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(theirs, 3)}))
    fails(capsys, tmp_path, "import", f"--hf={home}", f"--output={tmp_path / 'ours'}", words=[str(home), *words])


def test_heads_that_share_no_keys_evenly_are_one_message(tmp_path, capsys):
    cfg, theirs, _, extra = made("llama", n_kv_heads=3)
    home = write(tmp_path / "given", cfg, theirs, **extra)
    words = ["num_attention_heads", "num_key_value_heads"]
    fails(capsys, tmp_path, "import", f"--hf={home}", f"--output={tmp_path / 'ours'}", words=words)


def test_a_normalised_gate_over_one_expert_is_one_message(tmp_path, capsys):
    cfg, theirs, _, extra = made("tanuki", n_experts=1, top_k=1)
    home = write(tmp_path / "given", cfg, theirs, **extra)
    fails(capsys, tmp_path, "import", f"--hf={home}", f"--output={tmp_path / 'ours'}", words=["num_local_experts"])


@pytest.mark.parametrize("given", ["nowhere", "a file", "an empty directory", "our checkpoint"])
def test_what_is_no_published_model_is_one_message(given, tmp_path, capsys):
    home = tmp_path / "given"
    if given == "a file":
        home.write_text("{}")
    elif given != "nowhere":
        (home / "checkpoints/0" if "ours" in given else home).mkdir(parents=True)
    fails(capsys, tmp_path, "import", f"--hf={home}", f"--output={tmp_path / 'ours'}", words=[str(home)])


@pytest.mark.parametrize("there", ["a checkpoint", "an empty directory", "a file"])
def test_what_is_there_stays(there, tmp_path, capsys):
    cfg, theirs, _, extra = made("llama")
    home, output = write(tmp_path / "given", cfg, theirs, **extra), tmp_path / "ours"
    if there == "a checkpoint":
        import_(home, output)
    elif there == "a file":
        output.write_text("mine")
    else:
        output.mkdir()
    fails(capsys, tmp_path, "import", f"--hf={home}", f"--output={output}", words=["--output", str(output), "already"])


@pytest.mark.parametrize("size", [0, 3000])
def test_a_full_disk_is_one_message_and_nothing_is_left(size, tmp_path, capsys):
    cfg, theirs, _, extra = made("mixtral")
    home = write(tmp_path / "given", cfg, theirs, **extra)
    with files_of_at_most(size):
        fails(capsys, tmp_path, "import", f"--hf={home}", f"--output={tmp_path / 'ours'}", words=["disk", "full"])


def test_a_file_that_goes_away_while_it_is_read_is_one_message(tmp_path, capsys, monkeypatch):
    cfg, theirs, _, extra = made("mixtral")
    home = write(tmp_path / "given", cfg, theirs, **extra)

    def opened_once_more(path, opening=importing.open_huggingface):
        found = opening(path)
        (home / "model-00002-of-00003.safetensors").write_bytes(b"")
        return found

    monkeypatch.setattr(importing, "open_huggingface", opened_once_more)
    output = tmp_path / "ours"
    assert main(["import", f"--hf={home}", f"--output={output}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("tanuki: ") and "model-00002" in line
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_interrupted_it_leaves_nothing(tmp_path, capsys, monkeypatch):
    cfg, theirs, _, extra = made("mixtral")
    home = write(tmp_path / "given", cfg, theirs, **extra)

    def opened_and_stopped(path, opening=importing.open_huggingface):
        found = opening(path)

        def stop(*_):
            raise KeyboardInterrupt

        tree = found.tree | {"norm_final": dataclasses.replace(found.tree["norm_final"], read=stop)}
        return dataclasses.replace(found, tree=tree)

    monkeypatch.setattr(importing, "open_huggingface", opened_and_stopped)
    assert main(["import", f"--hf={home}", f"--output={tmp_path / 'ours'}"]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("tanuki: interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["given"]
