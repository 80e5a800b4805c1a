"""Live metrics for Prometheus and for Weights & Biases; no failure there affects the run."""

import re
import socket
import sys
import types
import urllib.error
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tanuki_jax import config
from tanuki_jax.errors import UserError
from tanuki_jax.report import trackers
from tests import tiny_recipe

ROW = {"step": 3, "loss": 2.5, "mfu": None, "seconds_by_phase": {"step": 1.5}, "moe/load": [[0.25, 0.75], [0.5, 0.5]]}


def recipe(**more):
    c = tiny_recipe.get_config()
    c.update(more)
    return config.resolve(c)


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def scrape(port, path="/metrics"):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_lists_and_groups_become_one_number_each():
    assert trackers.flatten(ROW) == {
        "step": 3,
        "loss": 2.5,
        "seconds_by_phase/step": 1.5,
        "moe/load/0/0": 0.25,
        "moe/load/0/1": 0.75,
        "moe/load/1/0": 0.5,
        "moe/load/1/1": 0.5,
    }


def test_prometheus_hears_the_last_row_while_the_run_goes_on(tmp_path, port):
    with trackers.open_trackers(recipe(prometheus_port=port), tmp_path) as on_metrics:
        scrape(port)
        on_metrics("pretrain", ROW)
        on_metrics("sft", {**ROW, "loss": 1.25})
        kind, page = scrape(port)
        assert kind.startswith("text/plain; version=0.0.4")
        assert 'tanuki_metric{stage="sft",name="loss"} 1.25\n' in page and "pretrain" not in page
        with pytest.raises(urllib.error.HTTPError):
            scrape(port, "/elsewhere")
    with pytest.raises(urllib.error.URLError):
        scrape(port)


@given(st.text(), st.dictionaries(st.sampled_from(["loss", "moe/load/3"]), st.floats(), min_size=1))
def test_every_line_is_in_prometheus_format(stage, row):
    for line in trackers.exposition(stage, row).split("\n")[2:-1]:
        assert re.fullmatch(r'tanuki_metric\{stage="(\\.|[^"\\\n])*",name="[\w/]+"\} (-?[\d.e+-]+|nan|-?inf)', line)


def test_a_port_that_is_taken_is_an_error(tmp_path, port):
    with socket.socket() as s:
        s.bind(("", port))
        s.listen()
        with (
            pytest.raises(UserError, match=f"prometheus_port {port} cannot be opened"),
            trackers.open_trackers(recipe(prometheus_port=port), tmp_path),
        ):
            pass


class Wandb(types.ModuleType):
    """What is used of the package."""

    def __init__(self, fails=False):
        super().__init__("wandb")
        self.started, self.logged, self.finished, self.fails = [], [], 0, fails

    def init(self, **settings):
        self.started.append(settings)
        return self

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, row):
        if self.fails:
            raise OSError("no network")
        self.logged.append(row)

    def finish(self):
        self.finished += 1
        if self.fails:
            raise OSError("no network")


def test_wandb_gets_the_rows_and_goes_on_under_the_same_id(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := Wandb())
    for _ in range(2):
        with trackers.open_trackers(recipe(wandb_project="狸"), tmp_path) as on_metrics:
            on_metrics("sft", ROW)
    first, second = fake.started
    assert first == second and first["resume"] == "allow" and first["project"] == "狸"
    assert first["config"]["stages"]["sft"]["kind"] == "sft"
    assert fake.logged[0]["sft/moe/load/1/0"] == 0.5 and fake.finished == 2


def test_a_network_that_fails_is_logged_once_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(fails=True))
    with trackers.open_trackers(recipe(wandb_project="p"), tmp_path) as on_metrics:
        on_metrics("sft", ROW)
        on_metrics("sft", ROW)
    assert caplog.text.count("no network") == 1


def test_the_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="tanuki-jax.wandb."), trackers.open_trackers(recipe(wandb_project="p"), tmp_path):
        pass


def test_a_whole_stage_is_tracked(tmp_path, monkeypatch):
    from tanuki_jax.cli.main import main

    monkeypatch.setitem(sys.modules, "wandb", fake := Wandb())
    flags = [tiny_recipe.CONFIG, f"--workdir={tmp_path}", "--stage=pretrain", "--config.wandb_project=p"]
    flags += ["--config.scoring.prompts=0", "--config.scoring.pairs=0"]  # nothing is decoded here
    assert main(["train", *flags]) == 0
    assert [row["pretrain/step"] for row in fake.logged] == [1, 2, 3, 4]
