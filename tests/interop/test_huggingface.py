import dataclasses
import json

import numpy as np
import pytest

from tanuki_jax import interop, model
from tanuki_jax.cli.main import main
from tanuki_jax.errors import UserError
from tests.interop.llama import INDEX, dense, drawn, flat, save_file, shapes, write
from tests.interop.llama import settings as config_json

CFG = dense()
SHARD = "model-00002-of-00003.safetensors"  # has layer 1
UP, DOWN, HEAD, TABLE = (
    *("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    *("lm_head.weight", "model.embed_tokens.weight"),
)
THETA = CFG.rope_theta


def read(opened):
    """All of a checkpoint, a layer at a time."""
    return {
        name: np.stack([stored.read(i) for i in range(stored.shape[0])]) if name.startswith("layers/") else stored.read()
        for name, stored in opened.tree.items()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_the_shapes_of_the_helper_are_those_of_its_arrays():
    assert {name: w.shape for name, w in drawn(CFG).items()} == shapes(CFG)


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [0, 1, 3, 30])
def test_a_directory_is_read_as_our_tree_to_the_last_bit(dtype, shards, tmp_path):
    arrays = drawn(CFG, dtype=dtype)
    opened = interop.open_llama(write(tmp_path / "llama", CFG, arrays, shards))
    assert opened.cfg == dataclasses.replace(CFG, param_dtype=dtype)
    expected = flat(CFG, arrays)
    assert_same(read(opened), expected)
    assert {name: stored.shape for name, stored in opened.tree.items()} == {
        n: s for n, _, s in model.named_parameters(opened.cfg)
    }
    assert all(stored.dtype == model.parameter_dtype(opened.cfg, name) for name, stored in opened.tree.items())


def test_norms_in_float32_beside_matrices_in_bfloat16_are_read_as_they_are(tmp_path):
    arrays = drawn(CFG, dtype="bfloat16")
    arrays |= {name: w.astype(np.float32) + np.float32(2**-12) for name, w in arrays.items() if "norm" in name}
    opened = interop.open_llama(write(tmp_path / "llama", CFG, arrays))
    assert opened.cfg.param_dtype == "bfloat16"
    assert_same(read(opened), flat(CFG, arrays))


@pytest.mark.parametrize("name", ["layers/attn/q", "layers/mlp/down", "norm_final"])
def test_read_without_a_layer_gives_all_of_an_array(name, tmp_path):
    arrays = drawn(CFG)
    opened = interop.open_llama(write(tmp_path / "llama", CFG, arrays))
    np.testing.assert_array_equal(opened.tree[name].read(), flat(CFG, arrays)[name])


@pytest.mark.parametrize("stored_twice", [False, True])
def test_tied_embeddings_are_the_head_too(stored_twice, tmp_path):
    arrays = drawn(CFG)
    head = arrays.pop(HEAD)
    if stored_twice:  # as some files have it
        arrays[HEAD] = arrays[TABLE].copy()
    opened = interop.open_llama(write(tmp_path / "llama", CFG, arrays, tie_word_embeddings=True))
    assert_same(read(opened), flat(CFG, arrays))
    np.testing.assert_array_equal(opened.tree["head"].read(), arrays[TABLE].T)
    assert (opened.tree["head"].read() != head.T).any()


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    arrays = drawn(CFG)
    home = write(tmp_path / "llama", CFG, arrays)
    opened = interop.open_llama(home)
    other = drawn(CFG, seed=1)
    for shard in home.glob("*.safetensors"):  # other numbers in the same places of the same files
        data = shard.read_bytes()
        for name, array in arrays.items():
            data = data.replace(array.tobytes(), other[name].tobytes())
        with shard.open("r+b") as f:
            f.write(data)
    assert_same(read(opened), flat(CFG, other))


def test_what_else_lies_in_the_directory_is_left_alone(tmp_path):
    arrays = drawn(CFG)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(3)}
    home = write(tmp_path / "llama", CFG, arrays | extra)
    (home / "pytorch_model.bin").write_bytes(b"no")
    save_file(home / "model.safetensors", {"other": np.zeros(3, np.float32)})  # the index comes first
    assert_same(read(interop.open_llama(home)), flat(CFG, arrays))


# Keys of config.json -> keys of our model that they set, other than SHAPE's.
SPELLINGS = {
    "rope_theta": (dict(rope_theta=5e5), dict(rope_theta=5e5)),
    "rope_theta as a whole number": (dict(rope_theta=1_000_000), dict(rope_theta=1e6)),
    "rope_parameters": (
        dict(rope_theta=..., rope_scaling=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        dict(rope_theta=5e5),
    ),
    "rope_parameters without a type": (dict(rope_theta=..., rope_parameters={"rope_theta": 7.5}), dict(rope_theta=7.5)),
    "no rope at all": (dict(rope_theta=..., rope_scaling=...), dict(rope_theta=10_000.0)),
    "no epsilon": (dict(rms_norm_eps=...), dict(norm_eps=1e-6)),
    "no bias keys": (dict(attention_bias=..., mlp_bias=..., hidden_act=...), {}),
    "keys that change nothing": (dict(use_cache=True, attention_dropout=0.0, pretraining_tp=1, bos_token_id=1), {}),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings_of_config_json(case, tmp_path):
    keys, expected = SPELLINGS[case]
    opened = interop.open_llama(write(tmp_path / "llama", CFG, drawn(CFG), **keys))
    assert opened.cfg == dataclasses.replace(CFG, **expected)
    assert isinstance(opened.cfg.rope_theta, float)


def test_heads_that_config_json_does_not_give_have_the_defaults_of_llama(tmp_path):
    cfg = dense(n_heads=4, n_kv_heads=4, head_dim=8)
    arrays = drawn(cfg)
    for name, value in (("absent", ...), ("null", None)):
        opened = interop.open_llama(write(tmp_path / name, cfg, arrays, num_key_value_heads=value, head_dim=value))
        assert opened.cfg == cfg
    assert_same(read(opened), flat(cfg, arrays))


# --- bad input ------------------------------------------------------------------------------------------------------


def change(file, **keys):
    """Sets keys of a JSON file; ... takes one away."""
    made = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({name: value for name, value in made.items() if value is not ...}))


def config(**keys):
    return lambda home: change(home / "config.json", **keys)


def replaced(**arrays):
    """Writes the directory anew with other arrays."""

    def damage(home):
        made = drawn(CFG) | {name.replace("__", "."): array for name, array in arrays.items()}
        given = json.loads((home / "config.json").read_text())
        for path in home.iterdir():
            path.unlink()
        home.rmdir()
        write(home, CFG, {name: array for name, array in made.items() if array is not ...})
        (home / "config.json").write_text(json.dumps(given))

    return damage


def cut(size):
    def damage(home):
        data = (home / SHARD).read_bytes()
        (home / SHARD).write_bytes(data[: int(len(data) * size) if size < 1 else int(size)])

    return damage


def index_names_the_wrong_file(home):
    where = json.loads((home / INDEX).read_text())["weight_map"]
    change(home / INDEX, weight_map={**where, UP: "model-00001-of-00003.safetensors"})


def only_torch_files(home):
    for path in home.glob("*.safetensors*"):
        path.rename(path.with_suffix(".bin"))


def write_text(name, text):
    return lambda home: (home / name).write_bytes(text.encode() if isinstance(text, str) else text)


NAMES = {"up": UP.replace(".", "__"), "head": HEAD.replace(".", "__"), "table": TABLE.replace(".", "__")}
WHOLE = drawn(CFG)
BAD = {
    "missing tensor": (replaced(**{NAMES["up"]: ...}), ["no tensor", UP]),
    "missing head": (replaced(**{NAMES["head"]: ...}), ["no tensor", HEAD]),
    "missing shard": (lambda home: (home / SHARD).unlink(), [SHARD, "download"]),
    "truncated shard": (cut(0.7), [SHARD, "cannot be read", "download"]),
    "truncated header": (cut(100), [SHARD, "cannot be read"]),
    "empty shard": (cut(1e-9), [SHARD, "cannot be read"]),
    "index naming a file that lacks the tensor": (
        index_names_the_wrong_file,
        ["model-00001-of-00003.safetensors", UP, "index"],
    ),
    "index cut": (write_text(INDEX, '{"weight_map": {'), [INDEX, "damaged"]),
    "index without a map": (write_text(INDEX, '{"metadata": {}}'), [INDEX, "weight_map"]),
    "index that is a list": (write_text(INDEX, "[]"), [INDEX]),
    "no safetensors": (only_torch_files, ["model.safetensors", "download"]),
    # tensors
    "matrix of another size": (replaced(**{NAMES["up"]: np.zeros((41, 32), np.float32)}), [UP, "shape", "41", "40"]),
    "matrix on its side": (replaced(**{NAMES["up"]: np.ascontiguousarray(WHOLE[UP].T)}), [UP, "shape", "[32, 40]", "[40, 32]"]),
    "table on its side": (
        replaced(**{NAMES["table"]: np.ascontiguousarray(WHOLE[TABLE].T)}),
        [TABLE, "shape", "[32, 88]", "[88, 32]"],
    ),
    "fewer rows than the vocabulary": (replaced(**{NAMES["table"]: WHOLE[TABLE][:80]}), [TABLE, "shape", "80", "88"]),
    "scalar": (replaced(**{NAMES["up"]: np.zeros((), np.float32)}), [UP, "shape"]),
    "wider in config.json": (config(intermediate_size=48), ["mlp.gate_proj", "shape", "40", "48"]),
    "float16": (replaced(**{name.replace(".", "__"): w.astype(np.float16) for name, w in WHOLE.items()}), ["F16", "bfloat16"]),
    "one tensor of float16": (replaced(**{NAMES["up"]: WHOLE[UP].astype(np.float16)}), [UP, "F16"]),
    "quantised matrix": (replaced(**{NAMES["up"]: np.ones((40, 32), np.int8)}), [UP, "I8"]),
    "tensor that has no place": (
        replaced(model__layers__1__self_attn__q_proj__bias=np.zeros(24, np.float32)),
        ["model.layers.1.self_attn.q_proj.bias"],
    ),
    # config.json
    "quantised": (config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), ["quanti"]),
    "gpt2": (config(model_type="gpt2"), ["model_type", "'gpt2'", "llama"]),
    "mixtral": (config(model_type="mixtral", num_local_experts=8), ["mixture already", "mixtral"]),
    "experts in another way": (config(num_local_experts=8), ["mixture already"]),
    "no model_type": (config(model_type=...), ["model_type", "None"]),
    "biases of attention": (config(attention_bias=True), ["attention_bias", "True"]),
    "biases of the FFN": (config(mlp_bias=True), ["mlp_bias", "True"]),
    "another activation": (config(hidden_act="gelu"), ["hidden_act", "'gelu'", "'silu'"]),
    "rope scaling": (config(rope_scaling={"type": "linear", "factor": 2.0}), ["rope_scaling", "linear"]),
    "rope scaling of Llama 3": (config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), ["rope_scaling", "llama3"]),
    "rope scaling in rope_parameters": (
        config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
        ["rope", "llama3"],
    ),
    "rope scaling in rope_parameters by its old name": (
        config(rope_parameters={"type": "linear", "rope_theta": 5e5, "factor": 8.0}),
        ["rope", "linear"],
    ),
    "cut config.json": (write_text("config.json", '{"model_type": "llama", '), ["config.json", "damaged"]),
    "config.json that is no text": (write_text("config.json", b"\xff\xfe\x00"), ["config.json", "damaged"]),
    "config.json that is a list": (write_text("config.json", "[1]"), ["config.json"]),
    "empty config.json": (write_text("config.json", ""), ["config.json", "damaged"]),
    "null in config.json": (config(hidden_size=None), ["config.json", "hidden_size"]),
    "text in config.json": (config(num_hidden_layers="3"), ["config.json", "num_hidden_layers"]),
} | {
    f"no {key}": (config(**{key: ...}), ["config.json", key])
    for key in ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {path.name: path.read_bytes() for path in write(tmp_path_factory.mktemp("whole") / "llama", CFG, WHOLE).iterdir()}


def damaged(whole, home, case):
    home.mkdir()
    for name, data in whole.items():
        (home / name).write_bytes(data)
    damage, words = BAD[case]
    damage(home)
    return home, words


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_before_anything_is_read(case, whole, tmp_path):
    home, words = damaged(whole, tmp_path / "llama", case)
    with pytest.raises(UserError) as error:
        interop.open_llama(home)
    message = str(error.value)
    assert str(home) in message and "\n" not in message and len(message) < 400
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "case", ["truncated shard", "missing tensor", "matrix of another size", "gpt2", "mixtral", "no hidden_size"]
)
def test_upcycling_bad_input_is_one_line_and_leaves_nothing(case, whole, tmp_path, capsys):
    home, words = damaged(whole, tmp_path / "llama", case)
    given = set(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["upcycle", f"--checkpoint={home}", f"--output={tmp_path / 'mixture'}", "--n_experts=4"]) == 1
    found = capsys.readouterr()
    [line] = found.err.splitlines()
    assert found.out == "" and line.startswith("tanuki: ") and all(word in line for word in words), line
    assert set(tmp_path.rglob("*")) == given


def test_config_json_of_the_helper_has_the_keys_that_are_read():
    assert {"hidden_act", "attention_bias", "mlp_bias", "rope_scaling"} <= config_json(CFG).keys()
