import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tanuki_jax import checkpoint
from tanuki_jax.cli.main import main
from tanuki_jax.errors import UserError
from tanuki_jax.upcycle import stream
from tests.checkpoint.test_manager import ON_DISK, files_of_at_most
from tests.interop.llama import dense, drawn, write
from tests.upcycle.sources import CFG, COPY, LLAMA, NOISY, Source, named, save, shape

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
    "no experts for a token": (["--top_k=0"], ["--top_k", "it is 0", "at least 1"]),
    "a router of one choice": (["--top_k=1"], ["top_k 1", "cannot learn", "2 or more"]),
    "a plain router of one choice": (["--top_k=1", "--n_experts=8"], ["top_k 1", "cannot learn"]),
    "two normalised experts": (["--n_experts=2"], ["n_experts 2", "cannot learn", "plain gate"]),
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
    "more than all dropped": (["--strategy=drop", "--drop_ratio=1.5"], ["--drop_ratio", "1.5"]),
    "a share that is no number": (["--strategy=drop", "--drop_ratio=nan"], ["--drop_ratio", "nan"]),
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
    assert main(["upcycle", *(f"{name}={value}".format(**odd) for name, value in usual.items())]) == 1
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
    assert main(["upcycle", *flags, "--n_experts=4"]) == 1
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
    assert main(command) == 1
    shutil.rmtree(home)
    write(home, CFG, {**arrays, "lm_head.weight": good})
    assert main(command) == 0
    np.testing.assert_array_equal(checkpoint.load(tmp_path / "mixture").params["head"], good.T)


def cut(home):
    for path in (p for p in (home / "checkpoints/0/params").rglob("d/*") if p.is_file()):
        path.write_bytes(path.read_bytes()[:10])


def with_a_blank(home):
    """Nothing that is read says that this file was touched; its check sum does."""
    path = home / "checkpoints/0/params/_METADATA"
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("damage", [cut, with_a_blank])
def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(damage, ours, tmp_path, capsys):
    home = shutil.copytree(ours, tmp_path / "dense")
    damage(home)
    given = set(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["upcycle", f"--checkpoint={home}", f"--output={tmp_path / 'mixture'}", "--n_experts=4"]) == 1
    found = capsys.readouterr()
    *progress, line = found.err.splitlines()
    assert found.out == "" and line.startswith("tanuki: checkpoint: ") and str(home) in line
    assert all(text.startswith("upcycle ") for text in progress)  # of a slow machine
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
        stream.format_prediction(job, tmp_path / "mixture")
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
from tanuki_jax.cli.main import main
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
from tanuki_jax import checkpoint, interop
from tanuki_jax.cli.main import main
from tanuki_jax.upcycle import stream

source, directory, kills = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
opened_by = stream.open_dense

def open_slowly(path, dtype):
    opened = opened_by(path, dtype)
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
        sys.exit(main(["upcycle", *flags]))
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
    kills = [(signal.SIGKILL, reads, 0) for reads in (dice.randrange(2, READS), READS)]
    kills += [(signal.SIGKILL, READS, dice.uniform(0.1, 0.6)) for _ in range(2)]  # while it is finished
    ends, _ = killed(kills, place(LLAMA), tmp_path)
    expected = named(checkpoint.load(mixture).params)
    for number, ((end, _), (_, reads, delay)) in enumerate(zip(ends, kills, strict=True)):
        output = tmp_path / str(number)
        assert (end in (-signal.SIGKILL, 0)) if delay else end == -signal.SIGKILL
        assert not output.exists() or reads == READS
        if output.exists():
            found = named(checkpoint.load(output).params)
            assert all((found[name] == array).all() for name, array in expected.items())
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith((".tmp", ".lock"))} <= {
        *map(str, range(len(kills)))
    }

    home = tmp_path / "0"  # the same command once more, beside what the kill left
    assert main(["upcycle", f"--checkpoint={place(LLAMA)}", f"--output={home}", *NOISY, "--seed=7"]) == 0
    assert checkpoint.load(home).cfg == checkpoint.load(mixture).cfg


def test_interrupted_it_ends_at_once_and_leaves_nothing(ours, tmp_path):
    ends, said = killed([(signal.SIGINT, 5, 0.02), (signal.SIGINT, 17, 0.03)], ours, tmp_path)
    assert [code for code, _ in ends] == [130, 130], said
    assert max(after for _, after in ends) <= 9, f"arrays, more than a layer's, still read after the interruption: {ends}"
    assert not list(tmp_path.iterdir())
    assert all(line.startswith(("tanuki: interrupted", "upcycle ")) for line in said.splitlines() if line), said
