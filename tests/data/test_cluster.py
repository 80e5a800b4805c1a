import functools
import json
import pickle
import sys
import types
from pathlib import Path

import pytest

from tanuki_jax.data import cluster, prepare, shards
from tanuki_jax.errors import UserError

OPTIONS = prepare.Options(skip_invalid=True, shard_characters=20, part_bytes=150)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_ROWS", 2)
    for name in "ab":
        rows = [json.dumps({"text": f"{name} {i} 狸が山に住む。"}) if i % 4 else "moon" for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return f"{tmp_path}/*.jsonl"


@pytest.fixture
def expected(corpus, tokenizer, tmp_path):
    """The bytes of the store that one machine makes."""
    prepare.prepare(corpus, tokenizer, tmp_path / "local", OPTIONS, workers=1)
    return contents(tmp_path / "local")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left(tmp_path):
    """Hidden folders, which are all gone when a store has its name."""
    return [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "ranks", [[0], [2, 0, 1], [0, 1, 2, 2, 1, 0], [6, 3, 1, 0, 2, 5, 4, 3], list(range(99, -1, -1))], ids=len
)
def test_ranks_in_any_order_number_and_repetition_make_the_store_of_one_machine(tokenizer, tmp_path, corpus, expected, ranks):
    plan = prepare.plan(corpus, tokenizer, tmp_path / "store", OPTIONS)
    assert len(plan.parts) > 3
    for rank in ranks:
        step = pickle.loads(pickle.dumps(functools.partial(cluster._write_parts, plan)))  # as it travels to another machine
        step(None, rank=rank, world_size=max(ranks) + 1)
    cluster._finish(plan, None)
    assert contents(tmp_path / "store") == expected and not left(tmp_path)


def test_a_store_of_which_parts_are_missing_is_not_finished(tokenizer, tmp_path, corpus):
    plan = prepare.plan(corpus, tokenizer, tmp_path / "store", OPTIONS)
    cluster._write_parts(plan, None, rank=1, world_size=len(plan.parts))
    with pytest.raises(UserError, match=rf"{len(plan.parts) - 1} of {len(plan.parts)} parts of .*store are not done; run"):
        cluster._finish(plan, None)
    assert not (tmp_path / "store").exists()


class Executor:
    """Stands for datatrove's executors: runs those it depends on, then its own ranks, and notes each that has ended."""

    started: list = []

    def __init__(self, pipeline, tasks, depends=None, **options):
        self.pipeline, self.tasks, self.depends, self.options = pipeline, tasks, depends, options

    def run(self):
        if self.depends:
            self.depends.run()
        Executor.started.append(self)
        self.run_ranks()

    def run_ranks(self):
        ended = Path(self.options["logging_dir"]) / "completions"
        for rank in reversed(range(self.tasks)):
            for step in self.pipeline:
                step(None, rank, self.tasks)
            ended.mkdir(parents=True, exist_ok=True)
            (ended / f"{rank:05d}").touch()


@pytest.fixture
def started(monkeypatch):
    """The executors that were run, in a process that has datatrove or seems to."""
    for name in ("datatrove", "datatrove.executor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for kind in ("ray", "slurm"):
        module = types.ModuleType(f"datatrove.executor.{kind}")
        setattr(module, f"{kind.capitalize()}PipelineExecutor", Executor)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Executor, "started", [])
    return Executor.started


def test_ray_makes_the_store_of_one_machine(tokenizer, tmp_path, corpus, expected, started):
    manifest = cluster.prepare(corpus, tokenizer, tmp_path / "store", OPTIONS, 3, "ray")
    assert contents(tmp_path / "store") == expected and not left(tmp_path)
    assert manifest.rows == 14 and manifest.rejected == 6
    assert [run.options["workers"] for run in started] == [3]


def test_slurm_makes_the_store_of_one_machine_in_a_last_job(tokenizer, tmp_path, corpus, expected, started, capsys):
    slurm = "partition=cpu,time=1:00:00,cpus_per_task=4"
    assert cluster.prepare(corpus, tokenizer, tmp_path / "store", OPTIONS, 3, "slurm", slurm) is None
    assert contents(tmp_path / "store") == expected
    tasks, last = started
    assert (tasks.options["workers"], last.tasks, last.depends) == (3, 1, tasks)
    for run in started:
        assert [run.options[name] for name in ("partition", "time", "cpus_per_task")] == ["cpu", "1:00:00", 4]
    assert f"submitted {tasks.tasks} tasks" in capsys.readouterr().out


def test_the_folder_of_the_work_is_gone_when_the_last_job_has_ended(tokenizer, tmp_path, corpus, started):
    cluster.prepare(corpus, tokenizer, tmp_path / "store", OPTIONS, 3, "slurm", "partition=cpu")
    assert (tmp_path / "store").is_dir() and not (tmp_path / ".store.partial").exists()


@pytest.mark.parametrize("kind", ["ray", "slurm"])
def test_datatrove_itself_makes_the_store_of_one_machine(tokenizer, tmp_path, corpus, expected, monkeypatch, kind):
    local = pytest.importorskip("datatrove.executor.local", reason="datatrove is not installed")
    own = pytest.importorskip(f"datatrove.executor.{kind}")

    class Local(Executor):
        """datatrove's own run of each rank, on this machine."""

        def run_ranks(self):
            options = {name: self.options[name] for name in ("logging_dir", "skip_completed") if name in self.options}
            local.LocalPipelineExecutor(self.pipeline, self.tasks, workers=1, **options).run()

    monkeypatch.setattr(own, f"{kind.capitalize()}PipelineExecutor", Local)
    cluster.prepare(corpus, tokenizer, tmp_path / "store", OPTIONS, 2, kind, "partition=cpu")
    assert contents(tmp_path / "store") == expected and not (tmp_path / ".store.partial").exists()


@pytest.mark.parametrize("executor", ["ray", "slurm"])
def test_without_datatrove_the_error_says_what_to_install(tokenizer, tmp_path, corpus, monkeypatch, executor):
    for name in ("datatrove", f"datatrove.executor.{executor}"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"--executor: .*pip install 'tanuki-jax\[cluster\]'"):
        cluster.prepare(corpus, tokenizer, tmp_path / "store", OPTIONS, 2, executor, "partition=cpu")


# --- options of Slurm -------------------------------------------------------------------------------------------------------


def test_slurm_options_have_defaults_and_those_that_are_given_replace_them():
    defaults = {"time": "24:00:00", "partition": "cpu", "cpus_per_task": 8, "mem_per_cpu_gb": 2, "qos": "normal"}
    assert cluster._parse_slurm("partition=cpu") == defaults
    parsed = cluster._parse_slurm("partition=a,time=1-00:00:00,mem_per_cpu_gb=16,qos=x=y")
    assert parsed == {**defaults, "partition": "a", "time": "1-00:00:00", "mem_per_cpu_gb": 16, "qos": "x=y"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "needs the partition"),
        ("time=1:00:00", "needs the partition"),
        ("partition=", "needs the partition"),
        ("partition", "must be like partition=cpu"),
        ("partition=cpu,colour=red", "it takes time, partition"),
        ("partition=cpu,cpus_per_task=many", "cpus_per_task|must be"),
        ("partition=cpu,mem_per_cpu_gb=2G", "mem_per_cpu_gb|must be"),
    ],
)
def test_a_wrong_slurm_option_is_an_error_that_says_so(options, message):
    with pytest.raises(UserError, match=f"--slurm: .*({message})"):
        cluster._parse_slurm(options)
