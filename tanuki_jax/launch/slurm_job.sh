# The part of a Slurm job's script that is the same for every launch; slurm.py writes the settings above it.
# shellcheck shell=bash
set -uo pipefail
launch=$workdir/launch/slurm/$SLURM_JOB_ID
start=${SLURM_RESTART_COUNT:-0}
exits=$launch/exits-$start # PROCESS: the exit code of each process

say() { echo "launch: job $SLURM_JOB_ID, start $((start + 1)): $1"; }
finish() {
  say "$2"
  echo "$2" >"$launch/ended"
  rm -f "$launch/stop"
  exit "$1"
}
# Changes with every checkpoint and every finished stage.
progress() {
  find "$workdir/stages" -mindepth 2 -maxdepth 3 -printf '%P\n' 2>/dev/null | grep -E '(/done\.json|/checkpoints/[0-9]+)$' | sort
}
requeue() {
  ((start < max_requeues)) || finish 1 "$1; it was requeued $start times, as often as max_requeues allows"
  [[ "$(progress)" != "$before" ]] || ((stalled < max_restarts)) ||
    finish 1 "$1; $stalled restarts in a row without a new checkpoint, as many as max_restarts allows"
  say "$1; requeued"
  scontrol requeue "$SLURM_JOB_ID" || finish 1 "$1; scontrol could not requeue the job: launch it again"
  exit 0
}
# One process of the run, inside the container where there is one.  Slurm signals this shell, too, which must outlive the run.
# shellcheck disable=SC2317,SC2329  # its text is handed to srun
task() {
  local code=0 seconds files
  trap : TERM
  set -a
  # shellcheck disable=SC1090  # written by slurm.py
  source "$environment" || code=1
  set +a
  if [[ -e "$launch/stop" ]]; then
    code=75 # told to stop before there was a process to signal, while an image was imported say
  elif ((code == 0)); then
    "${command[@]}" || code=$?
  fi
  if ((code == 0 && SLURM_PROCID == 0)) && ! "$python" -c "$check" "$workdir/summary.json"; then
    echo "launch: exit code 0, but $workdir/summary.json does not list every stage of its recipe: this was no success" >&2
    code=1
  fi
  echo "$code" >"$exits/$SLURM_PROCID"
  # srun kills the others as soon as one fails; they may be about to say why, or to release the lock of the workdir.
  for ((seconds = 0; code && seconds < 30; seconds++)); do
    files=("$exits"/*)
    ((${#files[@]} < SLURM_NTASKS)) || break
    sleep 1
  done
  exit "$code"
}

((start)) || rm -rf -- "$launch"/{exits-*,ended,progress,stalled} # of an older job of the same number
mkdir -p "$exits" || exit 1
[[ ! -e "$launch/stop" ]] || finish 0 "stopped; the next launch goes on from the last checkpoint"
((start <= max_requeues)) || finish 1 "requeued $start times, more often than max_requeues allows"

# Restarts in a row that found the progress of the one before them: counted here, for a node that fails counts nothing.
before=$(progress) stalled=0
if ((start)) && [[ -e "$launch/progress" && "$(<"$launch/progress")" == "$before" ]]; then
  stalled=$(($(<"$launch/stalled") + 1))
fi
echo "$before" >"$launch/progress"
echo "$stalled" >"$launch/stalled"
((stalled <= max_restarts)) || finish 1 "$stalled restarts in a row without a new checkpoint, more than max_restarts allows"

# Slurm does not requeue a job that reaches its limit: where a save takes too long, srun ends shortly before.
limit=0 # none
end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e 2>/dev/null)
if [[ "$end" == [0-9]* ]]; then
  limit=$(($(date --date="$end" +%s) - $(date +%s) - margin))
  ((limit > 0)) || limit=1
fi

say "on $SLURM_JOB_NODELIST"
code=0
timeout --signal=KILL "$limit" srun "${srun[@]}" \
  bash -c "$(declare -p launch workdir environment command python check exits); $(declare -f task); task" || code=$?

codes=" $(cat "$exits"/* 2>/dev/null | sort -nu | tr '\n' ' ')"
for bad in 1 2 126 127; do
  [[ "$codes" != *" $bad "* ]] || finish 1 "the run ended with exit code $bad, which would come again; the reason is above"
done
if ((code == 0)); then
  [[ "$codes" == " 0 " ]] || finish 1 "srun ended with exit code 0, but started no process"
  finish 0 "done; the report is $workdir/report.html"
fi
[[ ! -e "$launch/stop" ]] || finish 0 "stopped; the next launch goes on from the last checkpoint"
requeue "ended with exit code $code"
