"""The queued slices' script against a gcloud of ours, which creates, loses and finds slices as it is told."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.launch.settings import SETTINGS

SCRIPT = Path(__file__).parents[2] / "launch" / "queued.sh"
FAST = {**SETTINGS, "POLL": "0"}
# Keeps its state in FAKE: a request waits, is provisioned and becomes active as it is looked at; `runs` says how each run ends.
GCLOUD = """#!/usr/bin/env python3
import json, os, pathlib, sys
home = pathlib.Path(os.environ["FAKE"])
state = json.loads((home / "state").read_text())
arguments = sys.argv[1:]
verb = arguments[4]
with (home / "log").open("a") as f:
    f.write(json.dumps(arguments) + "\\n")
code = 0
if verb == "create":
    assert not state["states"], "it is there already"
    state["states"] = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
elif verb == "delete":
    state["states"] = []
elif not state["states"]:
    code = 1
elif verb == "describe":
    print(state["states"][0])
    state["states"] = state["states"][1:] or state["states"]
elif verb == "ssh" and "tanuki run" in arguments[-1]:
    assert state["states"] == ["ACTIVE"], state
    end = state["runs"].pop(0)
    code = {"done": 0, "stopped": 75, "hung": 76, "silent": 134, "preempted": 255, "lost while it was stopped": 75}.get(end, 1)
    if "preempted" in end or "lost" in end:
        state["states"] = ["SUSPENDING", "SUSPENDED"]
(home / "state").write_text(json.dumps(state))
sys.exit(code)
"""


@pytest.fixture
def launch(tmp_path):
    fake = tmp_path / "bin" / "gcloud"
    fake.parent.mkdir()
    fake.write_text(GCLOUD)
    fake.chmod(0o755)

    def go(*arguments, runs=(), states=(), **env):
        (tmp_path / "state").write_text(json.dumps({"runs": list(runs), "states": list(states)}))
        (tmp_path / "log").write_text("")
        path = f"{fake.parent}:{os.environ['PATH']}"
        env = {"PATH": path, "FAKE": str(tmp_path), "TMPDIR": str(tmp_path), **FAST, **env}
        done = subprocess.run([str(SCRIPT), *arguments], env=env, capture_output=True, text=True, timeout=60)
        commands = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        return done, commands

    return go


def verbs(commands):
    """What was done, looks at the state left out: create, scp, install, run, delete."""
    named = [("run" if "tanuki run" in c[-1] else "install") if c[4] == "ssh" else c[4] for c in commands]
    return [verb for verb in named if verb != "describe"]


ROUND = ["scp", "install", "run"]


def test_a_preempted_run_gets_new_slices_and_goes_on(launch):
    done, commands = launch("until_done", runs=["preempted", "lost while it was stopped", "done"])
    assert done.returncode == 0, done.stderr
    assert verbs(commands) == [*["create", *ROUND, "delete"] * 2, "create", *ROUND]
    again = [c[-1] for c in commands if "tanuki run" in c[-1]]
    assert len(set(again)) == 1  # the same command: the run itself knows where it was
    [remote] = {word.removeprefix("--command=") for word in again}
    assert "--config=configs/tanuki_8b.py:/mnt/my data" in shlex.split(remote) and "TANUKI_COORDINATOR=auto" in remote


@pytest.mark.parametrize("end", ["stopped", "hung", "silent"])
def test_a_run_that_was_stopped_goes_on_where_it_is(launch, end):
    done, commands = launch("until_done", runs=[end, "done"])
    assert done.returncode == 0 and verbs(commands) == ["create", *ROUND, *ROUND]


def test_a_run_that_cannot_go_on_ends_it_and_keeps_the_slices(launch):
    done, commands = launch("until_done", runs=["bad config"])
    assert done.returncode == 1 and "exit code 1" in done.stderr
    assert verbs(commands) == ["create", *ROUND]


def test_slices_that_are_there_are_used(launch):
    done, commands = launch("until_done", runs=["done"], states=["ACTIVE"])
    assert done.returncode == 0 and verbs(commands) == ROUND


def test_a_request_that_fails_is_asked_for_again(launch):
    done, commands = launch("until_done", runs=["done"], states=["PROVISIONING", "PROVISIONING", "FAILED"])
    assert done.returncode == 0 and verbs(commands) == ["delete", "create", *ROUND]


@pytest.mark.parametrize("slices", ["1", "2"])
def test_the_dry_run_prints_one_round_and_does_nothing(launch, slices):
    done, commands = launch("--dry_run", "until_done", SLICES=slices, SPOT="1")
    assert done.returncode == 0 and not commands and not done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[5] if line[0] == "gcloud" else line[0] for line in lines] == ["create", "describe", "git", "scp", "ssh", "ssh"]
    several = {"--node-count=2", "--node-prefix=tanuki"}
    assert "--spot" in lines[0] and set(lines[0]) & (several | {"--node-id=tanuki"}) == (
        several if slices == "2" else {"--node-id=tanuki"}
    )
    assert all("--zone=us-east5-a" in line for line in lines if line[0] == "gcloud")


def test_settings_come_from_a_file(launch, tmp_path):
    (tmp_path / "mine").write_text("TPU_NAME='other name'\nZONE=europe-west4-b\n")
    done, _ = launch("--dry_run", f"--settings={tmp_path / 'mine'}", "create")
    words = shlex.split(done.stdout)
    assert "other name" in words and "--zone=europe-west4-b" in words
    missing, _ = launch("--dry_run", "--settings=nowhere", "create")
    assert missing.returncode == 1 and "no such file nowhere" in missing.stderr


@pytest.mark.parametrize("missing", ["TPU_NAME", "ZONE", "TPU_TYPE", "CONFIG", "WORKDIR"])
def test_what_is_missing_is_named(launch, missing):
    done, commands = launch("until_done", **{missing: ""})
    assert done.returncode == 1 and f"{missing} is not set" in done.stderr and not commands
