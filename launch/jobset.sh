#!/bin/bash
# Runs a recipe on TPU slices of a GKE cluster as a JobSet, which starts failed slices again, but for exit code 1: bad input.
#
#   launch/jobset.sh [--dry_run] [--settings=FILE] run|status|delete|manifest
#
# Set in the environment, or in FILE (environment.example):
#   TPU_NAME     name of the JobSet                SLICES     how many (default 1)
#   GKE_TPU      cloud.google.com/gke-tpu-accelerator, tpu-v5p-slice say
#   TOPOLOGY     cloud.google.com/gke-tpu-topology, 4x4x8 say
#   HOSTS        machines of a slice                CHIPS      of a machine (default 4)
#   IMAGE        container made from launch/Dockerfile
#   CONFIG       recipe                             WORKDIR    a path below the claim
#   CLAIM        persistent volume claim that is mounted at /mnt
#   SPOT         1 = on spot machines               RESTARTS   of the set, at most (default 100)
#
# --dry_run prints the commands and runs none; manifest prints what would be applied.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
begin "run status delete manifest" "$@"

quoted() { printf "'%s'" "${1//\'/\'\'}"; }
manifest() {
  need GKE_TPU TOPOLOGY HOSTS IMAGE CONFIG WORKDIR CLAIM
  local spot=
  [[ "${SPOT:-0}" == 1 ]] && spot='
                cloud.google.com/gke-spot: "true"'
  cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $TPU_NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-100}
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: ${SLICES:-1}
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: tanuki, operator: In, values: [1]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $GKE_TPU
                cloud.google.com/gke-tpu-topology: $TOPOLOGY$spot
              containers:
                - name: tanuki
                  image: $IMAGE
                  command: [tanuki, run, $(quoted "--config=$CONFIG"), $(quoted "--workdir=$WORKDIR")]
                  env:
                    - {name: TANUKI_COORDINATOR, value: auto}
                  ports: [{containerPort: 8471}, {containerPort: 8080}]
                  resources:
                    requests: {google.com/tpu: ${CHIPS:-4}}
                    limits: {google.com/tpu: ${CHIPS:-4}}
                  volumeMounts: [{name: work, mountPath: /mnt}]
              volumes:
                - name: work
                  persistentVolumeClaim: {claimName: $CLAIM}
EOF
}

need TPU_NAME
((dry)) || [[ $action == manifest ]] || command -v kubectl >/dev/null || fail "kubectl is not installed"
case "$action" in
  manifest) manifest ;;
  run) if ((dry)); then echo "kubectl apply -f - <<EOF"; manifest; echo EOF; else manifest | kubectl apply -f -; fi ;;
  status) execute kubectl get jobset "$TPU_NAME" ;;
  delete) execute kubectl delete jobset "$TPU_NAME" ;;
esac
