#!/bin/bash
# Runs a recipe on one or several Cloud TPU slices that are queued for, until it is done, over any number of preemptions.
#
#   launch/queued.sh [--dry_run] [--settings=FILE] until_done|create|wait|install|run|status|delete
#
# until_done creates the slices, waits for them, installs and trains.  After a preemption it deletes what is left and starts again,
# and the run resumes from its last checkpoint.  It ends when the recipe is done, or when the run exits with an error of its own.
#
# Set in the environment, or in FILE (environment.example):
#   TPU_NAME   name of the request and prefix of its slices      ZONE      for example us-east5-a
#   TPU_TYPE   accelerator type of a slice, v5p-256 say           SLICES    how many (default 1); mesh.slices of the recipe
#   RUNTIME    runtime version (default v2-alpha-tpuv5)           PROJECT   Google Cloud project (default: gcloud's own)
#   CONFIG     recipe, for example configs/tanuki_8x8b.py:/mnt/data
#   WORKDIR    a directory that every worker of every slice sees (Filestore, or a bucket mounted with gcsfuse)
#   SPOT       1 = preemptible                                    POLL      seconds between two looks at the state (default 60)
#
# --dry_run prints the commands of one round and runs none.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
begin "until_done create wait install run status delete" "$@"

queued() {
  local verb=$1
  shift
  execute gcloud alpha compute tpus queued-resources "$verb" "$TPU_NAME" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} "$@"
}
everywhere() { queued ssh --node=all --worker=all --command="$1"; }
state() {
  gcloud alpha compute tpus queued-resources describe "$TPU_NAME" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

create() {
  need TPU_TYPE
  local nodes=(--node-id="$TPU_NAME") spot=()
  ((${SLICES:-1} > 1)) && nodes=(--node-count="$SLICES" --node-prefix="$TPU_NAME")
  [[ "${SPOT:-0}" == 1 ]] && spot=(--spot)
  queued create --accelerator-type="$TPU_TYPE" --runtime-version="${RUNTIME:-v2-alpha-tpuv5}" "${nodes[@]}" "${spot[@]}"
}
wait_until_active() {
  ((dry)) && { queued describe --format='value(state.state)'; return; }
  local now
  while now=$(state) && [[ "$now" != ACTIVE ]]; do
    case "$now" in
      FAILED | SUSPENDED | SUSPENDING | NONE) echo "queued.sh: the request is $now" >&2; return 1 ;;
    esac
    echo "queued.sh: $now" >&2
    sleep "${POLL:-60}"
  done
}
install() {
  pack &&
    execute gcloud alpha compute tpus queued-resources scp "$archive" "$TPU_NAME": --zone="$ZONE" \
      ${PROJECT:+--project="$PROJECT"} --node=all --worker=all &&
    everywhere "$(install_command)"
}
run() {
  need CONFIG WORKDIR
  everywhere "$(run_command)"
}
delete() { queued delete --force --quiet; }

until_done() {
  need TPU_TYPE CONFIG WORKDIR
  local code
  while true; do
    [[ $dry == 1 || $(state) != NONE ]] || create
    ((dry)) && create
    if wait_until_active && install; then
      code=0
      run || code=$?
      ((dry)) && return
      ((code)) || { echo "queued.sh: done" >&2; return; }
      # 75: told to stop and saved.  76: a step hung.  77, 134: a process is gone.
      # 143: stopped before there was anything to save.  Else ask the platform: with the slices gone, ssh
      # fails in any way.
      if [[ ! $code =~ ^(7[567]|134|143)$ && $(state) == ACTIVE ]]; then
        fail "the run ended with exit code $code, and its message says why; the slices are still there"
      fi
      [[ $(state) == ACTIVE ]] && continue
    fi
    echo "queued.sh: the slices are gone; asking for new ones" >&2
    delete || true
    sleep "${POLL:-60}"
  done
}

need TPU_NAME ZONE
((dry)) || command -v gcloud >/dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
case "$action" in
  wait) wait_until_active ;;
  status) queued describe --format='value(state.state)' ;;
  *) "$action" ;;
esac
