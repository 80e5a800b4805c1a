"""A Slurm of its own on loopback: Debian's packages, unpacked into a temporary folder; nothing is installed."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
VERSION = "22.05"  # with which a failure to start is a fault; another version may want another configuration
CONFIG = """
ClusterName=tanuki
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
PluginDir={plugins}
PlugStackConfig={folder}/plugstack.conf
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=60
ReturnToService=2
MinJobAge=3600
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Slurm:
    """Commands of a running cluster; `environ` is what they need."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ

    def call(self, *words: str) -> str:
        done = subprocess.run(words, env=os.environ | self.environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says about a job."""
        words = self.call("scontrol", "show", "--oneliner", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 90) -> dict[str, str]:
        """Waits until a job has one of the states."""
        limit = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < limit and job["JobState"] not in ENDED, job
            time.sleep(0.2)
        return job


@contextlib.contextmanager
def start_slurm() -> Iterator[Slurm]:
    """A cluster of one node with 8 CPUs (on paper) and no GPU; skips the test where there can be no Slurm."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short, for names of sockets have at most 108 bytes
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        environ, programs = _unpack(folder)
        environ["SLURM_CONF"] = str(folder / "slurm.conf")
        slurm = Slurm(environ)
        _configure(folder, programs)
        for words in (
            [programs["munged"], "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
            + [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")],
            [programs["slurmctld"], "-D", "-i"],
            [programs["slurmd"], "-D", "-N", "localhost", "-d", programs["slurmstepd"]],
        ):
            with (folder / "daemons.log").open("ab") as log:
                daemons.append(subprocess.Popen(words, env=os.environ | environ, stdout=log, stderr=log))
            if len(daemons) == 1:
                _wait_for((folder / "munge.socket").exists, slurm)
        _wait_for(lambda: slurm.call("sinfo", "--noheader", "--format=%T").split() == ["idle"], slurm)
        yield slurm
        slurm.call("scancel", f"--user={getpass.getuser()}")
        _wait_for(lambda: not slurm.call("squeue", "--noheader"), slurm)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()
            daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The environment in which Slurm's programs run, and the paths of its daemons."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        pytest.skip("no Debian: apt-get and dpkg are needed to fetch Slurm")
    for name in ("lists", "archives"):
        (folder / name / "partial").mkdir(parents=True)
    options = {
        "Dir::State::lists": folder / "lists",
        "Dir::Cache::archives": folder / "archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Debug::NoLocking": 1,
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", "--quiet", *(f"-o{name}={value}" for name, value in options.items())]
    install = ["--yes", "--no-install-recommends", "--download-only", "--reinstall", "install", *PACKAGES]
    for words in (["update"], install):
        done = subprocess.run([*apt, *words], capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"Slurm's packages cannot be fetched: {done.stderr.strip()[-300:]}")
    root = folder / "root"
    for package in sorted((folder / "archives").glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    libraries = [str(path) for path in root.glob("usr/lib/*") if path.is_dir()]
    plugins = [str(path.parent) for path in root.rglob("auth_munge.so")]
    environ = {
        "PATH": f"{root}/usr/bin:{root}/usr/sbin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join([*libraries, *plugins]),
    }
    programs = {name: str(root / f"usr/sbin/{name}-wlm") for name in ("slurmctld", "slurmd", "slurmstepd")}
    return environ, programs | {"munged": str(root / "usr/sbin/munged"), "plugins": plugins[0]}


def _configure(folder: Path, programs: dict[str, str]) -> None:
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "state").mkdir()
    (folder / "plugstack.conf").touch()
    values = dict(folder=folder, user=getpass.getuser(), host=socket.gethostname().split(".")[0], plugins=programs["plugins"])
    ports = dict(zip(("controller_port", "node_port"), _free_ports(2), strict=True))
    (folder / "slurm.conf").write_text(CONFIG.format(**values, **ports))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _wait_for(reached: Callable[[], bool], slurm: Slurm, seconds: float = 60) -> None:
    folder = Path(slurm.environ["SLURM_CONF"]).parent
    limit = time.monotonic() + seconds
    while True:
        with contextlib.suppress(AssertionError):  # the controller does not answer yet
            if reached():
                return
        logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log")))
        if time.monotonic() > limit:
            version = subprocess.run(
                ["sbatch", "--version"], env=os.environ | slurm.environ, capture_output=True, text=True
            ).stdout.strip()
            (pytest.fail if VERSION in version else pytest.skip)(f"{version} does not start or stop here:\n{logs}")
        time.sleep(0.2)
