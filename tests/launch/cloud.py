"""A Cloud TPU platform that is as unkind as the real one, behind the command line of gcloud, on a clock of its own.

What it does was read in the SDK's source (578) or seen on the platform: ssh to many workers returns 0 whatever became of
them; a copy without a key in ssh-agent copies nothing; commands whose connection breaks are repeated; a request may be granted
although its answer was lost; states lag; deleting takes a while.
"""

import hashlib
import io
import json
import random
import shlex
import tarfile
from collections import Counter
from dataclasses import dataclass, field

from tanuki_jax import slices
from tanuki_jax.launch.commands import Commands, Completed
from tanuki_jax.launch.worker import MARK

TRACEBACK = "Traceback (most recent call last):\n  ...\nAttributeError: 'NoneType' object has no attribute 'ip_address'"
REPAIRS = {"REPAIRING", "RESTARTING", "A_NEW_WORD"}  # states of a machine that comes back
KEY = "WARNING: Cannot retrieve keys in ssh-agent. Command may stall."


@dataclass
class Run:
    """What the workers share: the workdir, and how many steps the recipe needs."""

    steps: int = 10
    step: int = 0
    saved: int = 0
    attempts: dict = field(default_factory=dict)  # number -> {"started": set of hosts, "exits": {host: code}}
    finished: bool = False  # summary.json lists every stage


@dataclass
class Worker:
    """A VM: what lies on its disk, and the process that runs."""

    host: str
    bundle: dict = field(default_factory=dict)
    installed: str = ""
    here: int = 0
    alive: bool = False
    running: str = ""  # digest of the settings of the run


class Cloud(Commands):
    """One request for slices at a time.  `chaos` maps names of events to their probability at each command."""

    def __init__(self, seed: int = 0, run: Run | None = None, kind: str = "v5p-16", count: int = 1, **chaos: float) -> None:
        super().__init__()
        self.random, self.chaos, self.run_state = random.Random(seed), chaos, run or Run()
        self.machines, self.count = slices.parse(kind).machines, count
        self.time, self.log, self.counts = 0.0, [], Counter()
        self.state, self.nodes, self.workers, self.created = "", {}, [], ""
        self.name = ""

    # --- time

    def sleep(self, seconds: float) -> None:
        """A minute or so in which the platform and the run go on."""
        self.time += seconds
        assert self.time < 5e6, "the launch never ends"
        order = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
        if self.state in order[:2]:
            self.state = "FAILED" if self.happens("fails") else order[order.index(self.state) + 1]
            if self.state == "ACTIVE":
                self._boot()
        elif self.state == "DELETING":
            self.state, self.nodes = "", {}
        elif self.state in ("ACTIVE", "READY"):
            self._events()
        elif self.state == "SUSPENDING":
            self.state = "SUSPENDED"
        self._train()

    def happens(self, event: str) -> bool:
        """Draws whether an event of the chaos happens now."""
        if self.random.random() < self.chaos.get(event, 0.0):
            self.counts[event] += 1
            return True
        return False

    def _boot(self) -> None:
        names = [f"{self.name}-{n}" for n in range(self.count)] if self.count > 1 else [self.name]
        self.nodes = dict.fromkeys(names, "READY")
        self.workers = [Worker(f"{name}-w-{n}") for name in names for n in range(self.machines)]

    def _events(self) -> None:
        if self.happens("preempted"):
            self._end_all(lost=True)
            self.nodes = dict.fromkeys(self.nodes, "PREEMPTED")
            if self.state == "ACTIVE":  # of a request, which may say so for long
                self.state = self.random.choice(["SUSPENDING", "ACTIVE"])
        elif self.happens("node_lost"):
            name = self.random.choice(list(self.nodes))
            self._end_all(lost=True)
            self.nodes[name] = self.random.choice(["PREEMPTED", "TERMINATED"])
        elif set(self.nodes.values()) & REPAIRS:
            self.nodes = {name: "READY" if state in REPAIRS else state for name, state in self.nodes.items()}
        elif self.happens("repaired"):
            name = self.random.choice(list(self.nodes))
            self.nodes[name] = self.random.choice(sorted(REPAIRS))
            self._end_all(lost=True)
        elif self.happens("reboot"):
            worker = self.random.choice(self.workers)
            worker.alive = False  # without an exit code
            self._end_all(134, but=worker)
        elif self.happens("replaced"):
            index = self.random.randrange(len(self.workers))
            self.workers[index] = Worker(self.workers[index].host)
            self._end_all(134, but=self.workers[index])

    def _end_all(self, code: int = 134, lost: bool = False, but: Worker | None = None) -> None:
        for worker in self.workers:
            if worker.alive and worker is not but:
                worker.alive = False
                if not lost:
                    self.run_state.attempts[worker.here]["exits"][worker.host] = code
        self.run_state.step = self.run_state.saved

    def _train(self) -> None:
        run = self.run_state
        alive = [worker for worker in self.workers if worker.alive]
        if not alive:
            return
        if len(alive) < len(self.workers) or len({worker.here for worker in alive}) > 1:
            self._end_all(77)  # the others do not come
        elif self.happens("killed"):
            self._end_all(137)
        elif self.happens("stopped"):
            run.saved = run.step
            self._end_all(75)
        elif self.happens("bad_input"):
            self._end_all(1)
        else:
            run.step += 1
            if run.step % 2 == 0:
                run.saved = run.step
            if run.step >= run.steps:
                run.finished = True
                self._end_all(0)

    # --- gcloud

    def run(self, words, text="", seconds=300.0):
        """What gcloud would print for these words."""
        self.log.append(list(words))
        words = [word for word in words if word != "alpha"]
        assert words[:3] == ["gcloud", "compute", "tpus"], words
        noun, verb = words[3:5]
        self.counts[verb] += 1
        if verb not in ("ssh", "scp") and self.happens("api_error"):
            return Completed(
                1, "", f"ERROR: (gcloud.compute.tpus.{noun}.{verb}) UNAVAILABLE: The service is currently unavailable."
            )
        if verb == "list":
            if self.happens("partial_list"):  # a zone that did not answer is left out of the list, with exit code 0
                return Completed(0, "[]")
            nodes = [{"name": f"projects/p/locations/z/nodes/{name}", "state": state} for name, state in self.nodes.items()]
            return Completed(0, json.dumps([*nodes, {"name": "projects/p/locations/z/nodes/others", "state": "READY"}]))
        return getattr(self, f"_{verb}")(noun, words[5:])

    def _create(self, noun, words):
        if self.state:
            return Completed(1, "", f"ERROR: (gcloud.compute.tpus.{noun}.create) ALREADY_EXISTS: Resource already exists.")
        if self.happens("quota"):
            return Completed(1, "", "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPodPerProjectPerZone' has been exceeded.")
        if self.happens("stockout"):
            return Completed(1, "", 'ERROR: {"code": 8, "message": "There is no more capacity in the zone \\"us-east5-a\\"."}')
        self.counts["granted"] += 1
        self.created = f"time {self.counts['granted']}"
        self.name, self.state = words[0], "WAITING_FOR_RESOURCES" if noun == "queued-resources" else "READY"
        if self.state == "READY":
            self._boot()
        if self.happens("answer_lost"):
            return Completed(1, "", "ERROR: gcloud crashed (ConnectionError): Connection aborted.")
        return Completed(0)

    def _describe(self, noun, words):
        if noun == "tpu-vm" and words[0] in self.nodes:
            return Completed(0, json.dumps({"state": self.nodes[words[0]], "createTime": self.created}))
        if not self.state or words[0] != self.name:
            return Completed(1, "", f"ERROR: (gcloud.compute.tpus.{noun}.describe) NOT_FOUND: Resource was not found.")
        return Completed(0, json.dumps({"state": {"state": self.state}, "createTime": self.created}))

    def _delete(self, noun, words):
        if not self.state:
            return Completed(1, "", f"ERROR: (gcloud.compute.tpus.{noun}.delete) NOT_FOUND: Resource was not found.")
        self._end_all(lost=True)
        self.state, self.workers = "DELETING", []
        self.nodes = dict.fromkeys(self.nodes, "DELETING")
        return Completed(0)

    def _scp(self, noun, words):
        if self.happens("no_key"):
            return Completed(0, "", KEY)
        path = words[0]
        for worker in self._reached("all"):
            with tarfile.open(path) as tar:
                worker.bundle["sent"] = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        return Completed(0)

    def _ssh(self, noun, words):
        [command] = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
        [where] = [word.removeprefix("--worker=") for word in words if word.startswith("--worker=")]
        if self.happens("ssh_lost"):
            return Completed(255, "", "ERROR: (gcloud.compute.tpus.ssh) [/usr/bin/ssh] exited with return code [255].")
        out, err = [], []
        workers = self._reached(where)
        if len(workers) < (len(self.workers) if where == "all" else 1):
            err.append(TRACEBACK)
        for worker in workers:
            if self.happens("hangs"):
                continue  # the command is ended at its time limit
            for _ in range(2 if self.happens("repeated") else 1):
                out += self._execute(worker, command)
        return Completed(0, "\n".join(out), "\n".join(err))

    def _reached(self, where):
        ready = {name for name, state in self.nodes.items() if state == "READY"}
        workers = self.workers if where == "all" else self.workers[:1]
        return [w for w in workers if w.host.rpartition("-w-")[0] in ready and not self.happens("unreachable")]

    # --- worker.py, in short

    def _execute(self, worker, command):
        before, _, last = command.rpartition(" && ")
        words = shlex.split(last)
        assert words[:2] == ["python3", "tanuki_launch/worker.py"], command
        if before and "sent" in worker.bundle:
            worker.bundle["there"] = worker.bundle.pop("sent")
        files = worker.bundle.get("there")
        if not files:
            return ["python3: can't open file 'tanuki_launch/worker.py': [Errno 2] No such file or directory"]
        flags = dict((word.removeprefix("--").split("=", 1) + [True])[:2] for word in words[3:])
        answer = {"host": worker.host, "action": words[2], "ok": True}
        answer |= getattr(self, f"_do_{words[2]}")(worker, json.loads(files["launch.json"]), files, **flags)
        return ["a line of the run's own", MARK + json.dumps(answer)]

    def _do_setup(self, worker, launch, files, digest):
        if self.happens("setup_hangs"):
            return {"ok": False, "error": "the setup command did not end in 1200 s"}
        if hashlib.sha256(files["launch.json"]).hexdigest() != digest:
            return {"ok": False, "error": "another launch.json is here"}
        return {}

    def _do_install(self, worker, launch, files):
        if self.happens("install_fails"):
            return {"ok": False, "error": "the installation ended with exit code 1\nERROR: no matching distribution"}
        if worker.alive and worker.installed != launch["project"]:
            return {"ok": False, "error": "a run of other code is alive here; `stop` ends it"}
        assert tarfile.open(fileobj=io.BytesIO(files["tanuki_jax.tar.gz"])).getnames()
        worker.installed = launch["project"]
        return {}

    def _do_start(self, worker, launch, files, attempt):
        attempt = int(attempt)
        if worker.here == attempt:
            return {}
        if worker.alive:
            return {"ok": False, "error": f"attempt {worker.here} still runs here"}
        assert worker.installed == launch["project"], "started without the project"
        entry = self.run_state.attempts.setdefault(attempt, {"started": set(), "exits": {}})
        entry["started"].add(worker.host)
        worker.here, worker.alive = attempt, True
        worker.running = hashlib.sha256(files["launch.json"]).hexdigest()
        self.run_state.finished = False
        return {}

    def _do_status(self, worker, launch, files):
        run = self.run_state
        newest = max(run.attempts, default=0)
        entry = run.attempts.get(newest, {"started": set(), "exits": {}})
        return {
            "attempt": newest,
            "exits": dict(entry["exits"]),
            "started": sorted(entry["started"]),
            "done": run.finished,
            "alive": worker.alive,
            "here": worker.here,
            "installed": worker.installed,
            "launch": worker.running if worker.alive else hashlib.sha256(files["launch.json"]).hexdigest(),
            "stopped": entry.get("stopped", False),
            "progress": run.saved,
            "last": f"step {run.step}",
            "message": "tanuki: config: no such file" if 1 in entry["exits"].values() else "",
        }

    def _do_stop(self, worker, launch, files, mark=False):
        was = worker.alive
        if mark and worker.here:
            self.run_state.attempts[worker.here]["stopped"] = True
        if was:
            worker.alive = False
            self.run_state.attempts[worker.here]["exits"][worker.host] = 75
        return {"was_running": was}

    def _do_logs(self, worker, launch, files, lines):
        return {}
