#!/bin/bash
# Runs a recipe on the GPUs of a Slurm cluster, and goes on by itself where the time limit or a preemption ends it.
#
#   launch/slurm.sh [--dry_run] [--settings=FILE] run|status|cancel
#
# Set in the environment, or in FILE (environment.example):
#   CONFIG     recipe, for example configs/tanuki_8b.py:/data
#   WORKDIR    a directory that every node sees
#   NODES      how many (default 1)                   GPUS      of a node (default 8)
#   TIME       limit of one job (default 24:00:00)     JOBS      jobs one after another, at most (default 20)
#   SBATCH     more words for sbatch, --partition=gpu --account=me say
#
# Slurm sends SIGTERM two minutes before the limit; the run saves, and the next job of the chain goes on.  A job that finds the
# recipe done ends at once.
#
# --dry_run prints the commands and runs none.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
begin "run status cancel" "$@"

need CONFIG WORKDIR
name=tanuki-$(basename "$WORKDIR")
((dry)) || command -v sbatch >/dev/null || fail "sbatch is not installed; run this on a login node of the cluster"
case "$action" in
  run)
    home=$(cd "$(dirname "$0")/.." && pwd)
    # One process for each GPU, found by JAX through Slurm's variables.
    command="TANUKI_COORDINATOR=auto $(printf %q "$home/.venv/bin/tanuki") run --config=$(printf %q "$CONFIG") --workdir=$(printf %q "$WORKDIR")"
    # shellcheck disable=SC2206  # several words
    words=(${SBATCH:-})
    execute sbatch --job-name="$name" --nodes="${NODES:-1}" --ntasks-per-node="${GPUS:-8}" --gpus-per-node="${GPUS:-8}" \
      --time="${TIME:-24:00:00}" --signal=TERM@120 --requeue --dependency=singleton --array="1-${JOBS:-20}%1" \
      --output="$WORKDIR/slurm-%A-%a.log" "${words[@]}" --wrap="srun --kill-on-bad-exit=1 bash -c $(printf %q "$command")"
    ;;
  status) execute squeue --name="$name" ;;
  cancel) execute scancel --name="$name" ;;
esac
