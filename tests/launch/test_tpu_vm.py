"""The launch script's dry run: what would be done is printed, nothing is."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.launch.settings import SETTINGS

SCRIPT = Path(__file__).parents[2] / "launch" / "tpu_vm.sh"


def launch(*arguments, **env):
    env = {"PATH": os.environ["PATH"], **env}
    return subprocess.run([str(SCRIPT), *arguments], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("action", ["create", "install", "run", "status", "delete"])
def test_a_dry_run_prints_commands_for_the_slice_in_its_zone(action):
    found = launch("--dry_run", action, **SETTINGS)
    assert found.returncode == 0 and not found.stderr
    commands = [shlex.split(line) for line in found.stdout.splitlines()]
    assert commands[-1][:4] == ["gcloud", "compute", "tpus", "tpu-vm"]
    assert "tanuki" in commands[-1] and "--zone=us-east5-a" in commands[-1]


def test_the_config_reaches_every_worker_whole():
    [line] = launch("--dry_run", "run", **SETTINGS).stdout.splitlines()
    command = shlex.split(line)
    assert "--worker=all" in command
    [remote] = [word.removeprefix("--command=") for word in command if word.startswith("--command=")]
    assert "--config=configs/tanuki_8b.py:/mnt/my data" in shlex.split(remote) and "TANUKI_COORDINATOR=auto" in remote


def test_a_preemptible_slice_is_asked_for_only_when_wanted():
    assert "--spot" in launch("--dry_run", "create", **SETTINGS, SPOT="1").stdout
    assert "--spot" not in launch("--dry_run", "create", **SETTINGS).stdout


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (["create"], {"ZONE": "z"}, "TPU_NAME is not set"),
        (["--dry_run", "run"], {"TPU_NAME": "t", "ZONE": "z"}, "CONFIG is not set"),
        (["destroy"], SETTINGS, "unknown argument 'destroy'"),
    ],
)
def test_what_is_missing_is_named(arguments, env, words):
    found = launch(*arguments, **env)
    assert found.returncode == 1 and words in found.stderr and not found.stdout
