"""What the launcher does on GKE, against an imitation of kubectl and gcloud and the names of the API's fields."""

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from tanuki_jax import slices
from tanuki_jax.errors import UserError
from tanuki_jax.launch import gke, manifest, settings
from tanuki_jax.launch.commands import Commands, Completed
from tests.launch.gke_fields import FIELDS, FREE, POLICY_FLAGS, POOL_FLAGS
from tests.tiny_recipe import trained

BASE = {
    "name": "tanuki",
    "config": "configs/tanuki_8b.py:/mnt/it's mine",
    "workdir": "/mnt/runs/8b",
    "type": "v5p-256",
    "image": "registry/tanuki:1",
    "bucket": "my-runs",
    "service_account": "trainer",
    "cluster": "c",
    "location": "us-east5",
    "zone": "us-east5-a",
}
CLAIM = {"bucket": "", "service_account": "", "claim": "runs"}
KINDS = {
    "v5e": {"type": "v5e-64"},
    "v5p, 2 slices": {"type": "v5p-256", "slices": "2"},
    "v6e": {"type": "v6e-8", **CLAIM},
    "tpu7x": {"type": "tpu7x-128"},
    "spot": {"provisioning_model": "spot"},
    "reserved": {"provisioning_model": "reserved", "reservation": "r"},
    "reserved, nodes made by GKE": {"provisioning_model": "reservation-bound", "reservation": "r", "cluster": ""},
    "flex-start": {"provisioning_model": "flex-start", "max_run_duration": "24h"},
    "Kueue, data and variables": {"queue": "multislice", "data_bucket": "my-data", "env": "HF_TOKEN=hf_secret"},
}


def read(**values):
    return settings.read("gke", None, [f"--{name}={value}" for name, value in {**BASE, **values}.items() if value])


class Fake(Commands):
    """Answers by the words of a command; everything else succeeds silently."""

    def __init__(self, **answers):
        super().__init__()
        self.answers, self.calls = answers, []

    def run(self, words, text="", seconds=300.0):
        self.calls.append((list(words), text))
        for word, answer in self.answers.items():
            if word in words:
                if isinstance(answer, UserError):
                    raise answer
                return answer.pop(0) if isinstance(answer, list) else answer
        return Completed(0)

    def show(self, words):
        self.run(words)

    def verbs(self):
        return [next(w for w in words if w in ("get", "delete", "apply", "create", "logs", "cat")) for words, _ in self.calls]


def jobset(*conditions, **status):
    found = {"status": {"conditions": [{"type": c, "status": "True", "message": f"{c}."} for c in conditions], **status}}
    return Completed(0, json.dumps(found))


def pod_of(made):
    return made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def fields(value, path=""):
    """Paths of a manifest's objects, each with the names that it has."""
    if isinstance(value, dict):
        yield path, set(value)
        if path not in FREE:
            for name, part in value.items():
                yield from fields(part, f"{path}/{name}".strip("/"))
    elif isinstance(value, list):
        for part in value:
            yield from fields(part, f"{path}/[]")


# --- the manifest


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_one_that_the_api_knows_and_none_is_missing(kind):
    made = yaml.safe_load(yaml.safe_dump(manifest.make_jobset(read(**KINDS[kind]))))
    for path, names in fields(made):
        if path not in FREE:
            required, known = (set(part.split()) for part in FIELDS[path])
            assert names <= known, (path, names - known)
            assert required <= names, (path, required - names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_against_models_made_from_the_schema(kind):
    """With kubeflow-trainer-api, whose models are made from JobSet's schema; TANUKI_KTA names a Python that has it."""
    python = os.environ.get("TANUKI_KTA") or (importlib.util.find_spec("kubeflow_trainer_api") and sys.executable)
    if not python:
        pytest.skip("kubeflow-trainer-api is not installed")
    code = (
        "import json, sys; from kubeflow_trainer_api.models import JobsetV1alpha2JobSet as JobSet; "
        "json.dump(JobSet.from_dict(json.load(sys.stdin)).to_dict(), sys.stdout, default=str)"
    )
    made = manifest.make_jobset(read(**KINDS[kind]))
    done = subprocess.run([python, "-c", code], input=json.dumps(made), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lost = set(leaves(made)) - set(leaves(json.loads(done.stdout)))  # a field that the models do not know is dropped
    assert not lost


def leaves(value, path=""):
    if isinstance(value, dict):
        for name, part in value.items():
            yield from leaves(part, f"{path}/{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from leaves(part, f"{path}/{number}")
    else:
        yield path, str(value).removesuffix(".0")  # the models read quantities as floats


@pytest.mark.parametrize("kind", KINDS)
def test_a_pod_for_each_machine_of_each_slice_and_its_chips(kind):
    chosen = read(**KINDS[kind])
    topology = slices.parse(chosen.type)
    made = manifest.make_jobset(chosen)
    [job] = made["spec"]["replicatedJobs"]
    spec, pod = job["template"]["spec"], pod_of(made)
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (chosen.slices, topology.machines, topology.machines)
    assert (spec["backoffLimit"], pod["restartPolicy"], spec["completionMode"]) == (0, "Never", "Indexed")
    [container] = pod["containers"]
    chips = {"google.com/tpu": topology.chips_per_machine}
    assert container["resources"] == {"requests": chips, "limits": chips}
    several = [f"--config.mesh.slices={chosen.slices}"] if chosen.slices > 1 else []
    assert container["command"] == ["tanuki", "run", f"--config={BASE['config']}", f"--workdir={BASE['workdir']}", *several]
    assert container["securityContext"] == {"privileged": True}
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == topology.generation.gke_accelerator
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.shape
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert made["metadata"]["annotations"] == exclusive
    assert made["spec"]["ttlSecondsAfterFinished"] == 86_400 and pod["terminationGracePeriodSeconds"] == 180


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("v5e", {}),
        ("spot", {"cloud.google.com/gke-spot": "true"}),
        ("flex-start", {"cloud.google.com/gke-flex-start": "true"}),
        ("reserved", {}),
        (
            "reserved, nodes made by GKE",
            {"cloud.google.com/reservation-name": "r", "cloud.google.com/reservation-affinity": "specific"},
        ),
    ],
)
def test_nodes_are_chosen_by_how_they_are_paid_for(kind, labels):
    found = pod_of(manifest.make_jobset(read(**KINDS[kind])))["nodeSelector"]
    assert {name: text for name, text in found.items() if "tpu" not in name} == labels


def outcome(code=None, disrupted=False):
    """What becomes of the JobSet after a pod that ended with this exit code, or vanished: Kubernetes' pod_failure_policy.go,
    with its messages, and job_controller.go; JobSet's failure_policy.go."""
    made = manifest.make_jobset(read())
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for rule in reversed(made["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if code and code in rule.get("onExitCodes", {"values": []})["values"]:
            reason = "PodFailurePolicy"
            message = f"Container tanuki for pod default/x failed with exit code {code} matching FailJob rule at index 0"
        if disrupted and "onPodConditions" in rule:
            reason = "PodFailurePolicy"
            message = "Pod default/x has condition DisruptionTarget matching FailJob rule at index 0"
    return jobset_action(made, reason, message)


def jobset_action(made, reason, message):
    for rule in made["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [])
        if reason in rule["onJobFailureReasons"] and (not patterns or any(re.search(p, message) for p in patterns)):
            return rule["action"]
    return "RestartJobSet"  # counted


@pytest.mark.parametrize("disrupted", [True, False])
def test_bad_input_ends_the_jobset_and_no_restart_without_a_save_goes_uncounted(disrupted):
    """Who evicts a pod is not in what JobSet sees: a full disk looks like a preemption, and would come again for ever."""
    assert outcome(1, disrupted) == "FailJobSet"
    assert outcome(75, disrupted) == "RestartJobSetAndIgnoreMaxRestarts"
    for code in (143, 137, 76, 77, 134, None):
        assert outcome(code, disrupted) == "RestartJobSet"


def test_the_rules_of_failure():
    made = manifest.make_jobset(read(max_restarts="7"))
    policy = made["spec"]["failurePolicy"]
    assert jobset_action(made, "PodFailurePolicy", "something that a later Kubernetes says") == "FailJobSet"
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (7, "BlockingRecreate")
    names = [rule["name"] for rule in policy["rules"]]
    assert all(re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", name) for name in names)  # JobSet's pattern


def test_a_bucket_is_mounted_with_fresh_metadata_and_the_data_with_a_cache():
    made = manifest.make_jobset(read(data_bucket="my-data"))
    pod, template = pod_of(made), made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    annotations = template["metadata"]["annotations"]
    assert annotations["gke-gcsfuse/volumes"] == "true" and annotations["gke-gcsfuse/memory-limit"] == "0"
    assert pod["serviceAccountName"] == "trainer"
    work, data = pod["volumes"]
    assert {work["csi"]["driver"], data["csi"]["driver"]} == {"gcsfuse.csi.storage.gke.io"}
    work_options, data_options = (v["csi"]["volumeAttributes"]["mountOptions"].split(",") for v in (work, data))
    assert {"metadata-cache:ttl-secs:0", "implicit-dirs"} <= set(work_options)
    assert any(option.startswith("file-cache:max-size-mb:") for option in data_options)
    assert (work["csi"]["readOnly"], data["csi"]["readOnly"]) == (False, True)
    assert work["csi"]["volumeAttributes"]["hostNetworkPodKSA"] == "true"  # else the host's network has the node's rights
    assert [(m["mountPath"], m.get("readOnly", False)) for m in pod["containers"][0]["volumeMounts"]] == [
        ("/mnt", False),
        ("/data", True),
    ]


def test_a_claim_needs_no_second_container():
    made = manifest.make_jobset(read(**CLAIM))
    pod = pod_of(made)
    assert pod["volumes"] == [{"name": "work", "persistentVolumeClaim": {"claimName": "runs"}}]
    assert made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["metadata"]["annotations"] == {}
    assert "serviceAccountName" not in pod


def test_values_of_variables_are_in_a_secret_and_never_printed(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    chosen = read(env="HF_TOKEN=hf_secret 狸", pass_env="WANDB_API_KEY")
    [container] = pod_of(manifest.make_jobset(chosen))["containers"]
    plain = {e["name"]: e["value"] for e in container["env"]}
    assert plain["JAX_PLATFORMS"] == "tpu" and plain["TANUKI_COORDINATOR"] == "auto"
    assert plain["JAX_COMPILATION_CACHE_DIR"] == "/mnt/runs/8b/compilation_cache"
    assert container["envFrom"] == [{"secretRef": {"name": "tanuki-environment"}}]
    secret = manifest.make_secret(chosen)
    assert "stringData" not in secret  # of it `kubectl apply` removes no key that is no longer there
    assert {name: base64.b64decode(text).decode() for name, text in secret["data"].items()} == {
        "HF_TOKEN": "hf_secret 狸",
        "WANDB_API_KEY": "wandb_secret",
    }
    for action in ("manifest", "run"):
        gke.launch(action, chosen, Commands(dry_run=True))
    printed = capsys.readouterr().out
    assert "_secret" not in printed and "HF_TOKEN: '***'" in printed
    fake = Fake()
    gke.launch("run", chosen, fake)
    assert any(secret["data"]["HF_TOKEN"] in text for _, text in fake.calls)
    assert not any("_secret" in word for words, _ in fake.calls for word in words)  # other users see a process's words


def test_a_variable_of_the_user_has_the_last_word():
    [container] = pod_of(manifest.make_jobset(read(env="JAX_PLATFORMS=tpu,cpu")))["containers"]
    assert "JAX_PLATFORMS" not in {e["name"] for e in container["env"]}  # `env` would win over the secret


def test_kubernetes_replaces_nothing_in_flags():
    made = manifest.make_jobset(read(flags="--config.stages.a.note=$(HOSTNAME)"))
    assert pod_of(made)["containers"][0]["command"][-1].endswith("$$(HOSTNAME)")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"claim": "c"}, "claim or bucket, one of them"),
        ({"bucket": ""}, "claim or bucket, one of them"),
        ({"service_account": ""}, "service_account is not set"),
        ({"workdir": "/home/me"}, "below mount, /mnt"),
        ({"workdir": "/mnt2/me"}, "below mount, /mnt"),
        ({"image": ""}, "image is not set"),
        ({"type": "2xv5p-256"}, "set slices = 2"),
        ({"type": "v6e-8", "slices": "2"}, "take a larger type"),
        ({"type": "v5p-100"}, "type: there is no slice"),
        ({"name": "a" * 50, "slices": "2"}, "too long"),
        ({"provisioning_model": "reserved", "cluster": ""}, "reservation is not set"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_asked(values, words):
    fake = Fake()
    with pytest.raises(UserError, match=re.escape(words)):
        gke.launch("run", read(**values), fake)
    assert not fake.calls


# --- actions


def test_the_dry_run_prints_what_manifest_prints(capsys):
    gke.launch("manifest", read(), Commands())
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == manifest.make_jobset(read())
    gke.launch("run", read(), Commands(dry_run=True))
    look, apply = capsys.readouterr().out.split("\n", 1)
    assert look.startswith("kubectl --namespace=default get jobset tanuki")
    assert apply == f"kubectl --namespace=default apply --filename=- <<'EOF'\n{text}EOF\n"


@pytest.mark.parametrize("condition", ["Completed", "Failed"])
def test_a_finished_jobset_is_deleted_before_it_is_applied_again(condition, capsys):
    fake = Fake(get=jobset(condition))
    gke.launch("run", read(), fake)
    assert fake.verbs() == ["get", "delete", "apply"]
    assert "deleting it" in capsys.readouterr().out


def test_a_jobset_that_runs_or_waits_is_left_alone():
    for found in (jobset(), jobset("Suspended"), jobset("StartupPolicyCompleted")):
        fake = Fake(get=found)
        with pytest.raises(UserError, match="there is a JobSet tanuki"):
            gke.launch("run", read(), fake)
        assert fake.verbs() == ["get"]


def test_nothing_is_applied_while_the_cluster_does_not_answer():
    for answer, words in {
        Completed(1, "", "Unable to connect to the server: net/http: TLS handshake timeout"): "TLS handshake",
        Completed(1, "", 'error: the server doesn\'t have a resource type "jobset"'): "install JobSet",
        Completed(0, "<html>"): "no JSON",
    }.items():
        fake = Fake(get=answer)
        with pytest.raises(UserError, match=words):
            gke.launch("run", read(), fake)
        assert fake.verbs() == ["get"]


def test_status_tells_restarts_and_why_it_failed(capsys):
    gke.launch("status", read(**CLAIM), Fake(get=jobset("Failed", restarts=4, restartsCountTowardsMax=3)))
    out = capsys.readouterr().out
    assert "has failed; 4 restarts, 3 of them count" in out and "Failed." in out
    gke.launch("status", read(**CLAIM), Fake(get=Completed(0)))
    assert "there is no JobSet tanuki" in capsys.readouterr().out


SUMMARY = {"stages": [{"name": "a"}, {"name": "b"}], "config": {"stages": {"a": {}, "b": {}}}}


def test_done_is_what_the_run_says_where_its_workdir_can_be_read(capsys):
    done = Completed(0, json.dumps(SUMMARY))
    fake = Fake(get=jobset("Completed"), cat=done)
    gke.launch("status", read(), fake)
    assert "every stage is done" in capsys.readouterr().out
    assert ["gcloud", "storage", "cat", "gs://my-runs/runs/8b/summary.json"] in [words for words, _ in fake.calls]
    half = Completed(0, json.dumps(SUMMARY | {"stages": [{"name": "a"}]}))
    for lie in (Completed(1, "", "One or more URLs matched no objects"), half, Completed(0, "[]")):
        with pytest.raises(UserError, match="does not say that every stage is"):
            gke.launch("status", read(), Fake(get=jobset("Completed"), cat=lie))
    gke.launch("status", read(**CLAIM), Fake(get=jobset("Completed")))
    assert "the run's own sign is /mnt/runs/8b/summary.json" in capsys.readouterr().out


def test_a_real_runs_summary_says_that_it_is_done(tmp_path_factory, capsys):
    text = (trained(tmp_path_factory.getbasetemp()) / "summary.json").read_text()
    gke.launch("status", read(), Fake(get=jobset("Completed"), cat=Completed(0, text)))
    assert "every stage is done" in capsys.readouterr().out


COST = "costs money until `tanuki launch gke delete` deletes it"


@pytest.mark.parametrize(
    ("action", "found"),
    [
        ("status", jobset("Completed")),
        ("status", jobset("Failed")),
        ("status", Completed(0)),  # deleted after ttl_seconds
        ("run", Completed(0)),
        ("stop", Completed(0)),
    ],
)
def test_node_pools_cost_on_and_the_actions_say_so(action, found, capsys):
    gke.launch(action, read(slices="2", **CLAIM), Fake(get=found))
    out = capsys.readouterr().out
    assert f"what `create` made (node pools tanuki-0 to tanuki-1) {COST}" in out
    for other in ({"cluster": ""}, {"provisioning_model": "flex-start"}):  # no pools, or pools that shrink to nothing
        gke.launch(action, read(**CLAIM, **other), Fake(get=found))
    assert COST not in capsys.readouterr().out


def test_node_pools_cost_on_where_the_run_says_not_that_it_is_done(capsys):
    with pytest.raises(UserError, match="does not say that every stage is"):
        gke.launch("status", read(), Fake(get=jobset("Completed"), cat=Completed(1)))
    assert COST in capsys.readouterr().out
    gke.launch("status", read(), Fake(get=jobset(), cat=Completed(1)))
    assert COST not in capsys.readouterr().out


def test_logs_are_those_of_one_pod():
    fake = Fake()
    gke.launch("logs", read(), fake)
    [(words, _)] = fake.calls
    [selector] = [word for word in words if word.startswith("--selector=")]
    assert "job-index=0" in selector and "completion-index=0" in selector and "--container=tanuki" in words


def test_stop_leaves_the_node_pools_and_waits_for_the_pods():
    fake = Fake()
    gke.launch("stop", read(), fake)
    (words, _), (secret, _) = fake.calls
    assert words[-4:] == ["jobset", "tanuki", "--ignore-not-found", "--cascade=foreground"] and "secret" in secret


# --- node pools


def pools(**values):
    fake = Fake()
    gke.launch("create", read(**values), fake)
    return fake.calls


def flags(words):
    return dict(word.partition("=")[::2] for word in words if word.startswith("--"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "made by GKE" not in kind])
def test_flags_are_those_of_gcloud_and_agree_with_the_manifest(kind):
    chosen = read(**KINDS[kind])
    topology = slices.parse(chosen.type)
    made = [words for words, _ in pools(**KINDS[kind]) if "node-pools" in words]
    assert [words[4] for words in made] == [f"tanuki-{n}" for n in range(chosen.slices)]
    for words in made:
        found = flags(words)
        assert set(found) <= set(POOL_FLAGS.split())
        assert found["--machine-type"] == topology.machine_type and found["--node-locations"] == "us-east5-a"
        nodes = found["--max-nodes"] if "--flex-start" in found else found["--num-nodes"]
        assert (
            int(nodes)
            == topology.machines
            == manifest.make_jobset(chosen)["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"]
        )
        assert "--placement-policy" not in found or "--tpu-topology" not in found
        if topology.machines == 1:
            assert not {"--placement-policy", "--tpu-topology"} & set(found)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("v5e", {"--tpu-topology": "8x8", "--machine-type": "ct5lp-hightpu-4t", "--num-nodes": "16"}),
        ("v6e", {"--machine-type": "ct6e-standard-8t", "--num-nodes": "1"}),
        ("spot", {"--spot": "", "--system-config-from-file": "-", "--tpu-topology": "4x4x8"}),
        ("reserved", {"--reservation-affinity": "specific", "--reservation": "r"}),
        (
            "flex-start",
            {"--flex-start": "", "--reservation-affinity": "none", "--max-run-duration": "86400s", "--num-nodes": "0"},
        ),
    ],
)
def test_each_way_to_pay_has_its_flags(kind, wanted):
    [(words, _)] = pools(**KINDS[kind])
    assert wanted.items() <= flags(words).items()
    others = {"--spot", "--flex-start", "--reservation-affinity", "--system-config-from-file"} - set(wanted)
    assert not others & set(flags(words))


def test_spot_pods_get_more_than_15_seconds():
    [(_, text)] = pools(provisioning_model="spot")
    assert yaml.safe_load(text) == {
        "kubeletConfig": {"shutdownGracePeriodSeconds": 120, "shutdownGracePeriodCriticalPodsSeconds": 15}
    }
    [(words, text)] = pools(provisioning_model="spot", grace_seconds="15")  # clusters older than the field
    assert not text and "--system-config-from-file=-" not in words


def test_tpu7x_slices_of_several_machines_have_a_placement_policy():
    (policy, _), (pool, _) = pools(type="tpu7x-128")
    assert policy[:6] == ["gcloud", "compute", "resource-policies", "create", "workload-policy", "tanuki"]
    assert set(flags(policy)) <= set(POLICY_FLAGS.split())
    assert flags(policy) == {"--region": "us-east5", "--type": "HIGH_THROUGHPUT", "--accelerator-topology": "4x4x4"}
    assert flags(pool)["--placement-policy"] == "tanuki" and flags(pool)["--num-nodes"] == "16"
    [(pool, _)] = pools(type="tpu7x-8")
    assert "--placement-policy" not in flags(pool)


def test_a_pool_that_is_there_is_left_alone_and_one_that_fails_is_an_error_that_says_what_costs(capsys):
    there = Completed(1, "", "ERROR: (gcloud.container.node-pools.create) ResponseError: code=409, message=Already exists: ...")
    full = Completed(1, "", "ERROR: ... Google Compute Engine does not have enough resources available")
    fake = Fake(create=[there, full])
    with pytest.raises(UserError, match="tanuki-1 could not be made.*enough resources.*launch gke delete"):
        gke.launch("create", read(slices="2"), fake)
    assert "tanuki-0 is there already" in capsys.readouterr().out


def test_delete_tries_every_pool_and_says_what_is_left():
    gone = Completed(1, "", "code=404, message=Not found: projects/p/zones/z/clusters/c/nodePools/tanuki-0.")
    busy = Completed(1, "", "ERROR: Operation is currently running on the cluster")
    fake = Fake(**{"node-pools": [gone, busy, Completed(0)]})
    with pytest.raises(UserError, match="not deleted, and may cost money: node pool tanuki-1: ERROR: Operation"):
        gke.launch("delete", read(slices="3"), fake)
    assert sum("node-pools" in words for words, _ in fake.calls) == 3


@pytest.mark.parametrize(
    "silent",
    [
        Completed(1, "", 'error: the server doesn\'t have a resource type "jobset"'),
        Completed(1, "", "E1: dial\nUnable to connect to the server: dial tcp: i/o timeout"),
        UserError("launch: kubectl is not installed; gcloud components install kubectl"),
    ],
)
def test_delete_goes_on_to_the_pools_where_kubectl_fails(silent):
    fake = Fake(jobset=silent, secret=silent)
    with pytest.raises(UserError) as caught:
        gke.launch("delete", read(slices="2", type="tpu7x-128"), fake)
    assert [words[4] for words, _ in fake.calls if words[:3] == ["gcloud", "container", "node-pools"]] == [
        "tanuki-0",
        "tanuki-1",
    ]
    assert "resource-policies" in fake.calls[-1][0]
    text = str(caught.value)
    reason = str(silent).removeprefix("launch: ") if isinstance(silent, UserError) else silent.last_line
    assert f"JobSet tanuki: {reason}" in text and "node pool" not in text
    assert text.count("launch: ") == 1 and "\n" not in text and "tanuki launch gke delete" in text


def test_delete_names_every_pool_where_nothing_answers():
    down = Completed(1, "", "no route to host")
    with pytest.raises(
        UserError, match="JobSet tanuki: .*node pool tanuki-0: .*node pool tanuki-1: .*tanuki launch gke delete"
    ):
        gke.launch("delete", read(slices="2"), Fake(jobset=down, secret=down, gcloud=down))


def test_delete_checks_its_settings_before_anything_is_deleted():
    fake = Fake()
    with pytest.raises(UserError, match="location is not set"):
        gke.launch("delete", read(location=""), fake)
    assert not fake.calls


def test_a_cluster_that_is_not_found_says_nothing_of_its_pools():
    missing = Completed(1, "", "code=404, message=Not found: projects/p/locations/us-east5/clusters/c.")
    with pytest.raises(UserError, match="tanuki-0"):
        gke.launch("delete", read(), Fake(**{"node-pools": missing}))


def test_delete_without_a_cluster_says_that_no_pool_is_deleted(capsys):
    fake = Fake()
    gke.launch("delete", read(cluster=""), fake)
    assert fake.verbs() == ["delete", "delete"] and "no node pool is deleted" in capsys.readouterr().out


def test_durations_and_long_names():
    with pytest.raises(UserError, match="write 24h"):
        pools(provisioning_model="flex-start", max_run_duration="a day")
    with pytest.raises(UserError, match="40 letters"):
        pools(name="a" * 40)


@pytest.mark.parametrize("action", gke.ACTIONS)
def test_every_action_has_a_dry_run(action, capsys):
    gke.launch(action, read(), Commands(dry_run=True))
    assert capsys.readouterr().out
