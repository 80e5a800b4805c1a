"""Cloud TPU slices, from the request to the report, on a platform of ours that is as unkind as the real one."""

import re

import pytest

from tanuki_jax.errors import UserError
from tanuki_jax.launch import settings as launch_settings
from tanuki_jax.launch.tpu import Launch
from tests.launch.cloud import Cloud, Run

BASE = [
    "--name=tanuki",
    "--zone=us-east5-a",
    "--type=v5p-16",
    "--config=configs/tanuki_8b.py:/mnt/my data",
    "--workdir=/mnt/run",
]


@pytest.fixture(autouse=True)
def one_archive(monkeypatch):
    """The project's archive is made once; it is not what is tested here."""
    import io
    import tarfile

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("README.md"))
    monkeypatch.setattr(Launch, "_archive", content.getvalue())


def make(cloud, *flags):
    return Launch(launch_settings.read("tpu", None, [*BASE, *flags]), cloud, cloud.sleep)


def verbs(cloud, *, without=("describe", "list")):
    """What was asked of gcloud in order; of ssh, the worker's action."""
    named = []
    for words in cloud.log:
        words = [word for word in words if word != "alpha"]
        if words[4] == "ssh":
            named.append(re.search(r"worker.py (\w+)", words[-1])[1])
        elif words[4] not in without:
            named.append(words[4])
    return [verb for verb in named if verb != "status"]


def test_a_run_from_the_request_to_the_end():
    cloud = Cloud()
    make(cloud).run()
    assert verbs(cloud) == ["create", "scp", "setup", "install", "start", "delete"]
    assert cloud.run_state.finished and not cloud.state


CHAOS = {
    "fails": 0.05,
    "preempted": 0.03,
    "node_lost": 0.02,
    "reboot": 0.02,
    "replaced": 0.02,
    "killed": 0.02,
    "stopped": 0.02,
    "bad_input": 0.002,
    "api_error": 0.1,
    "stockout": 0.1,
    "quota": 0.01,
    "answer_lost": 0.1,
    "no_key": 0.03,
    "ssh_lost": 0.05,
    "repeated": 0.1,
    "unreachable": 0.02,
    "install_fails": 0.05,
}


@pytest.mark.parametrize("kind, count", [("v5p-8", 1), ("v5p-16", 1), ("v6e-16", 2)])
def test_two_hundred_random_sequences(kind, count, capsys):
    """Never more requests than the cap, nothing left running without a word, never done without the run's own sign."""
    ends = {"done": 0, "error": 0}
    for seed in range(70):
        cloud = Cloud(seed, Run(steps=40), kind, count, **CHAOS)
        launch = make(cloud, f"--type={kind}", f"--slices={count}", "--max_attempts=8")
        error = ""
        try:
            launch.run()
        except UserError as caught:
            error = str(caught)
        output = capsys.readouterr().err
        assert cloud.counts["create"] <= 8
        if error:
            assert not cloud.run_state.finished or "could not be deleted" in error or cloud.counts["create"] == 8, (seed, error)
            known = "quota|max_attempts|exit code 1|prepared|restarts without|does not answer|could not be deleted"
            assert re.search(known, error), error
        else:
            assert cloud.run_state.finished, seed
        if cloud.state:
            assert "cost money" in output and "tanuki launch tpu delete --name=tanuki" in output, seed
        # What ended it was one of the things that end it.
        if cloud.counts["bad_input"] == cloud.counts["quota"] == 0 and cloud.counts["create"] < 8:
            assert not error or "prepared" in error or "answer" in error, (seed, error)
        ends["error" if error else "done"] += 1
        print(error[:90].replace(chr(10), " "))
    assert ends["done"] > 30, ends
