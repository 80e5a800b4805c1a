"""What went wrong once in long runs, at the seams between loop, checkpoints, watch and command line."""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
import types

import jax
import pytest
from orbax.checkpoint._src.path import atomicity

from tanuki_jax import checkpoint, config, model
from tanuki_jax.checkpoint import Checkpoints, checksums
from tanuki_jax.cli.main import main
from tanuki_jax.errors import Preempted, UserError
from tanuki_jax.multihost import watchdog
from tanuki_jax.recipe import artifacts, preflight
from tanuki_jax.recipe import run as run_module
from tanuki_jax.report import trackers
from tests import tiny_recipe
from tests.checkpoint.test_checksums import saved, state_of
from tests.tiny import init, small
from tests.train.test_keep import kept, validated
from tests.train.test_loop import job, run, train_step


def interrupted(first, end=6, bad=()):
    for n in range(first, end):
        yield float("nan") if n in bad else n
    raise KeyboardInterrupt


def test_a_run_whose_validation_loss_was_nan_goes_on(tmp_path):
    options = dict(steps=9, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, **options), interrupted, probes=[(1, lambda params: {"validation/ja/loss": float("nan")})])
    assert run(job(tmp_path, **options)).step == 9


def test_the_best_checkpoint_is_remembered_though_its_step_was_left_out(tmp_path):
    """The gradient of step 4 was not finite; its parameters, those of step 3, have the lowest loss all the same."""
    options, losses = (
        dict(steps=10, save_every=1, keep_latest=1, keep_best=1),
        [5.0, 3.0, 4.0, 1.0, 2.0, 6.0, 1.5, 7.0, 8.0, 9.0],
    )
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, **options), lambda first: interrupted(first, bad=[3]), probes=validated(losses))
    assert 4 in kept(tmp_path)
    run(job(tmp_path, **options), probes=validated(losses[6:]))
    assert kept(tmp_path) == [4, 10]


def test_a_checkpoint_whose_validation_loss_is_nan_is_not_the_best(tmp_path):
    run(job(tmp_path, steps=4, save_every=1, keep_latest=1, keep_best=1), probes=validated([float("nan"), 3.0, 2.0, 4.0]))
    assert kept(tmp_path) == [3, 4]


def test_a_run_that_never_goes_back_is_saved_though_its_loss_stays_high(tmp_path):
    """With spike_steps=0 a level that the loss keeps is a spike for ever, and all that is saved would be what was before."""

    def batches(first):
        for n in range(first, 80):
            yield 2.0 if n < 30 else 20.0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, steps=100, save_every=10, guard=config.Guard(spike_steps=0)), batches)
    assert kept(tmp_path)[-1] >= 70


def test_every_kth_cannot_be_kept_where_it_is_not_saved():
    c = tiny_recipe.get_config()
    c.stages.pretrain.update(dict(save_every=3, keep_every=10))
    with pytest.raises(UserError, match="keep_every"):
        config.resolve(c)


def test_a_broken_pipe_in_the_middle_of_a_run_is_no_success(tmp_path, monkeypatch):
    """A launcher that hears 0 takes the run for done."""

    def logger_is_gone(*args):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(run_module, "run_recipe", logger_is_gone)
    assert main(["run", tiny_recipe.CONFIG, f"--workdir={tmp_path}"]) != 0


def test_a_hang_in_the_first_step_of_a_resumed_run_names_that_step(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog.coordination, "wait_seconds", lambda: 0.3)
    monkeypatch.setattr(watchdog, "TICK", 0.05)
    options = dict(guard=config.Guard(step_timeout_seconds=0.0))
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, **options), interrupted)

    def slow(state, batch):
        time.sleep(0.8 if batch == 6 else 0.0)
        return train_step(state, batch)

    run(job(tmp_path, **options), step=slow)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["what"]) for e in events if e["event"] == "hang"] == [(7, "compile after step 6")]


def test_an_emergency_save_may_take_longer_than_a_step(tmp_path, monkeypatch):
    """step_timeout_seconds is of a step: the wait for the last save has the limit of a save."""
    exits, seal = [], checksums.write_checksums
    monkeypatch.setattr(watchdog.os, "_exit", exits.append)
    monkeypatch.setattr(watchdog, "TICK", 0.05)
    monkeypatch.setattr(checksums, "write_checksums", lambda *args: (time.sleep(1.5), seal(*args)))

    def told(first):
        for n in range(first, 1000):
            if n == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield n

    with pytest.raises(Preempted):
        run(job(tmp_path, save_every=100, guard=config.Guard(step_timeout_seconds=0.6)), told)
    assert exits == []


def test_a_save_that_failed_before_going_back_does_not_hang_the_end(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 2)

    async def full(self, *args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", full)
    checkpoints.save(4, state_of(4.0), {"model": {}})

    def back_and_close():
        with pytest.raises((UserError, OSError)):
            checkpoints.go_back(2)
        with contextlib.suppress(UserError, OSError):
            checkpoints.close()

    closing = threading.Thread(target=back_and_close, daemon=True)  # one thread: Orbax tells each only once
    closing.start()
    closing.join(2)
    hangs, checkpoints._abandoned = closing.is_alive(), True
    assert not hangs


def test_a_wandb_that_cannot_be_reached_does_not_end_the_run(tmp_path, monkeypatch):
    def init(**settings):
        raise RuntimeError("wandb: network is unreachable")

    fake = types.ModuleType("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    c = tiny_recipe.get_config()
    c.wandb_project = "p"
    with trackers.open_trackers(config.resolve(c), tmp_path) as tell:
        tell("pretrain", {"step": 1, "loss": 2.0})


def test_a_stage_that_is_not_to_run_needs_no_room(tmp_path, monkeypatch, capfd):
    loaded = config.resolve(tiny_recipe.get_config())
    free = types.SimpleNamespace(free=preflight.checkpoint_bytes(loaded, "pretrain") + 1)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: free)

    def prepare(*args):
        raise UserError("preflight is over")

    monkeypatch.setattr(artifacts, "prepare_tokenizer", prepare)
    assert main(["train", tiny_recipe.CONFIG, f"--workdir={tmp_path}", "--stage=pretrain"]) == 1
    assert "tanuki: preflight is over" in capfd.readouterr().err


def test_adapters_on_a_base_of_another_dtype_come_merged_in_their_own(tmp_path):
    base, home, cfg, options = tmp_path / "base", tmp_path / "sft", small(), config.Lora(rank=2)
    half = small(param_dtype="bfloat16")
    checkpoint.save_params(base, init(half, jax.random.key(0)), {"model": config.to_dict(half)})
    params = model.lora.init_adapters(cfg, options, jax.random.key(1))[0]
    told = checkpoint.adapters_meta(home, base, model.lora.ranks(cfg, options), model.lora.scales(cfg, options))
    checkpoint.save_params(home, params, {"model": config.to_dict(cfg), "adapter": told})
    loaded = checkpoint.load(home)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {loaded.cfg.param_dtype}


@pytest.mark.parametrize(
    ("files", "secret"),
    [
        ("texts/part-??/monkey=1/*.jsonl.gz", False),  # ? is a wildcard, and the folder a partition
        ("a/shard-?.jsonl,b/lang_key=ja/*.jsonl", False),
        ("https://a.blob.core.windows.net/c/texts.jsonl?sv=2024-05-04&se=2027-01-01&sig=abc%3D", True),  # Azure's
    ],
)
def test_a_secret_in_an_address_and_what_only_looks_like_one(files, secret):
    c = tiny_recipe.get_config()
    c.data.ja = files
    with pytest.raises(UserError, match="password or key") if secret else contextlib.nullcontext():
        config.resolve(c)


def test_sigusr1_before_the_first_step_does_not_kill_the_run(tmp_path, monkeypatch):
    found, resume, before = [], Checkpoints.resume, signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    monkeypatch.setattr(Checkpoints, "resume", lambda *args: (found.append(signal.getsignal(signal.SIGUSR1)), resume(*args))[1])
    run(job(tmp_path, steps=1))
    signal.signal(signal.SIGUSR1, before)
    assert found != [signal.SIG_DFL]
