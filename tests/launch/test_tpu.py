"""Cloud TPU slices, from the request to the report, on a platform of ours that is as unkind as the real one."""

import re

import pytest

from tanuki_jax.errors import UserError
from tanuki_jax.launch import bundle, tpu
from tanuki_jax.launch import settings as launch_settings
from tanuki_jax.launch.tpu import Launch
from tests.launch.cloud import REPAIRS as cloud_repairs
from tests.launch.cloud import Cloud, Run

BASE = [
    "--name=tanuki",
    "--zone=us-east5-a",
    "--type=v5p-16",
    "--config=configs/tanuki_8b.py:/mnt/my data",
    "--workdir=/mnt/run",
]


@pytest.fixture(autouse=True)
def one_archive(monkeypatch):
    """The project's archive is made once; it is not what is tested here."""
    import io
    import tarfile

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("README.md"))
    monkeypatch.setattr(Launch, "_archive", content.getvalue())


def make(cloud, *flags):
    return Launch(launch_settings.read("tpu", None, [*BASE, *flags]), cloud, cloud.sleep)


def verbs(cloud, *, without=("describe", "list")):
    """What was asked of gcloud in order; of ssh, the worker's action."""
    named = []
    for words in cloud.log:
        words = [word for word in words if word != "alpha"]
        if words[4] == "ssh":
            named.append(re.search(r"worker.py (\w+)", words[-1])[1])
        elif words[4] not in without:
            named.append(words[4])
    return [verb for verb in named if verb != "status"]


ONCE = ["create", "scp", "setup", "install", "start"]


def end(cloud, *flags):
    """What the launch ends with: nothing, or the words of its error."""
    try:
        make(cloud, *flags).run()
    except UserError as error:
        return str(error)
    return ""


class Script(Cloud):
    """A platform on which each event happens at the commands or minutes whose numbers are given."""

    def __init__(self, run=None, kind="v5p-16", count=1, **times):
        super().__init__(0, run, kind, count)
        self.times, self.asked = times, {}

    def happens(self, event):
        self.asked[event] = self.asked.get(event, 0) + 1
        return self.asked[event] in self.times.get(event, ())


ALWAYS = range(1, 10_000)


def test_a_run_from_the_request_to_the_end():
    cloud = Cloud()
    make(cloud).run()
    assert verbs(cloud) == [*ONCE, "delete"]
    assert cloud.run_state.finished and not cloud.state


# --- what went wrong on real platforms ---------------------------------------------------------------------------------


def test_a_failing_installation_is_no_preemption(capsys):
    cloud = Script(install_fails=ALWAYS)
    error = end(cloud)
    assert "install on tanuki-w-0 and 1 more workers: the installation ended" in error and "no matching distribution" in error
    assert cloud.counts["create"] == 1 and not cloud.counts["delete"]
    assert "the slices are left (ACTIVE) and cost money" in capsys.readouterr().err


@pytest.mark.parametrize("event", ["preempted", "node_lost"])
def test_after_a_preemption_everything_is_set_up_anew_and_the_run_resumes(event):
    cloud = Script(Run(steps=12), **{event: [6]})
    assert not end(cloud)
    assert verbs(cloud) == [*ONCE, "delete", *ONCE, "delete"]
    assert sorted(cloud.run_state.attempts) == [1, 2] and cloud.run_state.step == 12


@pytest.mark.parametrize("queued", ["true", "false"])
def test_slices_that_are_gone_are_never_taken_for_done(queued):
    """ssh to preempted nodes prints a traceback and returns 0."""
    cloud = Script(Run(steps=1000), preempted=ALWAYS)
    error = end(cloud, "--max_attempts=3", f"--queued={queued}")
    assert "3 times (max_attempts); nothing is running" in error and not cloud.state and cloud.counts["create"] == 3


def test_a_copy_without_a_key_in_ssh_agent_is_noticed(capsys):
    error = end(Script(no_key=ALWAYS))
    assert "2 of 2 workers did not answer" in error and "ssh-add" in error
    assert "cost money" in capsys.readouterr().err


def test_a_copy_that_failed_later_is_noticed():
    cloud = Cloud()
    make(cloud).run()
    stale = Script(no_key=ALWAYS)
    stale.state, stale.name = "ACTIVE", "tanuki"
    stale._boot()
    for worker in stale.workers:  # as after a launch with other settings
        worker.bundle["sent"] = {"launch.json": b"{}"}
    with pytest.raises(UserError, match="another launch.json is here"):
        make(stale).setup()


def test_an_error_of_describe_says_nothing_about_the_slices():
    cloud = Script(Run(steps=12), api_error=range(9, 25))
    assert not end(cloud) and verbs(cloud) == [*ONCE, "delete"]
    silent = Script(Run(steps=1000), api_error=range(20, 100))
    assert "the platform does not answer" in end(silent) and verbs(silent) == ONCE and silent.state == "ACTIVE"


def test_every_command_is_short_however_many_workers_there_are():
    """gcloud serves 64 workers at once: the 65th would not start before the first has ended."""
    cloud = Script(kind="v5p-512")
    assert not end(cloud, "--type=v5p-512")
    assert len(cloud.run_state.attempts[1]["started"]) == 64
    two = Script(kind="v5p-512", count=2)
    assert not end(two, "--type=v5p-512", "--slices=2") and len(two.run_state.attempts[1]["started"]) == 128


def test_a_command_that_gcloud_repeats_starts_nothing_twice():
    cloud = Script(repeated=ALWAYS)
    assert not end(cloud) and sorted(cloud.run_state.attempts) == [1]


@pytest.mark.parametrize("event", ["killed", "stopped", "reboot"])
def test_a_run_that_ended_goes_on_where_it_is(event):
    cloud = Script(Run(steps=12), **{event: [4]})
    assert not end(cloud)
    assert verbs(cloud) == [*ONCE, "stop", "start", "delete"] and sorted(cloud.run_state.attempts) == [1, 2]


def test_a_lost_connection_is_not_the_end_of_the_run():
    cloud = Script(Run(steps=30), ssh_lost=range(10, 25))
    assert not end(cloud) and sorted(cloud.run_state.attempts) == [1]


def test_workers_that_never_answer_are_left_alone(capsys):
    cloud = Script(Run(steps=100_000), ssh_lost=range(10, 200))
    assert "1 of 2 workers did not answer" not in (error := end(cloud)) and "not answer" in error and cloud.state == "ACTIVE"
    assert "cost money" in capsys.readouterr().err


def test_a_machine_that_was_replaced_gets_the_project():
    cloud = Script(Run(steps=12), replaced=[4])
    assert not end(cloud)
    assert verbs(cloud)[-4:] == ["stop", "start", "start", "delete"] or "install" in verbs(cloud)[5:]


def test_bad_input_ends_it_with_the_runs_own_words(capsys):
    cloud = Script(bad_input=[3])
    error = end(cloud)
    assert "exit code 1" in error and "tanuki: config: no such file" in error and sorted(cloud.run_state.attempts) == [1]
    assert "cost money" in capsys.readouterr().err
    assert not end(cloud)  # once it is mended the same command goes on, on the same slices
    assert sorted(cloud.run_state.attempts) == [1, 2] and cloud.counts["create"] == 1


def test_an_exit_code_of_0_without_the_runs_own_sign_is_not_done():
    cloud = Cloud()
    finish = cloud._end_all

    def unfinish(code=134, **rest):
        cloud.run_state.finished = False
        finish(code, **rest)

    cloud._end_all = unfinish
    assert "summary.json does not list every stage" in end(cloud)
    assert sorted(cloud.run_state.attempts) == [1] and cloud.state


def test_restarts_that_get_nowhere_are_capped():
    cloud = Script(killed=ALWAYS)
    assert "3 restarts without a new checkpoint; exit codes: tanuki-w-0 137" in end(cloud, "--max_restarts=3")
    assert cloud.counts["create"] == 1


def test_a_quota_is_an_error_and_missing_capacity_is_asked_for_again():
    cloud = Script(quota=[1])
    assert "quota" in end(cloud) and not cloud.state
    assert not end(Script(stockout=[1, 2]))
    capped = Script(stockout=ALWAYS)
    assert "4 times (max_attempts)" in end(capped, "--max_attempts=4") and capped.counts["create"] == 4


def test_a_request_whose_answer_was_lost_is_found():
    cloud = Script(answer_lost=[1])
    assert not end(cloud) and cloud.counts["granted"] == 1


def test_a_preempted_vm_is_deleted_before_it_is_made_again():
    cloud = Script(Run(steps=12), preempted=[6])
    assert not end(cloud, "--queued=false")
    assert verbs(cloud) == [*ONCE, "delete", *ONCE, "delete"]
    assert all(words[3] == "tpu-vm" for words in cloud.log)


def test_a_launch_that_was_interrupted_finds_the_run_again(capsys):
    cloud = Script(Run(steps=12))
    watch(cloud, 8)
    assert "the run goes on there" in capsys.readouterr().err and not cloud.counts["delete"]
    assert not end(cloud) and sorted(cloud.run_state.attempts) == [1] and verbs(cloud) == [*ONCE, "delete"]


def watch(cloud, looks, *flags):
    """A launch that is interrupted after some looks at a run that goes on."""
    launch, left = make(cloud, *flags), iter(range(looks))

    def sleep(seconds):
        if next(left, None) is None:
            raise KeyboardInterrupt
        cloud.sleep(seconds)

    launch._sleep = sleep
    with pytest.raises(KeyboardInterrupt):
        launch.run()


def test_stop_is_not_undone_by_who_watches():
    cloud = Cloud(run=Run(steps=1000))
    watch(cloud, 6)
    launch = make(cloud)
    looks = iter(range(3))

    def sleep(seconds):
        if next(looks, None) is None:
            make(cloud).stop()  # from another terminal
        cloud.sleep(seconds)

    launch._sleep = sleep
    with pytest.raises(UserError, match="told to stop; the same command goes on"):
        launch.run()
    assert sorted(cloud.run_state.attempts) == [1] and cloud.state == "ACTIVE"
    cloud.run_state.steps = cloud.run_state.step + 4
    assert not end(cloud) and sorted(cloud.run_state.attempts) == [1, 2] and cloud.counts["create"] == 1


def test_a_list_that_lacks_a_slice_says_nothing():
    cloud = Script(Run(steps=12), kind="v5p-8", count=2, partial_list=range(3, 9))
    assert not end(cloud, "--type=v5p-8", "--slices=2") and cloud.counts["create"] == 1


@pytest.mark.parametrize("queued", ["true", "false"])
@pytest.mark.parametrize("word", ["REPAIRING", "RESTARTING", "REIMAGING", "A_NEW_WORD"])
def test_a_machine_that_is_being_repaired_is_waited_for(word, queued):
    cloud = Script(Run(steps=12), repaired=[4])
    cloud.random.choice = lambda values: word if word in values or "REPAIRING" in values else values[0]
    cloud_repairs.add(word)
    assert not end(cloud, f"--queued={queued}") and cloud.counts["create"] == 1 and sorted(cloud.run_state.attempts) == [1, 2]


def test_of_two_launches_of_one_name_none_deletes_what_the_other_has_just_got():
    cloud = Cloud(run=Run(steps=12))
    watch(cloud, 6)
    launch, created = make(cloud), cloud.created
    cloud.state, cloud.nodes = "", {}  # lost, and asked for again by the other launch
    watch(cloud, 4)
    assert cloud.created != created
    launch._delete(created)
    assert cloud.state == "ACTIVE" and not cloud.counts["delete"]


def test_slices_on_which_a_run_may_go_on_are_never_deleted():
    cloud = Cloud(run=Run(steps=1000))
    watch(cloud, 6)
    assert "other settings or code is alive" in end(cloud, "--delete=always", "--config.stages.a.steps=9")
    assert cloud.state == "ACTIVE" and cloud.workers[0].alive


def test_a_look_without_an_answer_is_not_a_machine_without_a_run():
    cloud = Cloud(run=Run(steps=1000))
    watch(cloud, 6)
    asked = iter(range(10_000))
    cloud.happens = lambda event: event == "ssh_lost" and next(asked) < 2  # one whole look
    assert "other settings or code is alive" in end(cloud, "--config.stages.a.steps=9")
    assert sorted(cloud.run_state.attempts) == [1] and verbs(cloud) == ONCE


def test_a_setup_that_never_ends_on_one_machine_is_no_preemption(capsys):
    cloud = Cloud()
    cloud.happens = lambda event: event == "hangs" and cloud.hanging()
    calls = iter(range(10_000))
    cloud.hanging = lambda: next(calls) % 2 == 1  # the second worker, always
    assert "do not answer, on 3 requests in a row; does `setup` end?" in end(cloud)
    assert cloud.counts["create"] == 3


def test_a_request_that_was_not_granted_in_time_is_the_end():
    assert "not granted within valid_until=2h" in end(Script(fails=ALWAYS), "--valid_until=2h")


def test_the_first_start_is_no_restart(capsys):
    assert not end(Script(Run(steps=12), killed=[4]), "--max_restarts=1")
    shown = capsys.readouterr().err
    assert shown.count("starting it again") == 1


def test_delete_says_what_it_did(capsys):
    cloud = Cloud()
    make(cloud).create()
    make(cloud).delete()
    cloud.sleep(60)
    make(cloud).delete()
    assert capsys.readouterr().err == "launch: deleted tanuki in us-east5-a\nlaunch: there is no tanuki in us-east5-a\n"


def test_other_settings_are_for_another_attempt(capsys):
    cloud = Cloud(run=Run(steps=12))
    assert not end(cloud, "--delete=never")
    assert not end(cloud, "--delete=never") and sorted(cloud.run_state.attempts) == [1]  # it was done
    cloud.run_state.steps = 20
    assert not end(cloud, "--delete=never", "--config.stages.a.steps=9") and sorted(cloud.run_state.attempts) == [1, 2]
    cloud.run_state.steps = 1000
    make(cloud, "--config.stages.a.steps=10").setup()
    make(cloud, "--config.stages.a.steps=10").start()
    assert "other settings or code is alive" in end(cloud, "--config.stages.a.steps=9") and cloud.state == "ACTIVE"


@pytest.mark.parametrize("delete, kept", [("done", False), ("always", False), ("never", True)])
def test_the_slices_are_deleted_when_it_is_done(delete, kept, capsys):
    cloud = Cloud()
    assert not end(cloud, f"--delete={delete}") and bool(cloud.state) == kept
    failed = Script(bad_input=[3])
    assert end(failed, f"--delete={delete}") and bool(failed.state) == (delete != "always")
    assert capsys.readouterr().err.count("cost money") == kept + (delete != "always")


CHAOS = {
    "fails": 0.05,
    "preempted": 0.03,
    "node_lost": 0.02,
    "reboot": 0.02,
    "replaced": 0.02,
    "killed": 0.02,
    "stopped": 0.02,
    "bad_input": 0.002,
    "api_error": 0.1,
    "stockout": 0.1,
    "quota": 0.01,
    "answer_lost": 0.1,
    "no_key": 0.03,
    "ssh_lost": 0.05,
    "repeated": 0.1,
    "unreachable": 0.02,
    "install_fails": 0.05,
    "repaired": 0.02,
    "partial_list": 0.05,
    "setup_hangs": 0.02,
}


KINDS = [("v5p-8", 1), ("v5p-16", 1), ("v6e-16", 2)]


@pytest.mark.parametrize(
    "kind, count, number",
    [*((*kind, 8) for kind in KINDS), *(pytest.param(*kind, 80, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_random_sequences_of_what_goes_wrong(kind, count, number, capsys):
    """Never more requests than the cap, nothing left running without a word, never done without the run's own sign."""
    ends = {"done": 0, "error": 0}
    for seed in range(number):
        cloud = Cloud(seed, Run(steps=24), kind, count, **CHAOS)
        launch = make(cloud, f"--type={kind}", f"--slices={count}", "--max_attempts=8")
        error = ""
        try:
            launch.run()
        except UserError as caught:
            error = str(caught)
        output = capsys.readouterr().err
        assert cloud.counts["create"] <= 8
        if error:
            assert not cloud.run_state.finished or "could not be deleted" in error or cloud.counts["create"] == 8, (seed, error)
            known = "quota|max_attempts|exit code 1|installation ended|setup command did not|restarts without|not answer"
            assert re.search(known + "|could not be deleted", error), error
        else:
            assert cloud.run_state.finished, seed
        if cloud.state:
            assert "cost money" in output and "tanuki launch tpu delete --name=tanuki" in output, seed
        # What ended it was one of the things that end it.
        if cloud.counts["bad_input"] == cloud.counts["quota"] == 0 and cloud.counts["create"] < 8:
            assert not error or re.search("the installation ended|setup command did not end|answer", error), (seed, error)
        ends["error" if error else "done"] += 1
    assert ends["done"] >= number // 2, ends


@pytest.mark.parametrize("action", ["setup", "install", "start", "logs", "stop"])
def test_what_needs_slices_says_that_there_are_none(action):
    with pytest.raises(UserError, match="there is no tanuki in us-east5-a; `run` or `create` asks for slices"):
        tpu.launch(action, launch_settings.read("tpu", None, BASE), Cloud())


def test_what_is_not_committed_is_told(monkeypatch, capsys):
    monkeypatch.setattr(bundle, "uncommitted", lambda: 2)
    assert not end(Cloud()) and "2 files of this checkout are not committed" in capsys.readouterr().err
