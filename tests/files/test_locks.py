"""Two of everything: pairs of commands in one place, killed holders, and that what is only read stays as it is."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tanuki_jax import checkpoint, config, interop
from tanuki_jax.checkpoint import Checkpoints
from tanuki_jax.cli.main import main
from tanuki_jax.data import prepare
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tanuki_jax.recipe import initial_state
from tanuki_jax.recipe.run import run_recipe
from tanuki_jax.train.metrics import MetricsWriter
from tests.checkpoint.test_checksums import STATE, saved, state_of
from tests.files.test_lock import elsewhere, holder, tree
from tests.interop import published
from tests.tiny_recipe import CONFIG

ROOT = Path(__file__).parents[2]


def tanuki(*flags, cwd=None):
    """A command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0"}
    command = [sys.executable, "-m", "tanuki_jax.cli", *map(str, flags)]
    return subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def one_of(*processes):
    """One of two processes ends as it should, the other says who holds the place, and nothing else."""
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1], said
    first, second = sorted(zip(processes, said, strict=True), key=lambda one: one[0].returncode)
    [line] = second[1].splitlines()
    assert re.match(rf"tanuki: --(output|workdir): .* is in use by process {first[0].pid} on .*, since .*tanuki .*", line), line


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def arrays(directory):
    opened = checkpoint.open_lazy(directory)
    return {name: stored.read().tobytes() for name, stored in opened.tree.items()}


def hidden(directory):
    """What a command that has ended must not leave."""
    return [path.name for path in directory.rglob(".*") if not path.name.startswith((".zarray", ".zgroup", ".zattrs"))]


def write_rows(path, count, text="狸が山に住む。The moon is over the hill."):
    path.write_text("".join(json.dumps({"text": f"{i} {text} {i * 7}"}, ensure_ascii=False) + "\n" for i in range(count)))
    return path


@pytest.fixture
def place(tmp_path):
    """A folder, and a link to it."""
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place", target_is_directory=True)
    return tmp_path / "place"


# --- pairs --------------------------------------------------------------------------------------------------------------


def test_of_two_that_prepare_one_store_one_does_so_as_if_alone(place, tokenizer):
    flags = ["data", "prepare", f"--input={write_rows(place / 'a.jsonl', 20_000)}", f"--tokenizer={tokenizer.directory}"]
    one_of(tanuki(*flags, f"--output={place / 'store'}"), tanuki(*flags, "--output=../link/./store", cwd=place))
    assert main([*flags, f"--output={place / 'alone'}"]) == 0
    assert contents(place / "store") == contents(place / "alone") and not hidden(place)


@pytest.mark.slow
def test_of_two_that_train_one_tokenizer_one_does_so_as_if_alone(place):
    flags = ["tokenizer", "train", f"--input={write_rows(place / 'a.jsonl', 3000)}", "--vocab_size=400", "--boundary=none"]
    one_of(tanuki(*flags, "--output=tok", cwd=place), tanuki(*flags, f"--output={place}/../link/tok"))
    assert main([*flags, f"--output={place / 'alone'}"]) == 0
    assert contents(place / "tok") == contents(place / "alone") and not hidden(place)


RECIPE = """
from tanuki_jax import config
def get_config():
    c = config.recipe(name="Tiny", tensorboard=False)
    c.model.update(dict(vocab_size=640, n_layers=1, d_model=32, d_ff=64, n_heads=2, n_kv_heads=1, head_dim=16))
    c.data = dict(a="{home}/a.jsonl")
    c.tokenizer.path = "{tokenizer}"
    c.stages.pretrain = config.stage("pretrain", mixture=dict(a=(1.0,)), seq_len=64, batch_size=8, steps=6, save_every=3)
    return c
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer):
    """A recipe of one stage, what it is when it runs alone, and the model in Hugging Face's format."""
    home = tmp_path_factory.mktemp("home")
    write_rows(home / "a.jsonl", 300)
    (home / "c.py").write_text(RECIPE.format(home=home, tokenizer=tokenizer.directory))
    assert tanuki("run", f"--config={home / 'c.py'}", f"--workdir={home / 'alone'}").wait(300) == 0
    assert main(["export", f"--checkpoint={home / 'alone/stages/pretrain'}", f"--output={home / 'hf'}"]) == 0
    (home / "link").symlink_to(home, target_is_directory=True)
    return home


def trained(workdir):
    """What must be the same in two workdirs of one recipe, bit by bit."""
    stage = workdir / "stages/pretrain"
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    steps = sorted(path.name for path in (stage / "checkpoints").iterdir())
    return arrays(stage), [(row["step"], row["loss"], row["grad_norm"]) for row in rows], contents(workdir / "data"), steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "again", "other"),
    [
        ("run", "run", "run"),
        ("run", "run", "../{name}/link/run"),
        ("run", "train", "run"),
        ("train", "run", "link/run"),
        ("train", "train", "./run/"),
    ],
)
def test_of_two_runs_of_one_workdir_one_runs_as_if_alone(home, tmp_path, verb, again, other):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    flags = {"run": ["run"], "train": ["train", "--stage=pretrain"]}
    both = ((flags[verb], tmp_path / "run"), (flags[again], other.format(name=tmp_path.name)))
    one_of(*(tanuki(*v, f"--config={home / 'c.py'}", f"--workdir={where}", cwd=tmp_path) for v, where in both))
    assert trained(tmp_path / "run") == trained(home / "alone") and not hidden(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["export", "import", "upcycle"])
def test_of_two_that_write_one_output_one_does_so_as_if_alone(home, tmp_path, verb):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    stage = f"--checkpoint={home / 'alone/stages/pretrain'}"
    flags = {"export": [stage], "import": [f"--hf={home / 'hf'}"], "upcycle": [stage, "--n_experts=3", "--seed=3"]}[verb]
    one_of(
        tanuki(verb, *flags, f"--output={tmp_path / 'out'}"),
        tanuki(verb, *flags, f"--output=../{tmp_path.name}/link/out", cwd=tmp_path),
    )
    assert main([verb, *flags, f"--output={tmp_path / 'alone'}"]) == 0
    found = contents if verb == "export" else arrays  # others have an id of their own in their meta
    assert found(tmp_path / "out") == found(tmp_path / "alone") and not hidden(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        ["run", CONFIG, "--workdir={}"],
        ["train", CONFIG, "--stage=pretrain", "--workdir={}"],
        ["upcycle", "--checkpoint=gone", "--output={}"],
        ["import", "--hf=gone", "--output={}"],
        ["export", "--checkpoint=gone", "--output={}"],
        ["tokenizer", "train", "--input=gone", "--output={}"],
        ["data", "prepare", "--input=gone", "--tokenizer=gone", "--output={}"],
    ],
    ids=lambda flags: " ".join(flags[:2]),
)
def test_a_verb_that_finds_its_place_held_writes_nothing(tmp_path, capsys, flags):
    with holder(tmp_path / "x", "workdir" if "--workdir={}" in flags else "output") as first:
        before = tree(tmp_path)
        assert main([flag.format(tmp_path / "x") for flag in flags]) == 1
        assert tree(tmp_path).keys() == before.keys()
    [line] = capsys.readouterr().err.splitlines()
    assert f"is in use by process {first.pid} on " in line


def test_a_library_that_is_called_finds_its_place_held(tmp_path, tokenizer):
    rows = write_rows(tmp_path / "a.jsonl", 3)
    published.stage(tmp_path / "stage", "pretrain", tokenizer)
    for kind, call in (
        ("workdir", lambda: run_recipe(config.load([CONFIG]), tmp_path / "x")),
        ("output", lambda: prepare.prepare(str(rows), tokenizer, tmp_path / "x")),
        ("output", lambda: interop.export_huggingface(tmp_path / "stage", tmp_path / "x")),
    ):
        with holder(tmp_path / "x", kind), pytest.raises(UserError, match="is in use by process"):
            call()
        assert tree(tmp_path / "x").keys() <= {".lock"}
        shutil.rmtree(tmp_path / "x", ignore_errors=True)


def test_a_dry_run_and_what_only_reads_need_no_lock(tmp_path, capsys, tokenizer):
    published.stage(tmp_path / "stage", "pretrain", tokenizer)
    with holder(tmp_path / "x"):
        flags = [f"--checkpoint={tmp_path / 'stage'}", f"--output={tmp_path / 'x'}", "--dry_run", "--n_experts=3"]
        assert main(["upcycle", *flags]) == 0


# --- killed -------------------------------------------------------------------------------------------------------------


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for children in /proc")
def test_a_killed_prepare_takes_its_workers_along_and_is_taken_over(place, tokenizer, caplog):
    for name in "ab":
        write_rows(place / f"{name}.jsonl", 5_000)
    flags = ["data", "prepare", f"--input={place}/?.jsonl", f"--tokenizer={tokenizer.directory}", "--shard_characters=40000"]
    process = tanuki(*flags, f"--output={place / 'store'}", "--workers=2")
    workers = set()
    while not list(place.glob(".store.partial/*.json")) or len(list(place.glob(".store.partial/0*.json"))) < 2:
        assert process.poll() is None, process.stderr.read()
        workers.update(children(process.pid))
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 5
    while left := [pid for pid in workers if lock._started(pid) not in (None, "gone")]:
        assert time.monotonic() < until, left
        time.sleep(0.01)
    assert (place / ".store.lock").is_file()
    for output in ("store", "alone"):
        assert main([*flags, f"--output={place / output}", "--workers=1"]) == 0
    assert f"taken over from process {process.pid} on " in caplog.text
    assert contents(place / "store") == contents(place / "alone") and not hidden(place)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_ended_is_gone_on_with(home, tmp_path, number):
    command = ["run", f"--config={home / 'c.py'}", f"--workdir={tmp_path / 'run'}"]
    process = tanuki(*command)
    while not list(tmp_path.glob("run/stages/pretrain/checkpoints/3")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=100)
    assert (tmp_path / "run/.lock").exists() == (number == signal.SIGKILL)
    again = tanuki(*command)
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0 and ("taken over from process" in said) == (number == signal.SIGKILL), said
    assert trained(tmp_path / "run")[:3] == trained(home / "alone")[:3] and not hidden(tmp_path)


# --- lost ---------------------------------------------------------------------------------------------------------------


def test_a_run_that_lost_its_lock_saves_nothing_and_leaves_the_other_ones_save_alone(tmp_path):
    home = tmp_path / "stages" / "a"
    with lock.workdir(tmp_path):
        saves, metrics = saved(home, 2, keep=5), MetricsWriter(home, 0, False)
        metrics.write({"step": 1, "seconds": 0.0})
        elsewhere(tmp_path / ".lock")
        theirs = home / "checkpoints/4.orbax-checkpoint-tmp/params"
        theirs.mkdir(parents=True)
        with pytest.raises(UserError, match="taken over by process 12 on elsewhere"):
            saves.save(4, state_of(4), {"model": {}})
        with pytest.raises(UserError, match="taken over by process 12 on elsewhere"):
            metrics.write({"step": 2, "seconds": 0.0})
        metrics.close()
    assert theirs.is_dir() and not (home / "checkpoints/4").exists()
    assert len((home / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_run_whose_lock_is_removed_ends_with_one_line(home, tmp_path):
    steps = "--config.stages.pretrain.steps=100000"
    process = tanuki("run", f"--config={home / 'c.py'}", f"--workdir={tmp_path / 'run'}", steps)
    while not list(tmp_path.glob("run/stages/pretrain/checkpoints/3")):
        assert process.poll() is None
        time.sleep(0.01)
    (tmp_path / "run/.lock").unlink()
    said = process.communicate(timeout=100)[1].splitlines()
    assert process.returncode == 1 and "the lock" in said[-1] and "was removed" in said[-1], said[-9:]
    assert not any("Traceback" in line for line in said)


# --- read only ----------------------------------------------------------------------------------------------------------


def test_opening_a_stage_leaves_the_save_that_another_run_writes(tmp_path):
    unfinished = tmp_path / "checkpoints/8.orbax-checkpoint-tmp"
    saved(tmp_path, 6).close()
    unfinished.mkdir()
    before = tree(tmp_path)
    for keep in (2, checkpoint.KEEP_ALL):
        opened = Checkpoints(tmp_path, keep=keep)
        assert opened.latest() == 6 and opened.resume(STATE, lambda meta: None, lambda *told: None)
        opened.close()
    assert tree(tmp_path) == before
    saved(tmp_path, 7).close()  # the holder of the lock, at its first save
    assert not unfinished.exists()


def test_opening_a_stage_that_is_not_there_makes_nothing(tmp_path):
    opened = Checkpoints(tmp_path / "stage")
    assert opened.latest() is None and not opened.steps()
    opened.close()
    with pytest.raises(UserError, match="has no checkpoints/<step>"):
        initial_state.load_moments(tmp_path / "stage", STATE)
    assert not list(tmp_path.iterdir())


def test_what_is_only_read_stays_as_it_is(tmp_path, monkeypatch, capsys, tokenizer):
    source = tmp_path / "source"
    published.stage(source, "pretrain", tokenizer)
    rows = write_rows(tmp_path / "a.jsonl", 2)
    store = [f"--tokenizer={source / 'tokenizer'}", f"--output={tmp_path / 'store'}"]
    assert main(["data", "prepare", f"--input={rows}", *store]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    before = {name: tree(tmp_path / name) for name in ("source", "store")}
    for number, given in enumerate((f"--checkpoint={source}", f"--checkpoint={source / 'checkpoints/4'}")):
        for flags in (
            ["export", given, f"--output={tmp_path / f'hf{number}'}"],
            ["upcycle", given, f"--output={tmp_path / f'mixture{number}'}", "--n_experts=3"],
            ["score", given, f"--input={rows}"],
            ["generate", given, "--prompt=狸", "--max_new_tokens=2"],
            ["chat", given, "--max_new_tokens=2"],
            ["data", "inspect", f"--data={tmp_path / 'store'}", store[0], "--seq_len=16"],
        ):
            assert main(flags) == 0, (flags, capsys.readouterr().err)
    assert {name: tree(tmp_path / name) for name in before} == before


@pytest.mark.slow
def test_a_stage_that_starts_from_a_step_of_elsewhere_leaves_it_as_it_is(home, tmp_path):
    shutil.copytree(home / "alone", tmp_path / "source", copy_function=shutil.copy)
    step = tmp_path / "source/stages/pretrain/checkpoints/6"
    before = tree(tmp_path / "source")
    for restore in ("params", "all"):
        flags = [f"--config.stages.pretrain.init_from={step}", f"--config.stages.pretrain.restore={restore}"]
        process = tanuki("run", f"--config={home / 'c.py'}", f"--workdir={tmp_path / restore}", *flags)
        assert process.communicate(timeout=300)[1] is not None and process.returncode == 0
    assert tree(tmp_path / "source") == before


# --- read while a run goes on -------------------------------------------------------------------------------------------


def newer(home):
    """A step that a run has written since."""
    shutil.copytree(home / "checkpoints/4", home / "checkpoints/6")


@pytest.mark.parametrize("slowly", [False, True])
def test_a_step_that_is_removed_while_it_is_read_is_called_that(tmp_path, tokenizer, slowly):
    published.stage(tmp_path / "stage", "pretrain", tokenizer)
    opened = checkpoint.open_lazy(tmp_path / "stage")
    newer(tmp_path / "stage")
    step = tmp_path / "stage/checkpoints/4"
    if slowly:  # its files go one by one
        next((step / "params").rglob("*/*")).unlink()
        threading.Timer(0.3, shutil.rmtree, (step,)).start()
    else:
        shutil.rmtree(step)
    with pytest.raises(UserError, match=r"checkpoints/4 was removed while it was read.*give the command again"):
        for stored in opened.tree.values():
            stored.read()
        opened.verify()
    with pytest.raises(UserError, match=r"checkpoints/4 was removed while it was read"):
        checkpoint.read_meta(tmp_path / "stage", 4)
    assert checkpoint.load(tmp_path / "stage").params


def test_a_step_that_lacks_a_file_for_good_is_damaged(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(checkpoint.restore, "REMOVAL_SECONDS", 0.1)
    published.stage(tmp_path / "stage", "pretrain", tokenizer)
    newer(tmp_path / "stage")
    next(path for path in (tmp_path / "stage/checkpoints/4/params").rglob("*") if path.is_file()).unlink()
    with pytest.raises(UserError, match=r"checkpoints/4 is damaged, .* is missing; use .*checkpoints/6"):
        checkpoint.check_sums(tmp_path / "stage", 4, "params")
    assert dataclasses.is_dataclass(checkpoint.load(tmp_path / "stage/checkpoints/6"))
