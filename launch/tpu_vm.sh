#!/bin/bash
# Runs a recipe on a Cloud TPU slice: creates it, installs the project on every worker, trains, deletes it again.
#
#   launch/tpu_vm.sh [--dry_run] create|install|run|status|delete
#
# Set in the environment:
#   TPU_NAME   name of the slice                 ZONE      for example us-east5-a
#   TPU_TYPE   accelerator type, v5p-256 say     RUNTIME   runtime version (default v2-alpha-tpuv5)
#   PROJECT    Google Cloud project (default: gcloud's own)
#   CONFIG     recipe, for example configs/tanuki_8b.py:/mnt/data
#   WORKDIR    a directory that every worker sees (Filestore, or a bucket mounted with gcsfuse)
#   SPOT       1 = preemptible; `create` and `run` again after a preemption: the run goes on from its last checkpoint
#
# --dry_run prints the commands and runs none.
set -euo pipefail

usage() { sed -n '2,15s/^# \{0,1\}//p' "$0"; }
fail() { echo "tpu_vm: $1" >&2; exit 1; }
need() { for name in "$@"; do [[ -n "${!name:-}" ]] || fail "$name is not set; $0 --help says what is needed"; done; }

dry=0
action=
for argument in "$@"; do
  case "$argument" in
    --dry_run) dry=1 ;;
    -h | --help) usage; exit 0 ;;
    create | install | run | status | delete) action=$argument ;;
    *) fail "unknown argument '$argument'; $0 --help" ;;
  esac
done
[[ -n "$action" ]] || { usage >&2; exit 1; }

execute() {
  if ((dry)); then printf '%q ' "$@"; echo; else "$@"; fi
}
tpu() {
  local verb=$1
  shift
  execute gcloud compute tpus tpu-vm "$verb" "$TPU_NAME" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} "$@"
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
    # The committed state of this checkout, nothing else, goes to every worker.
    archive=${TMPDIR:-/tmp}/tanuki_jax.tar.gz
    execute git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
    execute gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME": --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all
    everywhere "mkdir -p tanuki_jax && tar -xzf tanuki_jax.tar.gz -C tanuki_jax && cd tanuki_jax && python3 -m venv .venv && .venv/bin/pip install --quiet --constraint requirements.lock --editable '.[tpu]'"
    ;;
  run)
    need CONFIG WORKDIR
    # JAX finds the other workers of a slice by itself.
    everywhere "cd tanuki_jax && TANUKI_COORDINATOR=auto .venv/bin/tanuki run --config=$(printf %q "$CONFIG") --workdir=$(printf %q "$WORKDIR")"
    ;;
  status) tpu describe --format='value(state)' ;;
  delete) tpu delete --quiet ;;
esac
