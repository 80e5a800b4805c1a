"""What the script for GKE would do."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

HOME = Path(__file__).parents[2] / "launch"
WORK = {"CONFIG": "configs/tanuki_8b.py:/mnt/it's mine", "WORKDIR": "/mnt/my run"}
SLICES = {
    "TPU_NAME": "tanuki",
    "GKE_TPU": "tpu-v5p-slice",
    "TOPOLOGY": "4x4x8",
    "HOSTS": "32",
    "IMAGE": "i/tanuki",
    "CLAIM": "runs",
}


def launch(script, *arguments, **env):
    env = {"PATH": os.environ["PATH"], **env}
    return subprocess.run([str(HOME / script), *arguments], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("spot", ["0", "1"])
def test_the_jobset_has_a_pod_for_each_machine_of_each_slice(spot):
    done = launch("jobset.sh", "manifest", **WORK, **SLICES, SLICES="2", SPOT=spot)
    made = yaml.safe_load(done.stdout)
    assert (made["kind"], made["metadata"]["name"], made["spec"]["failurePolicy"]["maxRestarts"]) == ("JobSet", "tanuki", 100)
    [job] = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (2, 32, 32, 0)
    [rule] = spec["podFailurePolicy"]["rules"]  # bad input fails anew each time
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": "tanuki", "operator": "In", "values": [1]}}
    [rule] = made["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    pod = spec["template"]["spec"]
    where = {"cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-tpu-topology": "4x4x8"}
    assert pod["nodeSelector"] == where | ({"cloud.google.com/gke-spot": "true"} if spot == "1" else {})
    assert pod["terminationGracePeriodSeconds"] >= 60  # time to save
    [container] = pod["containers"]
    assert container["command"] == ["tanuki", "run", f"--config={WORK['CONFIG']}", f"--workdir={WORK['WORKDIR']}"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4} == container["resources"]["requests"]
    assert {"name": "TANUKI_COORDINATOR", "value": "auto"} in container["env"]


def test_the_dry_run_prints_what_would_be_applied():
    manifest = launch("jobset.sh", "manifest", **WORK, **SLICES).stdout
    assert launch("jobset.sh", "--dry_run", "run", **WORK, **SLICES).stdout == f"kubectl apply -f - <<EOF\n{manifest}EOF\n"
    assert launch("jobset.sh", "--dry_run", "delete", TPU_NAME="tanuki").stdout.split() == [
        "kubectl",
        "delete",
        "jobset",
        "tanuki",
    ]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued.sh", "jobset.sh"])
def test_every_script_teaches_and_refuses(script):
    taught = launch(script, "--help")
    assert taught.returncode == 0 and "--dry_run" in taught.stdout and "source " not in taught.stdout
    for arguments in ((), ("explode",)):
        refused = launch(script, *arguments)
        assert refused.returncode == 1 and refused.stderr and not refused.stdout
    assert "is not set" in launch(script, "--dry_run", "status").stderr
