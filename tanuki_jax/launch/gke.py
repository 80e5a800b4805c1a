"""A recipe on TPU slices of a GKE cluster: node pools, and a JobSet that GKE starts again by itself.

The JobSet goes on without the launcher, so every action is short.  Its success is the exit code 0 of every pod, which `tanuki
run` has once all stages are done; the run's own sign is summary.json in its workdir, which is read where that is in a bucket.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from tanuki_jax.errors import UserError
from tanuki_jax.launch import worker
from tanuki_jax.launch.commands import Commands, Completed
from tanuki_jax.launch.manifest import CONTAINER, make_jobset, make_secret, parse_slices, secret_name
from tanuki_jax.launch.settings import Settings, require
from tanuki_jax.slices import Topology

ACTIONS = {
    "create": "make a node pool for each slice; needs cluster, location, zone",
    "run": "apply the JobSet; one of this name that is finished is deleted first",
    "manifest": "print the JobSet that `run` would apply",
    "status": "how JobSet, pods and run stand",
    "logs": "the end of the first pod's log",
    "stop": "delete the JobSet: the run is told to stop, and saves first; the node pools stay",
    "delete": "delete the JobSet and the node pools of `create`",
}
JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
INSTALL_JOBSET = "install JobSet 0.10 or later on the cluster: https://jobset.sigs.k8s.io/docs/installation"
LONGEST_POOL = 40  # letters of a node pool's name
# Spot machines are given 30 s to shut down, pods 15 of them, unless the pool says 120 (GKE 1.35.0-gke.1171000 and later):
# https://docs.cloud.google.com/kubernetes-engine/docs/concepts/spot-vms; gcloud container node-pools create --help.
SPOT_SHUTDOWN = {"kubeletConfig": {"shutdownGracePeriodSeconds": 120, "shutdownGracePeriodCriticalPodsSeconds": 15}}
SPOT_GRACE = 15  # seconds of a pod without this
HOUR = 3600.0


class Deletion(NamedTuple):
    """How something is deleted."""

    resource: str  # in words
    words: list[str]
    seconds: float  # limit of the command
    path: str = ""  # by which an API says that it is not found


def launch(action: str, settings: Settings, commands: Commands) -> None:
    """One of ACTIONS."""
    actions = {"create": create, "run": run, "status": show_status, "logs": show_logs, "stop": stop, "delete": delete}
    if action == "manifest":
        if make_secret(settings, hidden=True):
            print(f"# Its environment is in the secret {secret_name(settings)}, which `tanuki launch gke run` makes.")
        print(_yaml(make_jobset(settings)), end="")
        return
    require(settings, "name")
    actions[action](settings, commands)


# --- node pools


def create(settings: Settings, commands: Commands) -> None:
    """Makes the node pools, one after another; those that are there already are left alone."""
    for resource, words, text in pool_commands(settings):
        done = commands.run(words, text, seconds=HOUR)
        if done.code and "already exists" in done.err.lower():
            print(f"launch: {resource} is there already")
        elif done.code:
            raise UserError(
                f"launch: {resource} could not be made: {done.err.strip() or done.last_line}; pools that are there cost money: "
                "tanuki launch gke delete deletes them"
            )
        elif not commands.dry_run:
            print(f"launch: {resource} is made")


def pool_commands(settings: Settings) -> list[tuple[str, list[str], str]]:
    """What is made (a pool for each slice), by which command, and what goes to its input."""
    require(settings, "name", "cluster", "location", "zone")
    topology = parse_slices(settings)
    policy = _needs_policy(topology)
    words = [*_cluster(settings), f"--node-locations={settings.zone}", f"--machine-type={topology.machine_type}"]
    if settings.provisioning_model == "flex-start":  # the nodes come when pods ask for them, all together
        words += ["--num-nodes=0", "--enable-autoscaling", "--min-nodes=0", f"--max-nodes={topology.machines}"]
    else:
        words.append(f"--num-nodes={topology.machines}")
    if policy:
        words.append(f"--placement-policy={settings.name}")
    elif topology.machines > 1:
        words.append(f"--tpu-topology={topology.shape}")
    words += _provisioning(settings)
    if settings.bucket or settings.data_bucket:
        words.append("--workload-metadata=GKE_METADATA")  # pods have rights of their own
    words.append("--scopes=https://www.googleapis.com/auth/cloud-platform")
    text = ""
    if settings.provisioning_model == "spot" and settings.grace_seconds > SPOT_GRACE:
        words.append("--system-config-from-file=-")
        text = _yaml(SPOT_SHUTDOWN)
    create_pool = ["gcloud", "container", "node-pools", "create"]
    steps = [(f"node pool {pool}", [*create_pool, pool, *words], text) for pool in _pools(settings)]
    if policy:
        kind = ["--type=HIGH_THROUGHPUT", f"--accelerator-topology={topology.shape}"]
        steps.insert(0, (f"workload policy {settings.name}", [*_policy("create", settings, "workload-policy"), *kind], ""))
    return steps


def _needs_policy(topology: Topology) -> bool:
    return topology.generation.workload_policy and topology.machines > 1


def _provisioning(settings: Settings) -> list[str]:
    model = settings.provisioning_model
    if model == "spot":
        return ["--spot"]
    if model == "flex-start":
        flags = ["--flex-start", "--location-policy=ANY", "--reservation-affinity=none", "--no-enable-autorepair"]
        return [*flags, *([f"--max-run-duration={_seconds(settings.max_run_duration)}s"] if settings.max_run_duration else [])]
    if model in ("reserved", "reservation-bound"):  # a calendar reservation is a reservation like any other here
        require(settings, "reservation")
        return ["--reservation-affinity=specific", f"--reservation={settings.reservation}"]
    return []


def _seconds(duration: str) -> int:
    match = re.fullmatch(r"([0-9]{1,7})([smhd])", duration)
    if not match:
        raise UserError(f"launch: max_run_duration is {duration!r}; write 24h, 7d or 3600s")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]


def _pools(settings: Settings) -> list[str]:
    names = [f"{settings.name}-{n}" for n in range(settings.slices)]
    if len(names[-1]) > LONGEST_POOL:
        raise UserError(f"launch: name is {settings.name!r}, too long for node pools; they have {LONGEST_POOL} letters at most")
    return names


def _policy(verb: str, settings: Settings, *kind: str) -> list[str]:
    words = ["gcloud", "compute", "resource-policies", verb, *kind, settings.name]
    return [*words, f"--region={settings.zone.rpartition('-')[0]}", *_project(settings)]


def _cluster(settings: Settings) -> list[str]:
    return [f"--cluster={settings.cluster}", f"--location={settings.location}", *_project(settings)]


def _project(settings: Settings) -> list[str]:
    return [f"--project={settings.project}"] if settings.project else []


# --- the JobSet


def run(settings: Settings, commands: Commands) -> None:
    """Applies the JobSet.  A finished one of this name is deleted first: it cannot be changed, and would run nothing."""
    jobset, secret = make_jobset(settings), make_secret(settings, hidden=commands.dry_run)
    state = describe(find(settings, commands))
    if state in ("runs", "waits"):
        raise UserError(
            f"launch: there is a JobSet {settings.name}, and it {state}; tanuki launch gke status shows it, and stop ends it"
        )
    if state != "none":
        print(f"launch: the JobSet {settings.name} {state}; deleting it, to start it again")
        jobset_deletion = _jobset_deletions(settings)[0]
        commands.require(jobset_deletion.words, seconds=jobset_deletion.seconds)
    if secret:
        commands.require(_kubectl(settings, "apply", "--filename=-"), _yaml(secret))
    commands.require(_kubectl(settings, "apply", "--filename=-"), _yaml(jobset))
    if not commands.dry_run:
        print(f"launch: the JobSet {settings.name} is applied; tanuki launch gke status shows how it stands")
        _print_cost(settings)


def find(settings: Settings, commands: Commands) -> dict[str, Any]:
    """The JobSet of this name as the cluster describes it, empty where there is none; an error where the cluster is silent."""
    done = commands.run(_kubectl(settings, "get", "jobset", settings.name, "--ignore-not-found", "--output=json"))
    if done.code:
        missing = "have a resource type" in done.err
        raise UserError(f"launch: kubectl cannot look: {done.last_line}{f'; {INSTALL_JOBSET}' if missing else ''}")
    try:
        jobset = json.loads(done.out) if done.out.strip() else {}
    except ValueError as error:
        raise UserError(f"launch: kubectl's answer is no JSON: {done.out[:200]!r}") from error
    return jobset if isinstance(jobset, dict) else {}


def describe(jobset: dict[str, Any]) -> str:
    """none, runs, waits (in a queue), is done, or has failed."""
    if not jobset:
        return "none"
    true = {c.get("type") for c in jobset.get("status", {}).get("conditions", []) if c.get("status") == "True"}
    if "Completed" in true:
        return "is done"
    if "Failed" in true:
        return "has failed"
    return "waits" if "Suspended" in true or jobset.get("spec", {}).get("suspend") else "runs"


def show_status(settings: Settings, commands: Commands) -> None:
    """Prints how JobSet, pods and run stand; an error where the JobSet is done and the run did not say so itself."""
    jobset = find(settings, commands)
    state, status = describe(jobset), jobset.get("status", {})
    if jobset:
        restarts, counted = status.get("restarts", 0), status.get("restartsCountTowardsMax", 0)
        print(f"JobSet {settings.name} {state}; {restarts} restarts, {counted} of them count towards max_restarts")
        for condition in status.get("conditions", []):
            if condition.get("status") == "True" and condition.get("message"):
                print(f"  {condition.get('type')}: {condition['message']}")
    elif not commands.dry_run:
        print(f"there is no JobSet {settings.name}; one that is finished is deleted after ttl_seconds")
    if jobset or commands.dry_run:
        commands.show(_kubectl(settings, "get", "pods", f"--selector={JOBSET_LABEL}={settings.name}", "--output=wide"))
    if state not in ("runs", "waits") and not commands.dry_run:
        _print_cost(settings)
    _check_sign(settings, commands, state)


def _check_sign(settings: Settings, commands: Commands, state: str) -> None:
    sign = PurePosixPath(settings.workdir or settings.mount) / "summary.json"
    if not settings.bucket or not sign.is_relative_to(settings.mount):
        if state == "is done":
            print(f"the run's own sign is {sign}, with report.html beside it")
        return
    url = f"gs://{settings.bucket}/{sign.relative_to(settings.mount)}"
    done = commands.run(["gcloud", "storage", "cat", url])
    if commands.dry_run:
        return
    if _is_done(done):
        print(f"run: every stage is done, says {url}; report.html is beside it")
    elif state == "is done":
        raise UserError(f"launch: the JobSet is done, but {url} does not say that every stage is: {done.last_line[:200]}")
    else:
        print(f"run: not done ({url} does not say so)")


def _is_done(done: Completed) -> bool:
    """Whether summary.json has every stage of its recipe."""
    try:
        return not done.code and worker.lists_every_stage(json.loads(done.out))
    except ValueError:
        return False


def _print_cost(settings: Settings) -> None:
    """Says what outlives the JobSet.  Pools of flex-start shrink to nothing, nodes that GKE made itself go by themselves."""
    if settings.cluster and settings.provisioning_model != "flex-start":
        last = f" to {settings.name}-{settings.slices - 1}" if settings.slices > 1 else ""
        pools = f"node pool{'s' * bool(last)} {settings.name}-0{last}"
        print(f"launch: what `create` made ({pools}) costs money until `tanuki launch gke delete` deletes it")


def show_logs(settings: Settings, commands: Commands) -> None:
    """Prints the end of the first machine's log."""
    first = {JOBSET_LABEL: settings.name, "jobset.sigs.k8s.io/job-index": "0", "batch.kubernetes.io/job-completion-index": "0"}
    selector = ",".join(f"{name}={value}" for name, value in first.items())
    commands.show(_kubectl(settings, "logs", f"--selector={selector}", f"--container={CONTAINER}", "--tail=200"))


def stop(settings: Settings, commands: Commands) -> None:
    """Deletes the JobSet, whose pods get SIGTERM and `grace_seconds`; returns when they have ended."""
    for deletion in _jobset_deletions(settings):
        commands.require(deletion.words, seconds=deletion.seconds)
    if not commands.dry_run:
        _print_cost(settings)


def delete(settings: Settings, commands: Commands) -> None:
    """Deletes the JobSet and, where `cluster` is set, the node pools; all are tried, and what is left is an error."""
    pools, policy = _pool_deletions(settings) if settings.cluster else ([], [])
    remaining = _try_all(_jobset_deletions(settings), commands)
    if not settings.cluster:
        print("launch: cluster is not set, so no node pool is deleted")
    remaining_pools = _try_all(pools, commands)
    remaining += remaining_pools or _try_all(policy, commands)  # pools use it
    if remaining:
        raise UserError(
            f"launch: not deleted, and may cost money: {'; '.join(remaining)}; to try again: tanuki launch gke delete"
        )


def _jobset_deletions(settings: Settings) -> list[Deletion]:
    jobset = ["delete", "jobset", settings.name, "--ignore-not-found", "--cascade=foreground"]
    secret = ["delete", "secret", secret_name(settings), "--ignore-not-found"]
    return [
        Deletion(f"JobSet {settings.name}", _kubectl(settings, *jobset), settings.grace_seconds + 600.0),
        Deletion(f"secret {secret_name(settings)}", _kubectl(settings, *secret), 300.0),
    ]


def _pool_deletions(settings: Settings) -> tuple[list[Deletion], list[Deletion]]:
    """The node pools, and their workload policy."""
    require(settings, "location", "zone")
    words = ["gcloud", "container", "node-pools", "delete"]
    pools = [
        Deletion(f"node pool {pool}", [*words, pool, *_cluster(settings), "--quiet"], HOUR, f"nodePools/{pool}")
        for pool in _pools(settings)
    ]
    if not _needs_policy(parse_slices(settings)):
        return pools, []
    policy = [*_policy("delete", settings), "--quiet"]
    return pools, [Deletion(f"workload policy {settings.name}", policy, 300.0, f"resourcePolicies/{settings.name}")]


def _try_all(deletions: list[Deletion], commands: Commands) -> list[str]:
    """What remains, and why; one failure, or a program that is not installed, stops none of the others."""
    remaining = []
    for deletion in deletions:
        try:
            done = commands.run(deletion.words, seconds=deletion.seconds)
        except UserError as error:
            remaining.append(f"{deletion.resource}: {str(error).removeprefix('launch: ')}")
            continue
        if done.code and not _is_missing(done, deletion.path):
            remaining.append(f"{deletion.resource}: {done.last_line}")
    return remaining


def _is_missing(done: Completed, path: str) -> bool:
    """Whether it is this that was not found, and not the cluster or the project, whose pools would live on."""
    return bool(path) and "not found" in done.err.lower() and path in done.err


def _kubectl(settings: Settings, *words: str) -> list[str]:
    return ["kubectl", f"--namespace={settings.namespace}", *words]


def _yaml(value: dict[str, Any]) -> str:
    import yaml  # type: ignore[import-untyped]  # here, since every verb reads this module's actions

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000))
