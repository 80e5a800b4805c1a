import json
import shutil

import numpy as np
import pytest
import safetensors

from tanuki_jax.cli.main import main
from tanuki_jax.interop import export as module
from tests.checkpoint.test_manager import files_of_at_most
from tests.interop.llama import INDEX, dense
from tests.interop.llama import write as write_llama
from tests.interop.published import (
    NUMPY,
    assert_same_bits,
    export,
    fails,
    import_,
    made,
    opened,
    random,
    read_directory,
    read_file,
    save,
    stage,
)

HUGE = 1 << 40


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Checkpoints whose matrices have odd sizes, with their arrays by published names."""
    base, found = tmp_path_factory.mktemp("ours"), {}
    for kind, dtype in (("llama", "float32"), ("mixtral", "bfloat16"), ("tanuki", "bfloat16")):
        cfg, theirs, mine, _ = made(kind, dtype, n_layers=2, d_ff=7, n_heads=4, n_kv_heads=1, head_dim=2, vocab_size=89)
        found[kind] = save(base / kind, cfg, mine), theirs, mine
    return found


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [900, HUGE])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "tanuki"])
def test_files_are_as_the_library_wants_them(kind, shard, ours, tmp_path, monkeypatch):
    home, theirs, mine = ours[kind]
    monkeypatch.setattr(module, "SHARD", shard)
    back = export(home, tmp_path / "back")
    check_shards(back, theirs, shard)
    seen = {}
    for path in back.glob("*.safetensors"):
        header, begin, arrays = read_file(path)
        assert header.pop("__metadata__") == {"format": "pt"}  # transformers refuses files without it
        assert begin % 8 == 0
        end = 0
        for entry in header.values():  # no holes, no overlap, and every number where the hardware wants it
            item = NUMPY[entry["dtype"]].itemsize
            assert entry["data_offsets"] == [end, end + int(np.prod(entry["shape"])) * item] and (begin + end) % item == 0
            end = entry["data_offsets"][1]
        assert path.stat().st_size == begin + end
        with safetensors.safe_open(path, framework="numpy") as found:
            assert found.metadata() == {"format": "pt"} and set(found.keys()) == arrays.keys()
            seen |= {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118  # no dictionary
    assert_same_bits(seen, theirs)
    assert_same_bits(opened(back)[1], mine)


def check_shards(back, theirs, shard):
    """Shards are whole, as full as they may be, and what the index says that they are."""
    files = sorted(back.glob("*.safetensors"))
    if shard == HUGE:
        assert [path.name for path in files] == ["model.safetensors"] and not (back / INDEX).exists()
        return
    count = len(files)
    assert count > 2
    assert [path.name for path in files] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    index = json.loads((back / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in theirs.values())
    assert index["weight_map"].keys() == theirs.keys()
    inside = {path.name: read_file(path)[2] for path in files}
    assert all(name in inside[file] for name, file in index["weight_map"].items())
    sizes = [[w.nbytes for w in arrays.values()] for arrays in inside.values()]
    assert all(sum(part) <= shard or len(part) == 1 for part in sizes)
    assert all(sum(a) + b[0] > shard for a, b in zip(sizes, sizes[1:], strict=False))  # the next one had no room
    assert any(sum(part) > shard for part in sizes) and any(len(part) > 1 for part in sizes)  # both kinds were there


@pytest.mark.parametrize(("room", "tensors"), [(0, 4), (-1, 3), (1, 4)])
def test_a_shard_is_full_to_the_byte(room, tensors, ours, tmp_path, monkeypatch):
    home, theirs, _ = ours["llama"]
    order = list(read_file(export(home, tmp_path / "one") / "model.safetensors")[2])
    monkeypatch.setattr(module, "SHARD", sum(theirs[name].nbytes for name in order[:4]) + room)
    [first, *_] = sorted(export(home, tmp_path / "more").glob("*.safetensors"))
    assert list(read_file(first)[2]) == order[:tensors]


def test_a_shard_for_each_tensor(ours, tmp_path, monkeypatch):
    home, theirs, _ = ours["mixtral"]
    monkeypatch.setattr(module, "SHARD", 1)
    back = export(home, tmp_path / "back")
    assert len(list(back.glob("*.safetensors"))) == len(theirs)
    assert_same_bits(read_directory(back), theirs)


# --- tokenizers of others -------------------------------------------------------------------------------------------


def test_what_lies_beside_a_tokenizer_does_not_replace_what_was_trained(tokenizer, tmp_path):
    """A recipe may take its tokenizer from the directory of a published model, which has all of these."""
    home = tmp_path / "ours"
    _, named = stage(home, "pretrain", tokenizer)
    others = ("config.json", "generation_config.json", "model.safetensors", INDEX, "README.md", "modeling_tanuki.py")
    for name in (*others, "pytorch_model.bin", "optimizer.pt"):
        (home / "tokenizer" / name).write_text("{}")
    back = export(home, tmp_path / "back")
    assert_same_bits(opened(back)[1], named)
    assert not [name for name in others if (back / name).exists() and (back / name).read_bytes() == b"{}"]
    assert not {"pytorch_model.bin", "optimizer.pt"} & {path.name for path in back.iterdir()}


# tokenizer_config.json as published models have it, and the ids that the export must give.
PUBLISHED = {
    "without padding": (dict(pad_token=...), dict(pad_token_id=None)),
    "with dictionaries": (dict(bos_token={"content": "<s>", "lstrip": False}, eos_token={"content": "</s>"}), {}),
    "without a beginning": (dict(bos_token=None, pad_token=None), dict(bos_token_id=None, pad_token_id=None)),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_a_published_model_comes_back_with_its_tokenizer(case, tokenizer, tmp_path):
    keys, expected = PUBLISHED[case]
    cfg, theirs, _, extra = made("llama", n_layers=1, vocab_size=512)
    given = write_llama(tmp_path / "given", cfg, theirs, **extra)
    shutil.copy(tokenizer.directory / "tokenizer.json", given)
    settings = json.loads((tokenizer.directory / "tokenizer_config.json").read_text()) | keys
    settings = {name: value for name, value in settings.items() if value is not ...}
    (given / "tokenizer_config.json").write_text(json.dumps(settings))
    back = export(import_(given, tmp_path / "ours"), tmp_path / "back")
    assert json.loads((back / "tokenizer_config.json").read_text()) == settings
    special = dict(bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad) | expected
    for name in ("config.json", "generation_config.json"):
        written = json.loads((back / name).read_text())
        assert {key: written.get(key) for key in special} == special


# --- what is refused ------------------------------------------------------------------------------------------------

MIXED = {
    "dense layers first": (dict(first_dense=1), ["some layers", "dense"]),
    "every second layer": (dict(moe_every=2, normalized_gate=False), ["some layers", "dense"]),
    "a bias of the router": (dict(router_bias=True), ["router_bias"]),
    "a bias of Mixtral's router": (dict(router_bias=True, normalized_gate=False), ["router_bias"]),
}


@pytest.mark.parametrize("case", MIXED)
def test_what_no_class_computes_is_one_message(case, tmp_path, capsys):
    shape, words = MIXED[case]
    cfg = dense(n_layers=2, n_experts=3, **shape)
    home = save(tmp_path / "ours", cfg, random(cfg))
    fails(capsys, tmp_path, "export", f"--checkpoint={home}", f"--output={tmp_path / 'back'}", words=words)


@pytest.mark.parametrize("there", ["a model", "an empty directory", "a file"])
def test_what_is_there_stays(there, ours, tmp_path, capsys):
    home, output = ours["mixtral"][0], tmp_path / "back"
    if there == "a model":
        export(home, output)
    elif there == "a file":
        output.write_text("mine")
    else:
        output.mkdir()
    words = ["--output", str(output), "already"]
    fails(capsys, tmp_path, "export", f"--checkpoint={home}", f"--output={output}", words=words)


@pytest.mark.parametrize("given", ["nowhere", "a file", "an empty directory", "a published model", "a step that is not there"])
def test_what_is_no_checkpoint_is_one_message(given, ours, tmp_path, capsys):
    home = tmp_path / "given"
    if given == "a file":
        home.write_text("mine")
    elif given == "an empty directory":
        home.mkdir()
    elif given == "a published model":
        cfg, theirs, _, extra = made("llama")
        write_llama(home, cfg, theirs, **extra)
    elif "step" in given:
        home = ours["llama"][0] / "checkpoints/7"
    fails(capsys, tmp_path, "export", f"--checkpoint={home}", f"--output={tmp_path / 'back'}", words=[str(home)])


def test_an_output_within_a_file_is_one_message(ours, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file/back"
    fails(capsys, tmp_path, "export", f"--checkpoint={ours['llama'][0]}", f"--output={output}", words=[str(output)])


def chunks(home, name):
    """Files of a parameter of an imported checkpoint."""
    return sorted(path for path in (home / f"checkpoints/0/params/{name}").iterdir() if path.name[0].isdigit())


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "bit of a matrix flipped": lambda home: flip(chunks(home, "layers.attn.q")[1]),
    "missing matrix": lambda home: chunks(home, "layers.moe.up")[3].unlink(),
    "matrix cut": lambda home: cut(chunks(home, "layers.moe.down")[-1]),
    "missing parameter": lambda home: shutil.rmtree(home / "checkpoints/0/params/head"),
    "missing parameters": lambda home: shutil.rmtree(home / "checkpoints/0/params"),
    "missing meta": lambda home: shutil.rmtree(home / "checkpoints/0/meta"),
    "meta of another": lambda home: [p.write_text('{"step": 0}') for p in (home / "checkpoints/0/meta").glob("metadata")],
    "tokenizer that is none": lambda home: tokenizer_of(home, "{"),
}


def tokenizer_of(home, text):
    (home / "tokenizer").mkdir()
    (home / "tokenizer/tokenizer.json").write_text(text)
    (home / "tokenizer/tokenizer_config.json").write_text("{}")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    cfg, theirs, _, extra = made("mixtral", n_layers=2, n_experts=3)
    base = tmp_path_factory.mktemp("imported")
    return import_(write_llama(base / "given", cfg, theirs, **extra), base / "ours")


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_one_message_and_leaves_nothing(case, imported, tmp_path, capsys):
    home = shutil.copytree(imported, tmp_path / "ours")
    DAMAGE[case](home)
    fails(capsys, tmp_path, "export", f"--checkpoint={home}", f"--output={tmp_path / 'back'}", words=[str(home)])


@pytest.mark.parametrize("size", [100, 5000])
def test_a_full_disk_is_one_message_and_leaves_nothing(size, imported, tmp_path, capsys):
    output = tmp_path / "back"
    with files_of_at_most(size):
        fails(capsys, tmp_path, "export", f"--checkpoint={imported}", f"--output={output}", words=["disk", "full"])


@pytest.mark.parametrize("after", ["_write", "_card"])
def test_interrupted_it_leaves_nothing(after, imported, tmp_path, capsys, monkeypatch):
    work = getattr(module, after)

    def stop(*arguments):
        work(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, after, stop)
    assert main(["export", f"--checkpoint={imported}", f"--output={tmp_path / 'back'}"]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("tanuki: interrupted")
    assert not list(tmp_path.iterdir())
