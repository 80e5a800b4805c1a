"""What the script for Slurm would do."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2] / "launch"
WORK = {"CONFIG": "configs/tanuki_8b.py:/mnt/it's mine", "WORKDIR": "/mnt/my run"}


def launch(script, *arguments, **env):
    env = {"PATH": os.environ["PATH"], **env}
    return subprocess.run([str(HOME / script), *arguments], env=env, capture_output=True, text=True, timeout=60)


def test_a_chain_of_slurm_jobs_saves_before_the_limit_and_runs_one_after_another():
    done = launch("slurm.sh", "--dry_run", "run", **WORK, NODES="4", GPUS="8", SBATCH="--partition=gpu --account=me")
    words = shlex.split(done.stdout)
    assert words[0] == "sbatch" and {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8"} <= set(words)
    assert {"--signal=TERM@120", "--requeue", "--array=1-20%1", "--partition=gpu", "--account=me"} <= set(words)
    [wrapped] = [word.removeprefix("--wrap=") for word in words if word.startswith("--wrap=")]
    inner = shlex.split(wrapped)
    assert inner[:4] == ["srun", "--kill-on-bad-exit=1", "bash", "-c"] and len(inner) == 5
    command = shlex.split(inner[4])
    assert command[0] == "TANUKI_COORDINATOR=auto" and command[2] == "run"
    assert command[3:] == [f"--config={WORK['CONFIG']}", f"--workdir={WORK['WORKDIR']}"]


@pytest.mark.parametrize("action, words", [("status", ["squeue"]), ("cancel", ["scancel"])])
def test_jobs_are_found_by_the_workdirs_name(action, words):
    found = shlex.split(launch("slurm.sh", "--dry_run", action, **WORK).stdout)
    assert found == [*words, "--name=tanuki-my run"]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued.sh", "slurm.sh"])
def test_every_script_teaches_and_refuses(script):
    taught = launch(script, "--help")
    assert taught.returncode == 0 and "--dry_run" in taught.stdout and "source " not in taught.stdout
    for arguments in ((), ("explode",)):
        refused = launch(script, *arguments)
        assert refused.returncode == 1 and refused.stderr and not refused.stdout
    assert "is not set" in launch(script, "--dry_run", "status" if script != "slurm.sh" else "run").stderr
