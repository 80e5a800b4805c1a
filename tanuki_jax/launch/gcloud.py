"""Cloud TPU slices through gcloud: what there is, asking for more, reaching every worker, deleting.

Verified against the source of the Google Cloud SDK 578 (surface/compute/tpus, command_lib/compute/tpus).  What it taught:
an error of `describe` says nothing about slices unless it is NOT_FOUND; `ssh` to many workers may end with 0 although none was
reached, so every answer is counted; it runs at most 64 at once and repeats what broke, so nothing that it starts is long and
everything may be repeated; spot alone is asked for by the GA verbs, for the alpha ones add the model `standard` to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tanuki_jax import slices
from tanuki_jax.errors import UserError
from tanuki_jax.launch.commands import Commands, Completed
from tanuki_jax.launch.settings import Settings
from tanuki_jax.launch.worker import MARK

# Parts of messages.  What is none of these and no refusal either is worth another try.
QUOTA = ("quota",)
NO_CAPACITY = ("no more capacity", "stockout", "not enough resources", "does not have enough resources", "lack of capacity")
REFUSED = (
    "PERMISSION_DENIED",
    "INVALID_ARGUMENT",
    "UNAUTHENTICATED",
    "FAILED_PRECONDITION",
    "NOT_FOUND",
    "unrecognized arguments",
    "Invalid value",
    "argument --",
    "Reauthentication",
    "do not currently have an active account",
)
ALPHA_MODELS = ("reservation-bound", "flex-start")


class State(Enum):
    """Of a request for slices, as the launcher sees it."""

    NONE = "there is none"
    WAITING = "it waits"
    ACTIVE = "its slices are there"
    GONE = "its slices are gone, or will never come"


# Words of requests and of nodes.  One that is none of these says nothing: slices are not deleted for it.
WORDS = {
    **dict.fromkeys(("ACTIVE", "READY"), State.ACTIVE),
    **dict.fromkeys(("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "DELETING"), State.WAITING),
    **dict.fromkeys(("STARTING", "RESTARTING", "REIMAGING", "REPAIRING", "UNHIDING"), State.WAITING),
    **dict.fromkeys(("FAILED", "SUSPENDING", "SUSPENDED", "PREEMPTED", "TERMINATED"), State.GONE),
    **dict.fromkeys(("STOPPING", "STOPPED", "HIDING", "HIDDEN"), State.GONE),
}


class Unavailable(Exception):
    """The platform did not answer, or not now; nothing is known of what was asked."""


class NoCapacity(Exception):
    """There are no such slices at the moment."""


@dataclass(frozen=True)
class Answers:
    """What the workers said, by host; `expected` of them were asked."""

    by_host: Mapping[str, dict[str, Any]]
    expected: int
    text: str  # what gcloud printed besides

    @property
    def missing(self) -> int:
        """Workers that were not heard."""
        return self.expected - len(self.by_host)

    @property
    def errors(self) -> dict[str, str]:
        """Of the workers that failed, what they said."""
        return {host: answer["error"] for host, answer in self.by_host.items() if not answer["ok"]}


class Slices:
    """The slices of one launch: a queued resource, or a single TPU VM that is created at once."""

    def __init__(self, settings: Settings, commands: Commands) -> None:
        self.settings, self.commands = settings, commands
        self.topology = slices.parse(settings.type, "launch: type")
        if self.topology.slices > 1:
            raise UserError(f"launch: type is {settings.type!r}; name one slice there, and set slices={self.topology.slices}")
        self.noun = "queued-resources" if settings.queued else "tpu-vm"
        self.created = ""  # when the request that `state` last saw was made: another one of its name is not the same
        if not self.topology.accelerator_type:
            raise UserError(f"launch: {settings.type} has no Cloud TPU API; use tanuki launch gke")
        if not settings.queued and settings.slices > 1:
            raise UserError("launch: several slices are asked for together: queued must be true")
        if not settings.queued and settings.provisioning_model in ALPHA_MODELS:
            raise UserError(f"launch: provisioning_model {settings.provisioning_model} needs queued = true")
        if settings.provisioning_model == "flex-start" and not settings.max_run_duration:
            raise UserError("launch: flex-start needs max_run_duration, how long the slices are needed: 24h say")
        if settings.reservation and settings.provisioning_model not in ("reserved", "reservation-bound"):
            raise UserError("launch: reservation needs provisioning_model reserved or reservation-bound")
        if settings.reservation and not settings.queued:
            raise UserError("launch: a reservation is named in queued requests alone; set queued=true")
        if settings.provisioning_model == "reservation-bound" and not settings.reservation:
            raise UserError("launch: reservation-bound needs reservation, the name of the calendar reservation")

    # --- the request

    def create_words(self) -> list[str]:
        """The command that asks for the slices."""
        s = self.settings
        model = s.provisioning_model
        alpha = s.queued and (model in ALPHA_MODELS or bool(s.reservation))
        node = [f"--node-count={s.slices}", f"--node-prefix={s.name}"] if s.slices > 1 else [f"--node-id={s.name}"]
        runtime = s.runtime or self.topology.generation.runtime
        words = [*self._words("create", alpha), f"--accelerator-type={self.topology.accelerator_type}"]
        words += [f"--runtime-version={runtime}", *node] if s.queued else [f"--version={runtime}"]
        if model in ALPHA_MODELS:
            words.append(f"--provisioning-model={model}")
        elif model != "standard":
            words.append(f"--{model}")
        optional = {
            "reservation": s.reservation if s.queued else "",
            "max-run-duration": s.max_run_duration if model == "flex-start" else "",
            "valid-until-duration": s.valid_until if s.queued else "",
            "network": s.network,
            "subnetwork": s.subnetwork,
            "service-account": s.service_account,
        }
        words += [f"--{name}={value}" for name, value in optional.items() if value]
        return [*words, *(["--internal-ips"] if s.internal_ips else [])]

    def create(self) -> None:
        """Asks for the slices; an error where the platform refuses, NoCapacity or Unavailable where it may be asked again."""
        done = self.commands.run(self.create_words(), seconds=1800)
        if not done.code or "ALREADY_EXISTS" in done.err:
            return
        if any(sign in done.err for sign in NO_CAPACITY):
            raise NoCapacity(done.last_line)
        if any(sign in done.err.lower() for sign in QUOTA) and "per minute" not in done.err.lower():
            raise UserError(
                f"launch: the quota of {self.settings.zone} is not enough for {self.settings.type}: {done.err.strip()}"
            )
        _refuse(done)
        raise Unavailable(done.last_line)

    def state(self) -> tuple[State, str]:
        """What there is, and the platform's own word for it."""
        done = self.commands.run([*self._words("describe"), "--format=json"])
        if done.code:
            if "NOT_FOUND" in done.err:
                return State.NONE, "NOT_FOUND"
            _refuse(done)
            raise Unavailable(done.last_line)
        if self.commands.dry_run:
            return State.ACTIVE, "ACTIVE"
        described = _json(done)
        try:
            word = described["state"]["state"] if self.settings.queued else described["state"]
            self.created = str(described.get("createTime", ""))
            self._check_same(described)
        except (KeyError, TypeError, AttributeError) as error:
            raise Unavailable(f"`describe` gave no state: {done.out[:200]!r}") from error
        return _state(word), word

    def _check_same(self, described: dict[str, Any]) -> None:
        """An error where the request of this name is for other slices than the settings."""
        specs = described.get("tpu", {}).get("nodeSpec", []) if self.settings.queued else [{"node": described}]
        counts = [spec.get("multisliceParams", {}).get("nodeCount", 0) for spec in specs]
        count, ours = max([len(specs), *counts]), (self.settings.slices, self.topology.accelerator_type)
        kinds = {spec.get("node", {}).get("acceleratorType") for spec in specs} - {None}
        theirs = count, next(iter(kinds), ours[1])
        if specs and theirs != ours:
            difference, name = f"{theirs[0]} x {theirs[1]}, the settings say {ours[0]} x {ours[1]}", self.settings.name
            raise UserError(f"launch: {name} is there with {difference}; take another name, or delete it first")

    def node_states(self) -> dict[str, tuple[State, str]]:
        """Of each slice its state.  What the list lacks, or says is gone, is asked for by its name: a list may be partial."""
        done = self.commands.run([*self._group("tpu-vm"), "list", *self._where(), "--format=json"])
        if done.code:
            _refuse(done)
            raise Unavailable(done.last_line)
        if self.commands.dry_run:
            return {}
        several = [f"{self.settings.name}-{n}" for n in range(self.settings.slices)]
        listed = {node["name"].rpartition("/")[2]: node.get("state", "?") for node in _json(done)}
        result = {}
        for name in several if self.settings.slices > 1 else [self.settings.name]:
            word = listed.get(name, "?")
            if WORDS.get(word) not in (State.ACTIVE, State.WAITING) or word == "DELETING":
                word = self._describe_node(name)
            gone = word in ("NOT_FOUND", "DELETING")
            result[name] = (State.GONE if gone else _state(word)), word
        return result

    def _describe_node(self, name: str) -> str:
        done = self.commands.run([*self._group("tpu-vm"), "describe", name, *self._where(), "--format=json"])
        if done.code and "NOT_FOUND" in done.err:
            return "NOT_FOUND"
        if done.code:
            _refuse(done)
            raise Unavailable(done.last_line)
        return str(_json(done).get("state", "?"))

    def delete(self) -> bool:
        """Deletes the request and its slices; whether there was anything."""
        words = [*self._words("delete"), *(["--force"] if self.settings.queued else []), "--quiet"]
        done = self.commands.run(words, seconds=1800)
        if done.code and "NOT_FOUND" not in done.err:
            _refuse(done)
            raise Unavailable(done.last_line)
        return not done.code

    # --- the workers

    def copy(self, path: str) -> Completed:
        """Copies a file to the home directory of every worker; who has it is for the next command to say."""
        return self.commands.run(self._reach("scp", path, f"{self.settings.name}:"), seconds=1800)

    def ask(self, command: str, everywhere: bool = True, seconds: float = 600.0) -> Answers:
        """Runs a short command on every worker, or on the first one of the first slice, and collects their answers."""
        words = self._reach("ssh", self.settings.name, everywhere=everywhere)
        done = self.commands.run([*words, f"--command={command}"], seconds=seconds)
        expected = self.topology.machines * self.settings.slices if everywhere else 1
        answers, text = {}, []
        for line in (done.out + "\n" + done.err).splitlines():
            before, mark, answer = line.partition(MARK)
            try:
                read = json.loads(answer) if mark else None
            except ValueError:
                read = None
            if isinstance(read, dict) and "host" in read:
                answers[read["host"]] = read
            elif line.strip():
                text.append(line)
        return Answers(answers, 0 if self.commands.dry_run else expected, "\n".join(text))

    def _reach(self, verb: str, *operands: str, everywhere: bool = True) -> list[str]:
        """Words for ssh and scp.  One TPU VM is reached through Identity-Aware Proxy by the alpha verbs alone."""
        workers, tunnel = "all" if everywhere else "0", self.settings.internal_ips
        words = [*self._group(self.noun, tunnel and not self.settings.queued), verb, *operands, *self._where()]
        words += [f"--node={workers}"] if self.settings.queued else []
        return [*words, f"--worker={workers}", *(["--tunnel-through-iap"] if tunnel else [])]

    def _group(self, noun: str, alpha: bool = False) -> list[str]:
        return ["gcloud", *(["alpha"] if alpha else []), "compute", "tpus", noun]

    def _words(self, verb: str, alpha: bool = False) -> list[str]:
        return [*self._group(self.noun, alpha), verb, self.settings.name, *self._where()]

    def _where(self) -> list[str]:
        return [f"--zone={self.settings.zone}", *([f"--project={self.settings.project}"] if self.settings.project else [])]


def _state(word: str) -> State:
    if word not in WORDS:
        raise Unavailable(f"the platform says {word!r}, which says nothing here")
    return WORDS[word]


def _refuse(done: Completed) -> None:
    if any(sign in done.err for sign in REFUSED):
        raise UserError(f"launch: gcloud refused: {done.err.strip()}")


def _json(done: Completed) -> Any:
    try:
        return json.loads(done.out)
    except ValueError as error:
        raise Unavailable(f"gcloud's answer is no JSON: {done.out[:200]!r}") from error
