"""The words for gcloud, against the flags of the SDK itself, recorded from its source (578.0.0, surface/compute/tpus)."""

import itertools
import json
import shlex

import pytest

from tanuki_jax import slices
from tanuki_jax.cli import main
from tanuki_jax.errors import UserError
from tanuki_jax.launch import settings as launch_settings
from tanuki_jax.launch.commands import Commands, Completed
from tanuki_jax.launch.gcloud import Slices, State, Unavailable

EVERYWHERE = {"zone", "project", "format", "quiet", "verbosity"}  # of every command
CREATE_QUEUED = {
    *("accelerator-type", "boot-disk", "data-disk", "description", "guaranteed", "internal-ips", "labels", "metadata"),
    *("metadata-from-file", "network", "node-count", "node-id", "node-prefix", "range", "reserved", "runtime-version"),
    *("reservation-host-folder", "reservation-host-organization", "reservation-host-project", "scopes", "service-account"),
    *("shielded-secure-boot", "spot", "subnetwork", "tags", "topology", "type", "valid-after-duration", "valid-after-time"),
    *("valid-until-duration", "valid-until-time", "async"),
}
SSH = {"worker", "command", "output-directory", "ssh-flag", "internal-ip", "force-key-file-overwrite", "plain", "ssh-key-file"}
SSH |= {"strict-host-key-checking", "dry-run", "ssh-key-expiration", "ssh-key-expire-after"}
SCP = SSH - {"command", "output-directory", "ssh-flag"} | {"scp-flag", "recurse", "compress"}
BATCH = {"batch-size", "tunnel-through-iap"}
FLAGS = {  # of the release that the words name, GA or alpha
    ("queued-resources", "create"): CREATE_QUEUED,
    ("alpha", "queued-resources", "create"): CREATE_QUEUED
    | {"best-effort", "provisioning-model", "max-run-duration", "reservation", "network-config", "workload-type"},
    ("queued-resources", "describe"): set(),
    ("queued-resources", "delete"): {"force", "async"},
    ("queued-resources", "ssh"): SSH | BATCH | {"node"},
    ("queued-resources", "scp"): SCP | BATCH | {"node"},
    ("tpu-vm", "create"): {
        *("accelerator-type", "async", "boot-disk", "data-disk", "description", "internal-ips", "labels", "metadata"),
        *("metadata-from-file", "network", "preemptible", "range", "reserved", "scopes", "service-account", "spot"),
        *("shielded-secure-boot", "subnetwork", "tags", "topology", "type", "version", "network-interface-count"),
    },
    ("tpu-vm", "describe"): set(),
    ("tpu-vm", "delete"): {"async"},
    ("tpu-vm", "list"): {"filter", "limit", "page-size", "sort-by", "uri"},
    ("tpu-vm", "ssh"): SSH,
    ("tpu-vm", "scp"): SCP,
    ("alpha", "tpu-vm", "ssh"): SSH | BATCH,
    ("alpha", "tpu-vm", "scp"): SCP | BATCH,
}
BASE = ["--name=tanuki", "--zone=us-east5-a", "--config=configs/tanuki_8b.py:/mnt/my data", "--workdir=/mnt/run"]
WAYS = {
    "queued": [],
    "on demand": ["--queued=false"],
    "spot": ["--provisioning_model=spot"],
    "spot at once": ["--provisioning_model=spot", "--queued=false"],
    "reserved": ["--provisioning_model=reserved"],
    "calendar": ["--provisioning_model=reservation-bound", "--reservation=mine"],
    "flex": ["--provisioning_model=flex-start", "--max_run_duration=24h", "--valid_until=12h"],
    "inside": ["--internal_ips=true", "--network=n", "--subnetwork=s", "--service_account=a@b"],
    "inside, at once": ["--internal_ips=true", "--queued=false"],
}


def transcript(capsys, action, *flags):
    """The commands of a dry run, as words."""
    assert main.main(["launch", "tpu", action, "--dry_run", *BASE, *flags]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("kind, count", [("v5e-16", 1), ("v5p-256", 1), ("v5p-256", 2), ("v6e-64", 1), ("v6e-8", 1)])
@pytest.mark.parametrize("way", WAYS)
def test_a_dry_run_is_what_gcloud_takes(kind, count, way, capsys):
    if count > 1 and "--queued=false" in WAYS[way]:
        pytest.skip("several slices are always queued for")
    lines = transcript(capsys, "run", f"--type={kind}", f"--slices={count}", *WAYS[way])
    noun = "tpu-vm" if "--queued=false" in WAYS[way] else "queued-resources"
    names = []
    for words in lines:
        assert words[0] == "gcloud"
        group = [
            word
            for word in itertools.takewhile(lambda word: not word.startswith("-"), words[1:])
            if word not in ("compute", "tpus")
        ]
        release = group[:1] if group[0] == "alpha" else []
        named, verb = group[len(release) :][:2]
        flags = {word[2:].split("=")[0] for word in words if word.startswith("--")}
        unknown = flags - FLAGS[(*release, named, verb)] - EVERYWHERE
        assert not unknown, (words, unknown)
        assert "--zone=us-east5-a" in words
        names.append(verb)
    assert names == ["create", "scp", "ssh", "ssh", "ssh", "describe", "list", "ssh", "delete"]
    assert {words[words.index("tpus") + 1] for words in lines} == {noun, "tpu-vm"}
    actions = [words[-1].split("worker.py ")[1].split()[0] for words in lines if "ssh" in words]
    assert actions == ["setup", "install", "start", "status"]


@pytest.mark.parametrize(
    "kind, accelerator, runtime",
    [
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-256", "v5p-256", "v2-alpha-tpuv5"),
        ("v6e-64", "v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_each_kind_has_its_own_runtime(kind, accelerator, runtime, capsys):
    [queued] = transcript(capsys, "create", f"--type={kind}")
    assert {f"--accelerator-type={accelerator}", f"--runtime-version={runtime}", "--node-id=tanuki"} <= set(queued)
    [at_once] = transcript(capsys, "create", f"--type={kind}", "--queued=false")
    assert {f"--accelerator-type={accelerator}", f"--version={runtime}"} <= set(at_once)
    [other] = transcript(capsys, "create", f"--type={kind}", "--runtime=tpu-ubuntu2204-base")
    assert "--runtime-version=tpu-ubuntu2204-base" in other


def test_spot_is_asked_for_by_the_ga_verb_alone(capsys):
    """The alpha verb adds the provisioning model `standard` to --spot."""
    [words] = transcript(capsys, "create", "--type=v5p-8", "--provisioning_model=spot")
    assert "--spot" in words and "alpha" not in words and not any("provisioning-model" in word for word in words)
    [words] = transcript(capsys, "create", "--type=v6e-8", "--provisioning_model=flex-start", "--max_run_duration=2h")
    assert (
        words[1] == "alpha"
        and {"--provisioning-model=flex-start", "--max-run-duration=2h"} <= set(words)
        and "--spot" not in words
    )
    [words] = transcript(capsys, "create", "--type=v6e-8", "--provisioning_model=reservation-bound", "--reservation=mine")
    assert words[1] == "alpha" and {"--provisioning-model=reservation-bound", "--reservation=mine"} <= set(words)


def test_several_slices_are_one_request(capsys):
    [words] = transcript(capsys, "create", "--type=v5p-8", "--slices=3")
    assert {"--node-count=3", "--node-prefix=tanuki"} <= set(words)


def test_what_the_workers_get_is_shown_without_the_users_values(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-1")
    flags = ["--env=HF_TOKEN=secret-2", "--pass_env=WANDB_API_KEY", "--config.mesh.slices=2", "--setup=sudo mount x /mnt"]
    assert main.main(["launch", "tpu", "setup", "--dry_run", *BASE, "--type=v5p-8", *flags]) == 0
    shown = capsys.readouterr().out
    assert "secret" not in shown and '"HF_TOKEN": "***"' in shown and '"WANDB_API_KEY": "***"' in shown
    launch_json = json.loads("\n".join(line[1:] for line in shown.splitlines()[1:] if line.startswith("#")))
    assert launch_json["run"] == ["--config=configs/tanuki_8b.py:/mnt/my data", "--workdir=/mnt/run", "--config.mesh.slices=2"]
    assert launch_settings.run_flags(launch_settings.read("tpu", None, ["--slices=3"]))[-1] == "--config.mesh.slices=3"
    both = launch_settings.read("tpu", None, ["--slices=3", "--config.mesh.slices=1"])
    assert launch_settings.run_flags(both)[2:] == ["--config.mesh.slices=1"]
    assert launch_json["env"]["JAX_PLATFORMS"] == "tpu" and launch_json["env"]["TANUKI_COORDINATOR"] == "auto"
    assert launch_json["env"]["JAX_COMPILATION_CACHE_DIR"] == "/mnt/run/compilation_cache"
    assert launch_json["setup"] == "sudo mount x /mnt"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--type=tpu7x-8"], "no Cloud TPU API; use tanuki launch gke"),
        (["--type=v5p-7"], "launch: type: there is no slice 'v5p-7'"),
        (["--type=v5p-8", "--queued=false", "--slices=2"], "queued must be true"),
        (["--type=v5p-8", "--queued=false", "--provisioning_model=flex-start"], "needs queued"),
        (["--type=v5p-8", "--provisioning_model=flex-start"], "needs max_run_duration"),
        (["--type=v5p-8", "--provisioning_model=reservation-bound"], "needs reservation"),
        (["--type=v5p-8", "--provisioning_model=spot", "--reservation=r"], "reservation needs provisioning_model reserved"),
        (["--type=v5p-8", "--provisioning_model=reserved", "--reservation=r", "--queued=false"], "set queued=true"),
        (["--type=2xv5p-8"], "name one slice there, and set slices=2"),
        (["--type=v5p-8", "--zone="], "zone is not set"),
        ([], "type is not set"),
    ],
)
def test_what_the_platform_would_refuse_is_refused_at_once(flags, words, capsys):
    assert main.main(["launch", "tpu", "create", "--dry_run", *BASE, *flags]) == 1
    assert words in capsys.readouterr().err


class Answer(Commands):
    """gcloud with one answer."""

    def __init__(self, *answer):
        super().__init__()
        self.answer = Completed(*answer)

    def run(self, words, text="", seconds=300.0):
        return self.answer


def ask(*answer, queued=True):
    settings = launch_settings.read("tpu", None, [*BASE, "--type=v5p-16", f"--queued={str(queued).lower()}"])
    return Slices(settings, Answer(*answer))


NOT_FOUND = "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found."


def request(count, kind, queued=True):
    """What `describe` says: a slice each, or, before they are made, their number."""
    node = {"acceleratorType": kind}
    if not queued:
        return json.dumps({"state": "READY", **node})
    specs = [{"node": node, "nodeId": f"n-{n}"} for n in range(count)]
    if count > 2:
        specs = [{"node": node, "multisliceParams": {"nodeCount": count}}]
    return json.dumps({"state": {"state": "ACTIVE"}, "tpu": {"nodeSpec": specs}})


def test_a_request_of_this_name_for_other_slices_is_not_touched():
    assert (
        ask(0, request(1, "v5p-16")).state()[0] is ask(0, request(1, "v5p-16", False), queued=False).state()[0] is State.ACTIVE
    )
    for answer, queued in ((request(2, "v5p-16"), True), (request(5, "v5p-16"), True), (request(1, "v5p-8", False), False)):
        with pytest.raises(UserError, match="is there with . x v5p-(16|8), the settings say 1 x v5p-16; take another name"):
            ask(0, answer, queued=queued).state()


def test_an_error_is_shown_from_its_beginning():
    done = Completed(
        1, "", "WARNING: x\nERROR: (gcloud) The required property [project] is not set.\nSet it:\n- set the property\n"
    )
    assert done.last_line == "ERROR: (gcloud) The required property [project] is not set. Set it: - set the property"


@pytest.mark.parametrize("state", ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "DELETING"])
def test_states(state):
    assert ask(0, json.dumps({"state": {"state": state}})).state() == (State.WAITING, state)
    assert ask(0, json.dumps({"state": {"state": "ACTIVE"}})).state()[0] is State.ACTIVE
    assert ask(0, json.dumps({"state": "READY"}), queued=False).state()[0] is State.ACTIVE
    for gone in ("SUSPENDED", "SUSPENDING", "FAILED"):
        assert ask(0, json.dumps({"state": {"state": gone}})).state()[0] is State.GONE
    assert ask(0, json.dumps({"state": "PREEMPTED"}), queued=False).state()[0] is State.GONE
    assert ask(1, "", NOT_FOUND).state()[0] is State.NONE


NEW = json.dumps({"state": {"state": "A_NEW_WORD"}})


@pytest.mark.parametrize("out, err", [("", "UNAVAILABLE: try later"), ("<html>", ""), ("{}", ""), ("[]", ""), (NEW, "")])
def test_no_answer_is_no_state(out, err):
    with pytest.raises(Unavailable):
        ask(1 if err else 0, out, err).state()


@pytest.mark.parametrize(
    "err", ["PERMISSION_DENIED: no", "INVALID_ARGUMENT: no", "unrecognized arguments: --what", "UNAUTHENTICATED"]
)
def test_a_refusal_is_an_error_with_gclouds_words(err):
    for action in ("state", "create", "node_states", "delete"):
        with pytest.raises(UserError, match=err.split(":")[0]):
            getattr(ask(1, "", f"ERROR: {err}"), action)()


def test_the_workers_answers_are_found_among_other_lines():
    out = (
        'motd\n##tanuki {"host": "w-0", "ok": true}\nnoise ##tanuki {"host": "w-1", "ok": false, "error": "no"}\n##tanuki {cut'
    )
    answers = ask(0, out).ask("x")
    assert answers.by_host.keys() == {"w-0", "w-1"} and answers.errors == {"w-1": "no"} and answers.missing == 0
    assert "motd" in answers.text
    assert ask(0, out.splitlines()[1]).ask("x").missing == slices.parse("v5p-16").machines - 1
