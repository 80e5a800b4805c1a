"""A recipe as a JobSet: a Job for each slice, a pod for each machine, all of them started again together.

Sources: JobSet v0.10.1 (config/components/crd/bases, site/static/examples/tpu-multislice, pkg/controllers/failure_policy.go),
https://docs.cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice, .../cloud-storage-fuse-csi-driver-ephemeral and
.../cloud-storage-fuse-csi-driver-setup (host network), .../dws-flex-start-training-tpu, and xpk's src/xpk/commands/workload.py.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from tanuki_jax import slices
from tanuki_jax.errors import UserError
from tanuki_jax.launch.settings import Settings, environment, hide, require, run_flags

CONTAINER = "tanuki"
JOB = "slice"
BAD_INPUT = 1  # exit code of a run that would fail in the same way again
SAVED = 75  # exit code of a run that was told to stop, and saved
PORTS = (8471, 8080)  # of the TPU runtime, and between slices
LONGEST_NAME = 63  # of a pod
FILE_CACHE_MB = 20_480  # on the node's disk, of 100 GB

# gcsfuse on TPU machines keeps metadata for ever unless told otherwise, and would read a rewritten checkpoint stale.
WORK_OPTIONS = "implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
DATA_OPTIONS = (
    f"implicit-dirs,metadata-cache:ttl-secs:-1,file-cache:max-size-mb:{FILE_CACHE_MB},file-cache:cache-file-for-range-read:true"
)

Object = dict[str, Any]


def parse_slices(settings: Settings) -> slices.Topology:
    """The slices of the settings; an error where GKE has none such."""
    require(settings, "type")
    topology = slices.parse(settings.type, "launch: type")
    if topology.slices > 1:
        raise UserError(f"launch: type is {settings.type!r}, of one slice; set slices = {topology.slices}")
    if settings.slices > 1 and topology.machines == 1:
        raise UserError(f"launch: a {settings.type} is one machine, and GKE joins only slices of several; take a larger type")
    return topology


def make_jobset(settings: Settings) -> Object:
    """The JobSet; values of `env` and `pass_env` are in the Secret of `make_secret`."""
    require(settings, "name", "config", "workdir", "image")
    topology = parse_slices(settings)
    pod = f"{settings.name}-{JOB}-{settings.slices - 1}-{topology.machines - 1}-abcde"
    if len(pod) > LONGEST_NAME:
        raise UserError(f"launch: name is {settings.name!r}, {len(pod) - LONGEST_NAME} letters too long for the names of pods")
    job = {
        "completionMode": "Indexed",
        "parallelism": topology.machines,
        "completions": topology.machines,
        "backoffLimit": 0,  # the JobSet starts again, all slices together
        "podFailurePolicy": {"rules": [_on_exit_code(BAD_INPUT), _on_exit_code(SAVED)]},
        "template": {"metadata": {"annotations": _annotations(settings)}, "spec": _pod(settings, topology)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": settings.name,
            "namespace": settings.namespace,
            **({"labels": {"kueue.x-k8s.io/queue-name": settings.queue}} if settings.queue else {}),
            # A slice is a node pool.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "ttlSecondsAfterFinished": settings.ttl_seconds,
            "failurePolicy": {
                "maxRestarts": settings.max_restarts,
                "restartStrategy": "BlockingRecreate",  # no pod meets those of the time before, on the same ports
                "rules": _rules(),
            },
            "replicatedJobs": [{"name": JOB, "replicas": settings.slices, "template": {"spec": job}}],
        },
    }


def make_secret(settings: Settings, hidden: bool = False) -> Object | None:
    """The Secret with the user's variables, which a manifest would show to all who may read JobSets; None where there are none.

    Args:
      hidden: *** instead of the values, for what is printed.
    """
    environ = environment(settings, "tpu")
    values = hide(environ, settings) if hidden else {name: _encode(value) for name, value in environ.items()}
    values = {name: value for name, value in values.items() if name in _users(settings)}
    metadata = {"name": secret_name(settings), "namespace": settings.namespace}
    # Not stringData, of which `kubectl apply` removes no key that is no longer there.
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": values}
    return secret if values else None


def _encode(value: str) -> str:
    return base64.b64encode(value.encode("utf-8", "surrogateescape")).decode("ascii")


def secret_name(settings: Settings) -> str:
    """Of the user's variables."""
    return f"{settings.name}-environment"


def _users(settings: Settings) -> set[str]:
    return {*settings.env, *settings.pass_env}


def _rules() -> list[Object]:
    """What ends the JobSet, and what does not count as a restart: a run that was told to stop and saved, as in a preemption.

    Both are known by the reason of a Job's failure, and apart by its message, "Container tanuki for pod ... failed with exit
    code 1 matching ..." (Kubernetes' pod_failure_policy.go).  What matches neither is started again and counted: JobSet has no
    limit for restarts that it does not count, and a pod that is evicted because its disk is full has the same condition
    (DisruptionTarget) as one whose machine is taken back.
    """
    reasons = ["PodFailurePolicy"]
    return [
        {
            "name": "saved",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": reasons,
            "onJobFailureMessagePatterns": [f"failed with exit code {SAVED} "],
        },
        {"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": [*reasons]},
    ]


def _on_exit_code(code: int) -> Object:
    return {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [code]}}


def _pod(settings: Settings, topology: slices.Topology) -> Object:
    volumes = _volumes(settings)
    pod: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "hostNetwork": True,  # the slices' traffic goes through the machine's network cards
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": _node_labels(settings, topology),
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists"}],
        "containers": [_container(settings, topology, volumes)],
        "volumes": [volume for volume, _ in volumes],
    }
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    return pod


def _node_labels(settings: Settings, topology: slices.Topology) -> dict[str, str]:
    labels = {
        "cloud.google.com/gke-tpu-accelerator": topology.generation.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": topology.shape,
    }
    if settings.provisioning_model in ("spot", "flex-start"):
        labels[f"cloud.google.com/gke-{settings.provisioning_model}"] = "true"
    elif settings.provisioning_model != "standard" and not settings.cluster:  # GKE makes the nodes, by these labels
        require(settings, "reservation")
        labels["cloud.google.com/reservation-name"] = settings.reservation
        labels["cloud.google.com/reservation-affinity"] = "specific"
    return labels


def _container(settings: Settings, topology: slices.Topology, volumes: list[tuple[Object, Object]]) -> Object:
    chips = {"google.com/tpu": topology.chips_per_machine}
    environ = {name: text for name, text in environment(settings, "tpu").items() if name not in _users(settings)}
    container: Object = {
        "name": CONTAINER,
        "image": settings.image,
        "command": ["tanuki", "run", *map(_literal, run_flags(settings))],
        "env": [{"name": name, "value": _literal(value)} for name, value in environ.items()],
        "ports": [{"containerPort": port} for port in PORTS],
        "securityContext": {"privileged": True},  # the TPU's device files, and locked memory
        "resources": {"requests": chips, "limits": {**chips}},
        "volumeMounts": [mount for _, mount in volumes],
    }
    if _users(settings):
        container["envFrom"] = [{"secretRef": {"name": secret_name(settings)}}]
    return container


def _literal(text: str) -> str:
    """A text in which Kubernetes finds no $(NAME) to replace."""
    return text.replace("$(", "$$(")


def _volumes(settings: Settings) -> list[tuple[Object, Object]]:
    """Volumes, each with how it is mounted."""
    if bool(settings.claim) == bool(settings.bucket):
        raise UserError("launch: set claim or bucket, one of them: what is mounted at `mount`, where workdir lies")
    if not settings.workdir.startswith(settings.mount.rstrip("/") + "/"):
        raise UserError(f"launch: workdir is {settings.workdir}; it must lie below mount, {settings.mount}")
    work: Object = {"persistentVolumeClaim": {"claimName": settings.claim}}
    if settings.bucket:
        work = _gcsfuse(settings, settings.bucket, WORK_OPTIONS)
    volumes: list[tuple[Object, Object]] = [({"name": "work", **work}, {"name": "work", "mountPath": settings.mount})]
    if settings.data_bucket:
        data = {"name": "data", **_gcsfuse(settings, settings.data_bucket, DATA_OPTIONS, read_only=True)}
        volumes.append((data, {"name": "data", "mountPath": settings.data_mount, "readOnly": True}))
    return volumes


def _gcsfuse(settings: Settings, bucket: str, options: str, read_only: bool = False) -> Object:
    require(settings, "service_account")
    # Without hostNetworkPodKSA a pod on the host's network would use the rights of the node.
    attributes = {"bucketName": bucket, "mountOptions": options, "hostNetworkPodKSA": "true"}
    return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": read_only, "volumeAttributes": attributes}}


def _annotations(settings: Settings) -> Mapping[str, str]:
    """Of a pod: gcsfuse's second container, without the limits that are too small for checkpoints."""
    if not settings.bucket and not settings.data_bucket:
        return {}
    limits = {f"gke-gcsfuse/{resource}-limit": "0" for resource in ("cpu", "memory", "ephemeral-storage")}
    return {"gke-gcsfuse/volumes": "true", **limits}
