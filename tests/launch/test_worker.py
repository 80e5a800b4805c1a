"""worker.py as a TPU VM runs it: its own process, a home directory, an old Python."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tanuki_jax.launch import bundle, worker
from tests.tiny_recipe import trained

# In place of the project's environment: pip counts its calls, tanuki does what the workdir's file `do` says.
PYTHON = """#!/bin/bash
[[ "$*" == *install* ]] || exit 0
echo "$@" >> ~/installs
sleep 0.2
[[ -e ~/broken ]] || exit 0
echo "ERROR: No matching distribution"
exit 1
"""
TANUKI = """#!/bin/bash
echo "$JAX_PLATFORMS" "$@"
trap 'kill $sleeping; echo saved; exit 75' TERM
case "$(cat {workdir}/do)" in
  wait) touch {workdir}/running; sleep 60 & sleeping=$!; wait;;
  fail) echo "tanuki: config: bad"; exit 1;;
  die) kill -9 $$;;
  done) echo '{{"stages": [{{"name": "a"}}], "config": {{"stages": {{"a": {{}}}}}}}}' > {workdir}/summary.json;;
  part) echo '{{"stages": [], "config": {{"stages": {{"a": {{}}}}}}}}' > {workdir}/summary.json;;
esac
"""


class Vm:
    """A home directory with what a launch has copied there."""

    def __init__(self, tmp_path, host="w-0", python=sys.executable, **launch):
        self.home, self.host, self.python = tmp_path / host, host, python
        self.workdir = tmp_path / "work dir"
        self.home.mkdir()
        self.workdir.mkdir(exist_ok=True)
        self.launch = {
            "project": "commit 1",
            "workdir": str(self.workdir),
            "setup": "",
            "python": "3.12",
            "allow_boot_disk": True,
            "run": ["--config=a b", f"--workdir={self.workdir}"],
            "env": {"JAX_PLATFORMS": "tpu"},
            **launch,
        }
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            member = tarfile.TarInfo("requirements.lock")
            tar.addfile(member, io.BytesIO())
        self.archive = archive.getvalue()
        self.send()

    def send(self):
        path = self.home / "tanuki_launch.tar"
        self.text = json.dumps(self.launch).encode()
        bundle.write(path, self.text, self.archive)
        with tarfile.open(path) as tar:
            tar.extractall(self.home / "tanuki_launch", filter="data")

    def environment(self):
        scripts = self.home / "tanuki_jax" / ".venv" / "bin"
        scripts.mkdir(parents=True)
        for name, text in (("python", PYTHON), ("tanuki", TANUKI.format(workdir=f"'{self.workdir}'"))):
            (scripts / name).write_text(text)
            (scripts / name).chmod(0o755)
        return self

    def command(self, *words, **environ):
        env = {"HOME": str(self.home), "TANUKI_LAUNCH_HOST": self.host, "PATH": os.environ["PATH"], **environ}
        words = [self.python, "tanuki_launch/worker.py", *words]
        return subprocess.Popen(words, cwd=self.home, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def ask(self, *words, **environ):
        process = self.command(*words, **environ)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0  # gcloud leaves out the workers after one that fails
        *self.printed, last = out.splitlines()
        assert last.startswith(worker.MARK), out
        return json.loads(last.removeprefix(worker.MARK))

    def do(self, text):
        (self.workdir / "do").write_text(text)

    def until(self, check):
        limit = time.monotonic() + 30
        while not check(status := self.ask("status")):
            assert time.monotonic() < limit, status
            time.sleep(0.05)
        return status


@pytest.fixture
def vm(tmp_path):
    made = Vm(tmp_path).environment()
    yield made
    made.ask("stop")


def test_a_run_is_detached_and_its_end_is_written_down(vm):
    vm.do("done")
    assert vm.ask("status") | {"launch": ""} == {
        **{"host": "w-0", "action": "status", "ok": True, "attempt": 0, "exits": {}, "started": [], "done": False},
        **{"stopped": False, "alive": False, "here": 0, "installed": "", "progress": [0, [], 0], "last": "", "launch": ""},
    }
    assert vm.ask("setup", f"--digest={hashlib.sha256(vm.text).hexdigest()}")["ok"]
    assert vm.ask("install")["again"] and vm.ask("status")["installed"] == "commit 1"
    assert vm.ask("start", "--attempt=1")["again"]
    status = vm.until(lambda s: s["exits"] and not s["alive"])
    assert status["exits"] == {"w-0": 0} and status["done"] and status["attempt"] == status["here"] == 1 and not status["alive"]
    assert status["last"] == f"tpu run --config=a b --workdir={vm.workdir}"
    assert not vm.ask("start", "--attempt=1")["again"]  # gcloud repeats commands
    assert vm.ask("logs")["ok"] and vm.printed == [status["last"]]
    assert vm.ask("start", "--attempt=2")["again"] and vm.until(lambda s: s["attempt"] == 2 and s["exits"])["done"]


def test_exit_codes_and_the_runs_own_sign(vm):
    for attempt, (action, code) in enumerate([("fail", 1), ("die", 137), ("part", 0)], 1):
        vm.do(action)
        vm.ask("start", f"--attempt={attempt}")
        status = vm.until(lambda s, attempt=attempt: s["attempt"] == attempt and s["exits"])
        assert status["exits"] == {"w-0": code} and not status["done"]
        assert status.get("message", "").endswith("tanuki: config: bad") == (code == 1)


def test_stop_lets_the_run_save(vm):
    vm.do("wait")
    assert vm.ask("stop") == {"host": "w-0", "action": "stop", "ok": True, "was_running": False}
    vm.ask("start", "--attempt=1")
    vm.until(lambda s: s["alive"] and (vm.workdir / "running").exists())
    answer = vm.ask("start", "--attempt=2")
    assert not answer["ok"] and "attempt 1 still runs here" in answer["error"]
    assert vm.ask("stop")["was_running"]
    status = vm.until(lambda s: not s["alive"])
    assert status["exits"] == {"w-0": 75} and status["last"] == "saved"


def test_a_run_that_outlives_its_supervisor_is_alive_and_can_be_stopped(vm):
    vm.do("wait")
    vm.ask("start", "--attempt=1")
    vm.until(lambda s: s["alive"] and (vm.workdir / "running").exists())
    os.kill(json.loads((vm.home / "tanuki_launch/current.json").read_text())["pid"], signal.SIGKILL)
    time.sleep(0.2)
    assert vm.ask("status")["alive"] and not vm.ask("start", "--attempt=2")["ok"]
    assert vm.ask("stop", "--mark")["was_running"]
    status = vm.until(lambda s: not s["alive"])
    assert status["last"] == "saved" and status["stopped"]


def test_a_run_that_cannot_be_started_says_why(vm):
    (vm.home / "tanuki_jax/.venv/bin/tanuki").unlink()
    vm.ask("start", "--attempt=1")
    status = vm.until(lambda s: s["exits"])
    assert status["exits"] == {"w-0": 127} and "cannot be started: No such file" in status["message"]


def test_a_run_is_not_given_other_code_or_taken_for_one_of_other_settings(vm):
    vm.do("wait")
    vm.ask("install")
    vm.ask("start", "--attempt=1")
    before = vm.until(lambda s: s["alive"] and (vm.workdir / "running").exists())["launch"]
    vm.launch["project"] = "commit 2"
    vm.send()
    assert "a run of other code is alive" in vm.ask("install")["error"]
    assert vm.ask("status")["launch"] == before != hashlib.sha256(vm.text).hexdigest()


def test_a_setup_may_leave_a_process_and_is_never_run_twice_at_once(vm):
    vm.launch["setup"] = "sleep 30 & echo begin >> ~/order; sleep 0.3; echo end >> ~/order"
    vm.send()
    began = time.monotonic()
    for process in [vm.command("setup") for _ in range(2)]:
        process.communicate(timeout=60)
    assert (vm.home / "order").read_text().split() == ["begin", "end"] * 2 and time.monotonic() - began < 20


def test_a_process_that_vanished_is_not_alive(vm):
    """As after a restart of the machine: nobody wrote an exit code."""
    vm.do("wait")
    vm.ask("start", "--attempt=1")
    vm.until(lambda s: s["alive"] and (vm.workdir / "running").exists())
    os.killpg(json.loads((vm.home / "tanuki_launch/current.json").read_text())["pid"], signal.SIGKILL)
    status = vm.until(lambda s: not s["alive"])
    assert status["exits"] == {} and status["here"] == 1 and status["started"] == ["w-0"]


def test_workers_share_what_they_know_in_the_workdir(tmp_path):
    first, second = (Vm(tmp_path, host).environment() for host in ("w-0", "w-1"))
    first.do("fail")
    for vm in (first, second):
        vm.ask("start", "--attempt=1")
    status = first.until(lambda s: len(s["exits"]) == 2)
    assert status["exits"] == {"w-0": 1, "w-1": 1} and status["started"] == ["w-0", "w-1"]


def test_an_installation_is_done_once_even_when_it_is_repeated_beside_itself(vm):
    twice = [vm.command("install") for _ in range(2)]
    again = [json.loads(p.communicate(timeout=60)[0].splitlines()[-1].removeprefix(worker.MARK))["again"] for p in twice]
    assert sorted(again) == [False, True]
    assert len((vm.home / "installs").read_text().splitlines()) == 1
    vm.launch["project"] = "commit 2"
    vm.send()
    (vm.home / "tanuki_jax" / "an old file").write_text("")
    assert vm.ask("install")["again"] and not (vm.home / "tanuki_jax" / "an old file").exists()


def test_what_fails_is_said_with_its_last_lines(vm):
    (vm.home / "broken").write_text("")
    answer = vm.ask("install")
    assert not answer["ok"] and answer["error"] == "the installation ended with exit code 1\nERROR: No matching distribution"
    assert vm.ask("status")["installed"] == ""
    vm.launch["setup"] = "echo mounting; false; echo never"
    vm.send()
    assert vm.ask("setup")["error"] == "the setup command ended with exit code 1\nmounting"
    answer = vm.ask("setup", "--digest=other")
    assert "nothing was copied; does ssh-agent hold the key" in answer["error"]


def test_the_setup_command_comes_before_the_workdir_is_looked_at(tmp_path):
    target = tmp_path / "mounted"
    vm = Vm(tmp_path, workdir=str(target / "run"), setup=f"mkdir '{target}'")
    assert vm.ask("setup")["ok"] and (target / "run").is_dir()
    vm = Vm(tmp_path, "w-1", workdir="/proc/run")
    assert "cannot be written" in vm.ask("setup")["error"]


def test_a_workdir_on_the_boot_disk_is_refused(tmp_path):
    """It would be deleted with the VM."""
    if tmp_path.stat().st_dev != Path("/").stat().st_dev:
        pytest.skip("temporary files are on a disk of their own here")
    vm = Vm(tmp_path, allow_boot_disk=False)
    assert "lies on the boot disk" in vm.ask("setup")["error"]


def test_only_the_user_reads_what_is_sent(tmp_path):
    """It holds keys; scp copies the mode."""
    bundle.write(tmp_path / "tanuki_launch.tar", b"{}", b"")
    assert (tmp_path / "tanuki_launch.tar").stat().st_mode & 0o777 == 0o600
    with tarfile.open(tmp_path / "tanuki_launch.tar") as tar:
        assert {member.mode for member in tar} == {0o600}


def old_python():
    """A Python before 3.11, where there is one."""
    candidates = [path for path in map(shutil.which, ("python3.8", "python3.9", "python3.10")) if path]
    candidates += [str(path) for path in sorted(Path.home().glob(".pyenv/versions/3.[89].*/bin/python3"))]
    works = (path for path in candidates if not subprocess.run([path, "-c", ""], capture_output=True).returncode)
    return next(works, None)


# In place of pip: it brings a uv that makes the environment of the tests.
PIP = """import pathlib, sys
uv = pathlib.Path(sys.argv[sys.argv.index("--target") + 1]) / "bin" / "uv"
uv.parent.mkdir(parents=True)
uv.write_text(pathlib.Path("~/uv").expanduser().read_text())
uv.chmod(0o755)
"""
UV = """#!/bin/bash
echo "$@" > ~/uv_arguments
target="${@: -1}"
mkdir -p "$target/bin"
cp ~/python "$target/bin/python"
"""


@pytest.mark.skipif(not old_python(), reason="no Python older than the project's is here")
def test_an_images_old_python_is_enough(tmp_path):
    """It cannot make the project's environment: uv brings a newer Python."""
    vm = Vm(tmp_path, python=old_python())
    library = tmp_path / "lib" / "pip"
    for path, text in {
        library / "__init__.py": "",
        library / "__main__.py": PIP,
        vm.home / "uv": UV,
        vm.home / "python": PYTHON,
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    assert vm.ask("setup")["ok"]
    answer = vm.ask("install", PYTHONPATH=str(tmp_path / "lib"))
    assert answer["ok"], answer
    target = vm.home / "tanuki_jax" / ".venv"
    assert (vm.home / "uv_arguments").read_text().split() == ["venv", "--python", "3.12", "--seed", str(target)]
    assert "--editable .[tpu]" in (vm.home / "installs").read_text()


def test_the_runs_own_sign_is_what_a_recipe_leaves(tmp_path_factory, tmp_path):
    workdir = trained(tmp_path_factory.getbasetemp())
    assert worker.is_done(workdir)
    summary = json.loads((workdir / "summary.json").read_text())
    del summary["stages"][-1]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert not worker.is_done(tmp_path) and not worker.is_done(tmp_path / "nowhere")
    assert worker._progress(workdir)[0] == len(summary["stages"]) + 1
