#!/bin/bash
# Runs a recipe on one Cloud TPU slice: creates it, installs the project on every worker, trains, deletes it again.
# For slices that are queued for, or several of them, see queued.sh.
#
#   launch/tpu_vm.sh [--dry_run] [--settings=FILE] create|install|run|status|delete
#
# Set in the environment, or in FILE (environment.example):
#   TPU_NAME   name of the slice                 ZONE      for example us-east5-a
#   TPU_TYPE   accelerator type, v5p-256 say     RUNTIME   runtime version (default v2-alpha-tpuv5)
#   PROJECT    Google Cloud project (default: gcloud's own)
#   CONFIG     recipe, for example configs/tanuki_8b.py:/mnt/data
#   WORKDIR    a directory that every worker sees (Filestore, or a bucket mounted with gcsfuse)
#   SPOT       1 = preemptible; `create` and `run` again after a preemption: the run goes on from its last checkpoint
#
# --dry_run prints the commands and runs none.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
begin "create install run status delete" "$@"

where() { echo --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}; }
tpu() {
  local verb=$1
  shift
  # shellcheck disable=SC2046  # several words
  execute gcloud compute tpus tpu-vm "$verb" "$TPU_NAME" $(where) "$@"
}
everywhere() { tpu ssh --worker=all --command="$1"; }

need TPU_NAME ZONE
((dry)) || command -v gcloud >/dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
case "$action" in
  create)
    need TPU_TYPE
    spot=()
    [[ "${SPOT:-0}" == 1 ]] && spot=(--spot)
    tpu create --accelerator-type="$TPU_TYPE" --version="${RUNTIME:-v2-alpha-tpuv5}" "${spot[@]}"
    ;;
  install)
    pack
    # shellcheck disable=SC2046
    execute gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME": $(where) --worker=all
    everywhere "$(install_command)"
    ;;
  run)
    need CONFIG WORKDIR
    everywhere "$(run_command)"
    ;;
  status) tpu describe --format='value(state)' ;;
  delete) tpu delete --quiet ;;
esac
