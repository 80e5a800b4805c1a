"""A recipe on Cloud TPU slices: create, set up, install, start detached, look, again after a preemption, delete.

`run` looks at what there is and does what is next, so it may be stopped and started again at any time, on any machine: the run
itself goes on without it.  What ends it: the recipe's own sign that every stage is done, an error that would come again, or a
cap.  Slices that are left are always named, with the command that deletes them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tanuki_jax.errors import UserError
from tanuki_jax.launch import attempts, bundle, worker
from tanuki_jax.launch.commands import Commands
from tanuki_jax.launch.gcloud import NoCapacity, Slices, State, Unavailable
from tanuki_jax.launch.settings import Settings, require

ACTIONS = {
    "run": "everything, until the recipe is done; preempted slices are asked for again",
    "create": "ask for the slices",
    "setup": "copy the committed state of this checkout to every worker, and run the setup command",
    "install": "install it on every worker",
    "start": "start the run, detached",
    "status": "how slices and run stand",
    "logs": "the end of the first worker's log",
    "stop": "tell the run to stop, which saves first; the slices stay",
    "delete": "delete the slices",
}
PATIENCE = 20  # times in a row without an answer after which the launch gives up
FAILURES = 3  # times that a worker may say that it failed
T = TypeVar("T")


class Lost(Exception):
    """The slices are not there any more."""


class Deaf(Lost):
    """Some workers of many do not answer."""


class StillRunning(UserError):
    """The launch ends, but the run may go on: its slices are never deleted."""


class Launch:
    """One launch on Cloud TPUs."""

    def __init__(self, settings: Settings, commands: Commands, sleep: Callable[[float], None] = time.sleep) -> None:
        require(settings, "name", "zone", "type")
        self.settings, self.commands, self._sleep = settings, commands, sleep
        self.slices = Slices(settings, commands)
        self._last_line = ""

    # --- the whole

    def run(self) -> None:
        """Until the recipe is done."""
        require(self.settings, "config", "workdir")
        self._check_bundle()  # before anything costs money
        if self.commands.dry_run:
            for step in (self.create, self.setup, self.install, self.start, self.status, self.delete):
                step()
            return
        done = False
        try:
            self._until_done()
            done = True
        finally:
            self._end(done, sys.exc_info()[1])
        self.say(f"done; the report is {self.settings.workdir}/report.html")

    def _until_done(self) -> None:
        """Looks at the request and does what is next; `requests` counts what may cost money."""
        requests = deaf = 0
        while True:
            state, word = self._patiently(self.slices.state)
            created = self.slices.created
            if state is State.NONE:
                if requests >= self.settings.max_attempts:
                    raise UserError(f"launch: asked for slices {requests} times (max_attempts); nothing is running")
                requests += 1
                of = f"{requests} of {self.settings.max_attempts}"
                self.say(f"asking for {self.settings.slices} x {self.settings.type} ({of})")
                try:
                    self.slices.create()
                except (NoCapacity, Unavailable) as error:
                    self.say(f"not now: {error}")
                    self._sleep(self.settings.poll)
            elif state is State.WAITING:
                self.say(f"the request is {word}")
                self._sleep(self.settings.poll)
            elif state is State.GONE:
                self.say(f"the request is {word}; deleting what is left")
                self._delete(created)
                if word == "FAILED" and self.settings.valid_until:
                    raise UserError(f"launch: the request was not granted within valid_until={self.settings.valid_until}")
            else:
                try:
                    self._train()
                    return
                except Unavailable as error:  # the slices may be well, and only not be reached from here
                    raise StillRunning(f"launch: {error}") from error
                except Lost as lost:
                    deaf = deaf + 1 if isinstance(lost, Deaf) else 0
                    if deaf >= FAILURES:
                        raise UserError(f"launch: {lost}, on {deaf} requests in a row; does `setup` end?") from lost
                    self.say(f"{lost}; deleting what is left")
                    self._delete(created)

    def _train(self) -> None:
        """On slices that are there: prepares and starts what is not, and watches until the recipe is done."""
        status, changed = self._attach()
        watched = 0  # the attempt that was seen alive, or was started
        restarts, progress = 0, status.get("progress")  # restarts since something was saved
        silent = ended = 0  # looks without an answer; looks since a first worker has ended
        while not (attempts.is_finished(status) and (status["attempt"] == watched or not changed)):
            silent, ended = (0 if status else silent + 1), (ended + 1 if status.get("exits") else 0)
            if silent == FAILURES:  # machines that were replaced know nothing
                self._prepare()
            if silent > PATIENCE:
                raise StillRunning(
                    f"launch: the slices are there, but no worker answered for {silent} looks; the run may go on"
                )
            if status and attempts.is_over(status, ended, self.workers):
                attempt, here = status["attempt"], status["attempt"] == status["here"]
                if 0 < attempt == watched and here:
                    attempts.check_end(status, self.settings.workdir)
                    restarts = restarts + 1 if status["progress"] == progress else 1
                    if restarts > self.settings.max_restarts:
                        raise UserError(
                            f"launch: {restarts - 1} restarts without a new checkpoint; {attempts.describe_end(status)}"
                        )
                    self.say(f"the run ended ({attempts.describe_end(status)}); starting it again")
                watched, progress, ended = attempt + 1, status["progress"], 0
                self._start(watched, stop=attempt > 0 and here)
            elif status:
                watched = watched or (0 if status["exits"] else status["attempt"])
                self.say(f"attempt {status['attempt']}: {status['last']}")
            self._sleep(self.settings.poll)
            self._check_nodes()
            status = self._look()

    def _attach(self) -> tuple[dict[str, Any], bool]:
        """The state of the run on slices that are there, and whether they had to be prepared for these settings and code."""
        for number in range(FAILURES):
            if number:
                self._sleep(self.settings.poll)
            self._check_nodes()
            status = self._look()
            if status:
                break
        alive = StillRunning("launch: a run with other settings or code is alive; end it first: tanuki launch tpu stop")
        changed = status.get("launch") != self._digest or status.get("installed") != self._project
        if changed:
            if status.get("alive"):
                raise alive
            self._prepare()
            status = self._look()
            if status.get("alive") and status["launch"] != self._digest:
                raise alive
        return status, changed

    def _start(self, attempt: int, stop: bool) -> None:
        """Starts an attempt on every worker; one that lacks the project, since it was replaced, gets it."""
        for _ in range(FAILURES):
            try:
                if stop:
                    self._every("stop", tries=FAILURES, seconds=worker.STOP_SECONDS + 60)
                self._every(f"start --attempt={attempt}", tries=FAILURES)
                return
            except Unavailable as error:
                self.say(str(error))
                self._prepare()
        raise Lost("some workers do not start")

    def _prepare(self) -> None:
        """Sets up and installs; anew where a machine is replaced in between."""
        for number in range(1, FAILURES + 1):
            self.say("setting up every worker")
            self.setup(PATIENCE)
            self.say("installing on every worker")
            try:
                self.install(FAILURES)
                return
            except Unavailable as error:
                if number == FAILURES:
                    raise
                self.say(str(error))

    # --- the steps

    def create(self) -> None:
        """Asks for the slices."""
        try:
            self.slices.create()
        except (NoCapacity, Unavailable) as error:
            raise UserError(f"launch: not now: {error}") from error

    def setup(self, tries: int = 1) -> None:
        """Copies the project and the settings to every worker, and runs the setup command there."""
        require(self.settings, "config", "workdir")
        self._check_bundle()
        if self.commands.dry_run:
            print(bundle.explain(self.settings))
        there = "if [ -e tanuki_launch.tar ]; then tar -xf tanuki_launch.tar -C tanuki_launch; rm tanuki_launch.tar; fi"
        unpack = f"mkdir -p -m 700 tanuki_launch; {there}"
        with tempfile.TemporaryDirectory() as directory:  # which nobody else may read: there may be keys in the environment
            path = Path(directory) / "tanuki_launch.tar"
            if not self.commands.dry_run:
                bundle.write(path, self._launch_json, self._archive)
            self._every(f"setup --digest={self._digest}", unpack, tries, 1800, first=lambda: self.slices.copy(str(path)))

    def _check_bundle(self) -> None:
        bundle.check_config(self.settings)
        _ = self._launch_json  # an error where a variable is missing
        if count := bundle.uncommitted():
            self.say(f"{count} files of this checkout are not committed; the workers get the committed state")

    def install(self, tries: int = 1) -> None:
        """Installs the project on every worker."""
        self._every("install", tries=tries, seconds=3600)

    def start(self) -> None:
        """Starts the run detached."""
        status = {} if self.commands.dry_run else self._look()
        if not status and not self.commands.dry_run:
            raise UserError("launch: no worker answers what was started before; `setup` and `install` come first")
        self._every(f"start --attempt={status.get('attempt', 0) + 1}")

    def status(self) -> None:
        """Prints how slices and run stand."""
        state, word = self.slices.state()
        if self.commands.dry_run:
            self.slices.node_states()
            self.slices.ask(_remote("status"), everywhere=False)
            return
        print(f"{self.settings.name}: {word} ({state.value})")
        if state is State.ACTIVE:
            nodes, status = self.slices.node_states(), self._look()
            print(f"nodes: {', '.join(f'{name} {node[1]}' for name, node in nodes.items())}")
            started = (
                f"attempt {status['attempt']}, {len(status['started'])} workers" if status.get("attempt") else "not started"
            )
            exits = ", ".join(f"{host} {code}" for host, code in sorted(status.get("exits", {}).items()))
            print(f"run: {'done' if status.get('done') else started}{f'; exit codes: {exits}' if exits else ''}")
            print(status.get("last", ""))

    def logs(self) -> None:
        """Prints the end of the first worker's log."""
        print(self.slices.ask(_remote("logs --lines=200"), everywhere=False).text)

    def stop(self) -> None:
        """Tells the run to stop and waits until it has saved."""
        self._every("stop --mark", seconds=worker.STOP_SECONDS + 60)

    def delete(self) -> None:
        """Deletes the slices."""
        there = self.slices.delete()
        if not self.commands.dry_run:
            self.say(f"{'deleted' if there else 'there is no'} {self.settings.name} in {self.settings.zone}")

    # --- what the steps share

    @property
    def workers(self) -> int:
        """Workers of all slices."""
        return self.slices.topology.machines * self.settings.slices

    def say(self, text: str) -> None:
        """A line for whoever watches; the same one is not repeated."""
        if text != self._last_line:
            print(f"launch: {text}", file=sys.stderr, flush=True)
            self._last_line = text

    @functools.cached_property
    def _launch_json(self) -> bytes:
        return bundle.launch_json(self.settings)

    @functools.cached_property
    def _archive(self) -> bytes:
        return bundle.archive()

    @property
    def _digest(self) -> str:
        return hashlib.sha256(self._launch_json).hexdigest()

    @property
    def _project(self) -> str:
        return str(json.loads(self._launch_json)["project"])

    def _every(
        self,
        action: str,
        before: str = "",
        tries: int = 1,
        seconds: float = 600.0,
        first: Callable[[], object] | None = None,
    ) -> None:
        """An action of every worker, which may be repeated, until each has done it.

        Args:
          action: of worker.py, with its flags.
          before: a shell command ahead of it.
          tries: until each worker has been heard; one that says that it failed is asked FAILURES times.
          seconds: limit of each try.
          first: is called before each try.

        Raises UserError where a worker keeps failing, Unavailable where none or, after a few tries, one is not heard, Lost
        where the slices are gone or some of many workers are deaf.
        """
        done: set[str] = set()
        failures: Counter[str] = Counter()
        for number in range(1, tries + 1):
            if first:
                first()
            answers = self.slices.ask(_remote(action, before), seconds=seconds)
            done |= answers.by_host.keys() - answers.errors.keys()
            failed = {host: error for host, error in answers.errors.items() if host not in done}
            failures.update(failed.keys())
            missing = answers.expected - len(done | failed.keys())
            if not failed and missing <= 0:
                return
            often = {host: error for host, error in failed.items() if failures[host] >= min(tries, FAILURES)}
            if often:
                host, error = min(often.items())
                others = f" and {len(often) - 1} more workers" if len(often) > 1 else ""
                raise UserError(f"launch: {action.split()[0]} on {host}{others}: {error}")
            if number < tries:
                self.say(next(iter(failed.values()), f"{missing} of {answers.expected} workers did not answer"))
                self._sleep(self.settings.poll)
                self._check_nodes()
        if done and tries == PATIENCE:  # others were reached, so it is not for the way to them
            raise Deaf(f"{missing} of {answers.expected} workers do not answer")
        hint = "is the key in ssh-agent (ssh-add ~/.ssh/google_compute_engine)?"
        raise Unavailable(f"{missing} of {answers.expected} workers did not answer; {hint}\n{answers.text[-2000:]}")

    def _look(self) -> dict[str, Any]:
        """The first worker's answer, or else any other's, for all see the workdir; empty where there is none."""
        for everywhere in (False, True):
            answers = self.slices.ask(_remote("status"), everywhere)
            for _, answer in sorted(answers.by_host.items()):
                if answer["ok"]:
                    return answer
        return {}

    def _check_nodes(self) -> None:
        """Lost where the request or one of its slices is not there any more; waits for one that is being repaired."""
        while True:
            state, word = self._patiently(self.slices.state)
            if state in (State.NONE, State.GONE) or word == "DELETING":
                raise Lost(f"the request is {word}")
            nodes = self._patiently(self.slices.node_states)
            lost = [f"{name} {word}" for name, (node, word) in nodes.items() if node is State.GONE]
            if lost:
                raise Lost(f"not there: {', '.join(lost)}")
            if state is State.ACTIVE and all(node is State.ACTIVE for node, _ in nodes.values()):
                return
            self.say(f"the request is {word}; nodes: {', '.join(f'{name} {node[1]}' for name, node in nodes.items())}")
            self._sleep(self.settings.poll)

    def _delete(self, created: str) -> None:
        """Deletes the request that was made then, no other of its name, and waits until there is nothing left."""
        for _ in range(PATIENCE):
            try:
                for _ in range(2):
                    state, word = self.slices.state()
                    if state is State.NONE or self.slices.created != created:
                        return
                    if word == "DELETING" or not self.slices.delete():
                        break
            except Unavailable as error:
                self.say(f"deleting: {error}")
            self._sleep(self.settings.poll)
        raise UserError("launch: the slices could not be deleted")

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Asks again while the platform does not answer: that says nothing about the slices."""
        for left in reversed(range(PATIENCE)):
            try:
                return ask()
            except Unavailable as error:
                if not left:
                    raise UserError(f"launch: the platform does not answer: {error}") from error
                self.say(f"no answer: {error}")
                self._sleep(self.settings.poll)
        raise AssertionError

    def _end(self, done: bool, error: BaseException | None) -> None:
        """At the end of `run`: deletes the slices where that is asked for, and says what is left."""
        keys = ("name", "zone", "type", "project") if self.settings.queued else ("name", "zone", "type", "project", "queued")
        flags = {key: getattr(self.settings, key) for key in keys}
        words = (f"--{key}={str(value).lower()}" for key, value in flags.items() if value != "")
        command = f"tanuki launch tpu delete {' '.join(words)}"
        interrupted = isinstance(error, KeyboardInterrupt)
        going_on = interrupted or isinstance(error, StillRunning)
        try:
            if not going_on and (self.settings.delete == "always" or (done and self.settings.delete == "done")):
                self._delete(self.slices.created)
            state, word = self.slices.state()
        except (Unavailable, UserError) as unknown:
            self.say(f"slices may be left, and cost money: {unknown}; look, and delete them: {command}")
            return
        if state is not State.NONE:
            going = "the run goes on there, and the same command watches it again; " if interrupted else ""
            self.say(f"the slices are left ({word}) and cost money; {going}they are deleted by: {command}")


def _remote(action: str, before: str = "") -> str:
    return f"{before + ' && ' if before else ''}python3 tanuki_launch/worker.py {action}"


def launch(action: str, settings: Settings, commands: Commands) -> None:
    """Does an action; one that needs slices is an error where there are none."""
    steps = Launch(settings, commands)
    try:
        needed = action in ("setup", "install", "start", "logs", "stop") and not commands.dry_run
        if needed and steps.slices.state()[0] is State.NONE:
            raise UserError(f"launch: there is no {settings.name} in {settings.zone}; `run` or `create` asks for slices")
        getattr(steps, action)()
    except Unavailable as error:
        raise UserError(f"launch: {error}") from error
