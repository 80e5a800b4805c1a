"""What a launch on Slurm writes, asks and does, with Slurm's programs replaced; test_slurm_real.py has the real ones."""

import re
import shlex
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tanuki_jax.errors import UserError
from tanuki_jax.launch import slurm
from tanuki_jax.launch.commands import Commands, Completed
from tests.launch.fake_slurm import make_cluster, read_settings, script_of

GPUS = ("--gpus=2", "--nodes=4", "--cpus_per_gpu=12")
CONTAINER = ("--container_image=nvcr.io#my/tanuki:1", "--container_mounts=/data:/mnt/data:ro,/scratch")


class Recorded(Commands):
    """Answers squeue with one after another of `queued`, the last one again and again."""

    def __init__(self, *queued):
        super().__init__()
        self.queued, self.words = list(queued) or [""], []

    def run(self, words, text="", seconds=300.0):
        self.words.append(list(words))
        if words[0] == "squeue":
            return Completed(0, self.queued.pop(0) if len(self.queued) > 1 else self.queued[0])
        return Completed(0, "7;cluster\n" if words[0] == "sbatch" else "")

    def show(self, words):
        self.words.append(list(words))


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    workdir = tmp_path / "my 狸's run"
    cluster = make_cluster(tmp_path / "bin", workdir)
    monkeypatch.setattr(slurm, "PROGRAM", cluster.folder / "tanuki")
    monkeypatch.setenv("PATH", cluster.environ()["PATH"])
    return cluster


def job_flags(script):
    """The words that sbatch reads from the script's head."""
    return [shlex.split(line.removeprefix("#SBATCH "))[0] for line in script.splitlines() if line.startswith("#SBATCH ")]


def srun_flags(cluster, start=0):
    return (cluster.folder / f"srun-{start}").read_text().splitlines()


# --- the script


def test_the_job_asks_for_a_process_and_its_cpus_for_each_gpu_and_saves_before_the_limit(tmp_path):
    flags = ("--partition=gpu", "--account=me", "--time=1-00:00:00", "--signal_seconds=300")
    asked = job_flags(slurm.batch_script(read_settings(tmp_path / "50% done", *GPUS, *flags, "--sbatch=--qos=low --mem=0")))
    assert {"--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=12", "--time=1-00:00:00"} <= set(asked)
    assert {"--signal=TERM@300", "--requeue", "--open-mode=append", "--partition=gpu", "--account=me"} <= set(asked)
    assert f"--output={tmp_path}/50%% done/launch/slurm/%j.log" in asked
    assert asked[-2:] == ["--qos=low", "--mem=0"]


def test_srun_is_given_the_cpus_again_and_every_process_sees_all_gpus_of_its_node(cluster):
    values = read_settings(cluster.workdir, *GPUS)
    cluster.run_job(script_of(values), FAKE="0")
    expected = ["--nodes=4", "--ntasks=8", "--ntasks-per-node=2", "--cpus-per-task=12", "--gpu-bind=none"]
    assert srun_flags(cluster)[:7] == [*expected, "--kill-on-bad-exit=1", "bash"]


def test_machines_without_gpus_run_one_process_each(cluster):
    values = read_settings(cluster.workdir, "--gpus=0", "--nodes=2", "--cpus_per_gpu=4")
    assert not [flag for flag in job_flags(script_of(values)) if flag.startswith("--gpu")]
    cluster.run_job(script_of(values), FAKE="0")
    assert srun_flags(cluster)[:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=4"]


def test_in_a_container_tanuki_is_the_images_and_the_workdir_is_mounted(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    cluster = make_cluster(tmp_path / "bin", workdir)
    monkeypatch.setattr(slurm, "PROGRAM", tmp_path / "not here")
    values = read_settings(workdir, *CONTAINER)
    code, log = cluster.run_job(script_of(values), FAKE="0")
    assert code == 0 and "tanuki run --config=" in log
    [image, mounts] = [flag for flag in srun_flags(cluster) if flag.startswith("--container")]
    assert image == "--container-image=nvcr.io#my/tanuki:1"
    assert mounts == f"--container-mounts=/data:/mnt/data:ro,/scratch,{workdir}:{workdir}"
    assert f"--chdir={workdir}" in job_flags(slurm.batch_script(values))


@pytest.mark.parametrize("mount", ["/mnt:/mnt", "/mnt", "/mnt/runs/:/mnt/runs:rw", "/mnt/runs/nano:/mnt/runs/nano"])
def test_a_workdir_that_the_users_mounts_hold_is_not_mounted_twice(mount):
    values = read_settings(Path("/mnt/runs/nano"), *CONTAINER[:1], f"--container_mounts={mount}")
    assert slurm._mounts(values) == mount


@pytest.mark.parametrize(
    ("mount", "folder", "source"),
    [
        ("/lustre/me:/mnt/runs", "/lustre/me/nano", "/lustre/me"),
        ("/a:/mnt/runs/nano:rw", "/a", "/a"),
        ("/data,/lustre:/mnt/:ro", "/lustre/runs/nano", "/lustre"),
    ],
)
def test_a_workdir_that_is_another_directory_in_the_container_is_an_error(mount, folder, source):
    """The batch script reads the host's."""
    with pytest.raises(UserError) as caught:
        slurm.batch_script(read_settings(Path("/mnt/runs/nano"), *CONTAINER[:1], f"--container_mounts={mount}"))
    text = str(caught.value)
    assert (
        "workdir /mnt/runs/nano" in text and f"workdir={folder}" in text and f"{source}:{source}" in text and "\n" not in text
    )


def test_a_mount_through_a_link_is_the_same_directory(tmp_path):
    (tmp_path / "lustre").mkdir()
    (tmp_path / "link").symlink_to("lustre")
    mount = f"{tmp_path}/lustre:{tmp_path}/link"
    assert slurm._mounts(read_settings(tmp_path / "link" / "nano", *CONTAINER[:1], f"--container_mounts={mount}")) == mount


def test_a_workdir_that_pyxis_cannot_mount_is_an_error():
    with pytest.raises(UserError, match="cannot mount"):
        slurm.batch_script(read_settings(Path("/mnt/a:b"), *CONTAINER[:1]))


@pytest.mark.parametrize(
    "flags", [GPUS, ("--gpus=0",), (*CONTAINER[:1], "--container_mounts=/mnt:/mnt"), ("--sbatch=--comment='x",)]
)
@pytest.mark.parametrize("workdir", ["/mnt/run", '/mnt/it\'s "my" $run `#` 狸 100%'])
def test_shellcheck_finds_nothing_in_the_script(flags, workdir):
    script = slurm.batch_script(read_settings(Path(workdir), *flags))
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([shellcheck, "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the job


def test_a_job_is_requeued_until_the_run_is_done_and_each_start_keeps_its_exit_codes(cluster):
    values = read_settings(cluster.workdir, "--gpus=2")
    code, log = cluster.run_job(script_of(values, SECRET="a b\n'c'", JAX_PLATFORMS="cuda"), FAKE="save-75 76 77 134 137 143 0")
    assert code == 0 and log.count("; requeued") == 6
    assert "done; the report is" in log and "process 1, cuda" in log and "a b\n'c'" in log
    folder = cluster.workdir / "launch" / "slurm" / "7"
    exits = [[path.read_text().strip() for path in sorted(folder.glob(f"exits-{start}/*"))] for start in range(7)]
    assert exits == [[word] * 2 for word in ("75", "76", "77", "134", "137", "143", "0")]
    assert (folder / "ended").read_text().startswith("done")


@pytest.mark.parametrize("code", ["1", "2", "126", "127"])
def test_after_an_error_that_would_come_again_nothing_goes_on(cluster, code):
    ended, log = cluster.run_job(script_of(read_settings(cluster.workdir)), FAKE=code)
    assert ended == 1 and f"ended with exit code {code}, which would come again" in log and not cluster.calls()


def test_bad_input_of_one_process_counts_even_where_srun_kills_the_others(cluster):
    values = read_settings(cluster.workdir, "--gpus=3")
    ended, log = cluster.run_job(script_of(values), FAKE="0:143,1:1,2:75")
    assert ended == 1 and "exit code 1, which would come again" in log and not cluster.calls()


def test_a_program_that_is_missing_is_not_started_again(cluster, monkeypatch):
    monkeypatch.setattr(slurm, "PROGRAM", cluster.folder / "missing")
    ended, log = cluster.run_job(script_of(read_settings(cluster.workdir)), FAKE="0")
    assert ended == 1 and "exit code 127" in log and not cluster.calls()


def test_an_environment_that_cannot_be_read_is_not_tried_again(cluster):
    values = read_settings(cluster.workdir, "--gpus=2")
    script = script_of(values)
    slurm._env_file(values).unlink()
    ended, log = cluster.run_job(script, FAKE="0")
    assert ended == 1 and "nano.env" in log and "exit code 1, which would come again" in log and not cluster.calls()


def test_exit_code_0_without_the_runs_summary_is_no_success(cluster):
    script = script_of(read_settings(cluster.workdir))
    ended, log = cluster.run_job(script, FAKE="empty")
    assert ended == 1 and "does not list every stage" in log and "done;" not in log
    (cluster.workdir / "summary.json").write_text('{"stages": [{"name": "a"}], "config": {"stages": {"a": {}, "b": {}}}}')
    ended, log = cluster.run_job(script, FAKE="empty")
    assert ended == 1 and "does not list every stage" in log and not cluster.calls()


def test_restarts_without_progress_are_counted_and_end_the_job(cluster):
    values = read_settings(cluster.workdir, "--max_restarts=2")
    ended, log = cluster.run_job(script_of(values), FAKE="76 save-76 76 76 76 76")
    assert ended == 1 and "2 restarts in a row without a new checkpoint" in log
    assert log.count("; requeued") == 4  # start 2 saved, start 3 did not; starts 4 and 5 were its two restarts


def test_a_node_that_fails_without_a_word_is_counted_at_the_next_start(cluster):
    values = read_settings(cluster.workdir, "--max_restarts=1")
    folder = cluster.workdir / "launch" / "slurm" / "7"
    script = script_of(values)
    folder.mkdir()
    (folder / "progress").write_text("\n")
    (folder / "stalled").write_text("1\n")
    environ = cluster.environ(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2", SLURM_JOB_NODELIST="n1", FAKE="0")
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True)
    assert done.returncode == 1 and "2 restarts in a row" in done.stdout and not (cluster.workdir / "summary.json").exists()


def test_a_job_is_requeued_so_often_and_no_more(cluster):
    values = read_settings(cluster.workdir, "--max_requeues=3")
    ended, log = cluster.run_job(script_of(values), FAKE="save-75")
    assert ended == 1 and log.count("; requeued") == 3 and "as often as max_requeues allows" in log


def test_where_srun_itself_fails_the_job_tries_again_but_not_for_ever(cluster):
    values = read_settings(cluster.workdir, "--max_restarts=2")
    ended, log = cluster.run_job(script_of(values), FAKE="0", SRUN_FAILS="pyxis: cannot import the image")
    assert ended == 1 and log.count("; requeued") == 2 and "2 restarts in a row" in log


def test_a_job_that_cannot_be_requeued_says_so(cluster):
    environ = cluster.environ(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n1", FAKE="75", SCONTROL_CODE="1")
    script = script_of(read_settings(cluster.workdir))
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True)
    assert done.returncode == 1 and "launch it again" in done.stdout


def test_a_save_that_does_not_end_before_the_limit_is_requeued_by_the_job_itself(cluster):
    end = (datetime.now() + timedelta(seconds=17)).strftime("%Y-%m-%dT%H:%M:%S")
    values = read_settings(cluster.workdir, "--signal_seconds=30")
    began = time.monotonic()
    ended, log = cluster.run_job(script_of(values), FAKE="hang 0", QUEUED=end)
    assert ended == 0 and "ended with exit code 137; requeued" in log and time.monotonic() - began < 15


def test_a_job_that_was_told_to_stop_is_not_requeued(cluster):
    values = read_settings(cluster.workdir)
    script, mark = script_of(values), cluster.workdir / "launch" / "slurm" / "7" / "stop"

    def mark_when_ready():
        while not mark.parent.is_dir():
            time.sleep(0.01)
        mark.touch()

    thread = threading.Thread(target=mark_when_ready)
    thread.start()
    ended, log = cluster.run_job(script, FAKE="0:75", DELAY="1")
    thread.join()
    assert ended == 0 and "stopped; the next launch goes on" in log and not cluster.calls()


def test_stop_before_the_processes_exist_starts_no_run(cluster):
    """As in the minutes in which an image is imported: scancel has no process to signal."""
    mark = cluster.workdir / "launch" / "slurm" / "7" / "stop"
    ended, log = cluster.run_job(script_of(read_settings(cluster.workdir, "--gpus=2")), FAKE="0", STOPPED=str(mark))
    assert ended == 0 and "stopped; the next launch goes on" in log and not cluster.calls() and not mark.exists()
    assert "process 0" not in log and not (cluster.workdir / "summary.json").exists()


# --- the actions


def test_run_makes_the_workdir_and_an_environment_that_only_the_user_can_read(cluster, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    commands = Recorded()
    values = read_settings(cluster.workdir, "--pass_env=WANDB_API_KEY", "--env=NOTE=it's\nmine")
    slurm.launch("run", values, commands)
    folder = cluster.workdir / "launch" / "slurm"
    assert [words[0] for words in commands.words] == ["squeue", "sbatch"]
    assert commands.words[1] == ["sbatch", "--parsable", str(folder / "nano.sh")]
    assert (folder / "nano.sh").read_text() == slurm.batch_script(values)
    assert (folder / "nano.env").stat().st_mode & 0o777 == 0o600
    words = [
        "bash",
        "-c",
        'source "$0"; echo "$JAX_PLATFORMS $TANUKI_COORDINATOR $WANDB_API_KEY $NOTE"',
        str(folder / "nano.env"),
    ]
    shown = subprocess.run(words, capture_output=True, text=True).stdout
    assert shown == "cuda auto secret it's\nmine\n" and "secret" not in (folder / "nano.sh").read_text()
    assert "job 7 is submitted" in capsys.readouterr().out


def test_a_second_job_of_the_same_name_is_refused(cluster):
    commands = Recorded("12 RUNNING\n")
    with pytest.raises(UserError, match=r"job 12 \(RUNNING\) is called nano"):
        slurm.launch("run", read_settings(cluster.workdir), commands)
    assert not cluster.workdir.exists()


def test_run_needs_the_program_and_a_workdir_that_can_be_written(cluster, monkeypatch):
    (cluster.folder / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        slurm.launch("run", read_settings(cluster.folder / "file" / "run"), Recorded())
    monkeypatch.setattr(slurm, "PROGRAM", cluster.folder / "missing")
    with pytest.raises(UserError, match="make setup"):
        slurm.launch("run", read_settings(cluster.workdir), Recorded())


def test_the_dry_run_shows_script_and_environment_and_hides_what_is_secret(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    values = read_settings(tmp_path / "run", "--pass_env=WANDB_API_KEY", *GPUS)
    slurm.launch("run", values, Commands(dry_run=True))
    shown = capsys.readouterr().out
    assert "secret" not in shown and "WANDB_API_KEY='***'" in shown and "JAX_PLATFORMS=cuda" in shown
    assert "#SBATCH --gpus-per-node=2" in shown and not (tmp_path / "run").exists()
    lines = [line for line in shown.splitlines() if not line.startswith("#")]
    assert [line.split()[0] for line in lines] == ["squeue", "mkdir", "sbatch"]


def test_script_prints_what_run_submits(cluster, capsys):
    values = read_settings(cluster.workdir)
    slurm.launch("script", values, Recorded())
    assert capsys.readouterr().out == slurm.batch_script(values)


def test_status_shows_the_job_and_what_the_run_left(cluster, capsys):
    values = read_settings(cluster.workdir)
    slurm.launch("status", values, Recorded("7 RUNNING None start=...\n"))
    assert re.search(r"job: 7 RUNNING.*\nrun: not done; stages done: none; no checkpoint\n", capsys.readouterr().out)
    cluster.run_job(script_of(values), FAKE="save-75 0")
    slurm.launch("status", values, Recorded())
    shown = capsys.readouterr().out
    assert "none called nano" in shown and "job 7 ended: done" in shown
    assert "run: done; stages done: none; newest checkpoint: first, step 0" in shown


def test_logs_shows_the_newest_log(cluster):
    commands, values = Recorded(), read_settings(cluster.workdir)
    with pytest.raises(UserError, match="no log"):
        slurm.launch("logs", values, commands)
    folder = cluster.workdir / "launch" / "slurm"
    folder.mkdir(parents=True)
    (folder / "7.log").touch()
    slurm.launch("logs", values, commands)
    assert commands.words == [["tail", "-n", "200", str(folder / "7.log")]]


def test_stop_signals_a_job_that_runs(cluster):
    commands, values = Recorded("7 RUNNING\n"), read_settings(cluster.workdir)
    slurm.launch("stop", values, commands)
    assert commands.words[1:] == [["scancel", "--signal=TERM", "7"]]
    assert (cluster.workdir / "launch" / "slurm" / "7" / "stop").exists()
    with pytest.raises(UserError, match="no job called nano"):
        slurm.launch("stop", values, Recorded())


@pytest.mark.parametrize("later", ["", "7 RUNNING\n"])
def test_stop_cancels_a_job_that_waits_and_signals_it_where_it_has_just_begun(cluster, later):
    commands = Recorded("7 PENDING\n", later)
    slurm.launch("stop", read_settings(cluster.workdir), commands)
    calls = [words for words in commands.words if words[0] == "scancel"]
    assert calls == [["scancel", "--state=PENDING", "7"]] + ([["scancel", "--signal=TERM", "7"]] if later else [])
    assert (cluster.workdir / "launch" / "slurm" / "7" / "stop").exists() == bool(later)


@pytest.mark.parametrize("action", ["run", "status", "logs", "stop"])
def test_every_dry_run_changes_nothing(tmp_path, action, capsys):
    slurm.launch(action, read_settings(tmp_path / "run"), Commands(dry_run=True))
    assert capsys.readouterr().out and not list(tmp_path.iterdir())
