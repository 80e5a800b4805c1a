"""Programs that stand in for Slurm's and for `tanuki`: the batch script is run as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tanuki_jax.launch import settings, slurm

# Ends as FAKE says, word by word for each start of the job: an exit code; `save` waits for SIGTERM, saves and ends with 75;
# `save-CODE` saves and ends so; `empty` ends with 0 and leaves no summary; `PROCESS:CODE,...` differs by process; `hang`.
TANUKI = r"""#!/bin/bash
echo "tanuki $*"
echo "start ${SLURM_RESTART_COUNT:-0}, process $SLURM_PROCID, $JAX_PLATFORMS $TANUKI_COORDINATOR $SECRET," \
  "CPUs $SLURM_CPUS_PER_TASK"
for argument; do [[ "$argument" == --workdir=* ]] && workdir=${argument#--workdir=}; done
read -ra words <<<"$FAKE"
word=${words[${SLURM_RESTART_COUNT:-0}]:-${words[-1]}}
save() { mkdir -p "$workdir/stages/first/checkpoints/${SLURM_RESTART_COUNT:-0}"; }
case "$word" in
  save)
    stopped=0
    trap 'stopped=1' TERM
    touch "$workdir/ready-${SLURM_RESTART_COUNT:-0}"
    until ((stopped)); do sleep 0.1; done
    save
    exit 75
    ;;
  hang) touch "$workdir/ready-${SLURM_RESTART_COUNT:-0}"; trap '' TERM; for i in {1..600}; do sleep 0.1; done ;;
  save-*) save; exit "${word#save-}" ;;
  empty) exit 0 ;;
  *:*) sleep "${DELAY:-0}"; [[ ",$word" =~ ,$SLURM_PROCID:([0-9]+) ]]; exit "${BASH_REMATCH[1]}" ;;
  0) printf '%s' '{"stages": [{"name": "first"}], "config": {"stages": {"first": {}}}}' >"$workdir/summary.json" ;;
  *) exit "$word" ;;
esac
"""
SRUN = r"""#!/bin/bash
printf '%s\n' "$@" >"$RECORD/srun-${SLURM_RESTART_COUNT:-0}"
echo "$SRUN_FAILS" | grep -q . && { echo "srun: error: $SRUN_FAILS"; exit 1; }
[[ -z "${STOPPED-}" ]] || touch "$STOPPED"
while [[ "$1" == --* ]]; do [[ "$1" == --ntasks=* ]] && ntasks=${1#--ntasks=}; shift; done
pids=() highest=0
for ((i = 0; i < ntasks; i++)); do SLURM_PROCID=$i SLURM_NTASKS=$ntasks "$@" & pids+=($!); done
for ((i = 0; i < ntasks; i++)); do
  wait -n; code=$?
  ((code <= highest)) || highest=$code
  ((code == 0)) || kill -KILL "${pids[@]}" 2>/dev/null  # --kill-on-bad-exit
done
exit "$highest"
"""
SQUEUE = r"""#!/bin/bash
echo "${QUEUED-}"
"""
RECORDER = r"""#!/bin/bash
echo "$(basename "$0") $*" >>"$RECORD/calls"
[[ "$(basename "$0")" != sbatch ]] || echo "7;cluster"
exit "${SCONTROL_CODE:-0}"
"""


@dataclass(frozen=True)
class Cluster:
    """A folder of such programs, and what they recorded."""

    folder: Path
    workdir: Path

    def environ(self, **more: str) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}", "RECORD": str(self.folder)} | more

    def calls(self) -> list[str]:
        record = self.folder / "calls"
        return record.read_text().splitlines() if record.is_file() else []

    def run_job(self, script: str, starts: int = 20, **environ: str) -> tuple[int, str]:
        """Runs a job's script, again wherever it is requeued; the exit code and the whole log."""
        log = ""
        for start in range(starts):
            number = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"} | ({"SLURM_RESTART_COUNT": str(start)} if start else {})
            requeues = self.calls().count("scontrol requeue 7")
            words, env = ["bash", "-c", script], self.environ(**number, **environ)
            done = subprocess.run(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
            log += done.stdout
            if self.calls().count("scontrol requeue 7") == requeues:
                return done.returncode, log
        raise AssertionError(f"requeued {starts} times:\n{log}")


def write_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def make_cluster(folder: Path, workdir: Path) -> Cluster:
    folder.mkdir()
    for name, text in (("srun", SRUN), ("squeue", SQUEUE), *((name, RECORDER) for name in ("scontrol", "sbatch", "scancel"))):
        write_program(folder / name, text)
    write_program(folder / "tanuki", TANUKI)
    write_program(folder / "python3", f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    return Cluster(folder, workdir)


def read_settings(workdir: Path, *flags: str) -> settings.Settings:
    basic = ["--name=nano", "--gpus=1", f"--workdir={workdir}", "--config=configs/nano.py:/mnt/it's mine"]
    return settings.read("slurm", None, [*basic, *flags])


def script_of(values: settings.Settings, **environ: str) -> str:
    """The batch script, with the environment beside it that `run` would write."""
    env_file = Path(values.workdir) / "launch" / "slurm" / f"{values.name}.env"
    env_file.parent.mkdir(parents=True, exist_ok=True)
    env_file.write_text(slurm._assignments(environ))
    return slurm.batch_script(values)
