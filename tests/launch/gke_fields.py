"""Names of fields that the API server knows, for the objects that a manifest has: (required, all).

From JobSet v0.10.1, config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml: the names alone, where a manifest goes.
Paths are of the JobSet; [] is an item of a list.
"""

JOB = "spec/replicatedJobs/[]/template/spec"
POD = f"{JOB}/template/spec"
CONTAINER = f"{POD}/containers/[]"

FIELDS: dict[str, tuple[str, str]] = {
    "": ("", "apiVersion kind metadata spec status"),
    "spec": (
        "",
        "coordinator failurePolicy managedBy network replicatedJobs startupPolicy successPolicy suspend "
        "ttlSecondsAfterFinished",
    ),
    "spec/failurePolicy": ("", "maxRestarts restartStrategy rules"),
    "spec/failurePolicy/rules/[]": (
        "action name",
        "action name onJobFailureMessagePatterns onJobFailureReasons targetReplicatedJobs",
    ),
    "spec/replicatedJobs/[]": ("name template", "dependsOn groupName name replicas template"),
    "spec/replicatedJobs/[]/template": ("", "metadata spec"),
    JOB: (
        "template",
        "activeDeadlineSeconds backoffLimit backoffLimitPerIndex completionMode completions managedBy manualSelector "
        "maxFailedIndexes parallelism podFailurePolicy podReplacementPolicy selector successPolicy suspend template "
        "ttlSecondsAfterFinished",
    ),
    f"{JOB}/podFailurePolicy": ("rules", "rules"),
    f"{JOB}/podFailurePolicy/rules/[]": ("action", "action onExitCodes onPodConditions"),
    f"{JOB}/podFailurePolicy/rules/[]/onExitCodes": ("operator values", "containerName operator values"),
    f"{JOB}/podFailurePolicy/rules/[]/onPodConditions/[]": ("status type", "status type"),
    f"{JOB}/template": ("", "metadata spec"),
    f"{JOB}/template/metadata": ("", "annotations finalizers labels name namespace"),
    POD: (
        "containers",
        "activeDeadlineSeconds affinity automountServiceAccountToken containers dnsConfig dnsPolicy enableServiceLinks "
        "ephemeralContainers hostAliases hostIPC hostNetwork hostPID hostUsers hostname hostnameOverride imagePullSecrets "
        "initContainers nodeName nodeSelector os overhead preemptionPolicy priority priorityClassName readinessGates "
        "resourceClaims resources restartPolicy runtimeClassName schedulerName schedulingGates securityContext serviceAccount "
        "serviceAccountName setHostnameAsFQDN shareProcessNamespace subdomain terminationGracePeriodSeconds tolerations "
        "topologySpreadConstraints volumes",
    ),
    CONTAINER: (
        "name",
        "args command env envFrom image imagePullPolicy lifecycle livenessProbe name ports readinessProbe resizePolicy "
        "resources restartPolicy restartPolicyRules securityContext startupProbe stdin stdinOnce terminationMessagePath "
        "terminationMessagePolicy tty volumeDevices volumeMounts workingDir",
    ),
    f"{CONTAINER}/env/[]": ("name", "name value valueFrom"),
    f"{CONTAINER}/envFrom/[]": ("", "configMapRef prefix secretRef"),
    f"{CONTAINER}/envFrom/[]/secretRef": ("", "name optional"),
    f"{CONTAINER}/ports/[]": ("containerPort", "containerPort hostIP hostPort name protocol"),
    f"{CONTAINER}/resources": ("", "claims limits requests"),
    f"{CONTAINER}/securityContext": (
        "",
        "allowPrivilegeEscalation appArmorProfile capabilities privileged procMount readOnlyRootFilesystem runAsGroup "
        "runAsNonRoot runAsUser seLinuxOptions seccompProfile windowsOptions",
    ),
    f"{CONTAINER}/volumeMounts/[]": (
        "mountPath name",
        "mountPath mountPropagation name readOnly recursiveReadOnly subPath subPathExpr",
    ),
    f"{POD}/tolerations/[]": ("", "effect key operator tolerationSeconds value"),
    f"{POD}/volumes/[]": ("name", "configMap csi emptyDir ephemeral hostPath name nfs persistentVolumeClaim projected secret"),
    f"{POD}/volumes/[]/csi": ("driver", "driver fsType nodePublishSecretRef readOnly volumeAttributes"),
    f"{POD}/volumes/[]/persistentVolumeClaim": ("claimName", "claimName readOnly"),
}
# Objects whose names are the user's.
FREE = {
    "metadata",
    f"{JOB}/template/metadata/annotations",
    f"{POD}/nodeSelector",
    f"{POD}/volumes/[]/csi/volumeAttributes",
    f"{CONTAINER}/resources/limits",
    f"{CONTAINER}/resources/requests",
}

# Flags of `gcloud container node-pools create` and `gcloud compute resource-policies create workload-policy`: Google Cloud
# SDK 578, lib/surface/container/node_pools/create.py and lib/surface/compute/resource_policies/create/workload_policy.py.
POOL_FLAGS = """
    --cluster --location --project --node-locations --machine-type --num-nodes --enable-autoscaling --min-nodes --max-nodes
    --location-policy --placement-policy --tpu-topology --spot --flex-start --reservation-affinity --reservation
    --no-enable-autorepair --max-run-duration --workload-metadata --scopes --system-config-from-file
"""
POLICY_FLAGS = "--type --accelerator-topology --accelerator-topology-mode --max-topology-distance --region --project"
