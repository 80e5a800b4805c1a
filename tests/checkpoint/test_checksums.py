"""Sums of a checkpoint's files, and which checkpoint is the newest good one."""

import contextlib
import errno
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import multihost_utils
from orbax.checkpoint._src.path import atomicity

from tanuki_jax.checkpoint import Checkpoints, checksums, manager
from tanuki_jax.errors import UserError
from tanuki_jax.train.step import State


def state_of(value):
    return State(jnp.int32(0), {"w": jnp.full(4, value)}, {"m": jnp.zeros(4)}, jax.random.key(0))


STATE = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state_of(0.0))


def saved(directory, *steps, keep=2):
    """Checkpoints of some steps, whose parameters are the step."""
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, state_of(float(step)), {"model": {}})
    checkpoints.go_back(max(steps))  # waits until all is sealed
    return checkpoints


def newest(checkpoints, told):
    """The step that a run would go on from."""
    return (checkpoints.resume(STATE, lambda meta: None, told) or (None,))[0]


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A real checkpoint of a tiny state."""
    directory = tmp_path_factory.mktemp("step")
    saved(directory, 1).close()
    return directory / "checkpoints" / "1"


def contents(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def test_what_was_written_is_good(step):
    assert checksums.find_corruption(step) == "" and contents(step)


def test_every_bit_counts(step):
    """All of a small file, some of each other."""
    rng = np.random.default_rng(0)
    small = min(contents(step), key=lambda path: path.stat().st_size)
    for path in contents(step):
        data = path.read_bytes()
        bits = 8 * len(data)
        for bit in range(bits) if path == small else rng.integers(0, bits, 60 if path.name == "sums-0-of-1.json" else 6):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            assert checksums.find_corruption(step), (path, bit)
        path.write_bytes(data)
    assert checksums.find_corruption(step) == ""


def test_a_file_cut_anywhere_or_gone_is_found(step):
    for path in contents(step):
        data = path.read_bytes()
        last = len(data) - 1 - (path.name == "sums-0-of-1.json")  # its last newline says nothing
        for length in {0, len(data) // 2, last} - {len(data)}:
            path.write_bytes(data[:length])
            assert checksums.find_corruption(step), (path, length)
        if not path.name.startswith("sums-"):
            path.unlink()
            assert checksums.find_corruption(step) == f"{path.relative_to(step)} is missing"
        path.write_bytes(data)
    assert checksums.find_corruption(step) == ""


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_every_file_is_looked_at_by_one_process_whoever_wrote_the_sums(tmp_path_factory, blobs, writers, readers, data):
    step = tmp_path_factory.mktemp("shared")
    for n, blob in enumerate(blobs):
        path = step / f"item{n % 3}" / f"{n}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(blob)
    for process in range(writers):
        checksums.write_checksums(step, process, writers)
    assert not any(checksums.find_corruption(step, n, readers) for n in range(readers))
    hurt = data.draw(st.sampled_from(sorted(p for p in step.rglob("item*/*"))))
    hurt.write_bytes(hurt.read_bytes() + b"!")
    assert sum(bool(checksums.find_corruption(step, n, readers)) for n in range(readers)) == 1
    item = hurt.parent.name
    assert checksums.find_corruption(step, item=item) and not checksums.find_corruption(
        step, item="item" + str((int(item[4:]) + 1) % 3)
    )


@pytest.mark.parametrize("shape", [(), (3,), (5, 0), (1000, 1100), (7, 9)])
def test_what_is_written_with_its_sum_is_good_and_not_read_again(tmp_path, monkeypatch, shape):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    path = tmp_path / "item" / "good"
    path.parent.mkdir()
    entry = checksums.write(path, array.T)
    assert path.read_bytes() == array.T.tobytes()
    assert entry == checksums._checksum(path)
    with monkeypatch.context() as patched:
        patched.setattr(checksums, "_checksum", lambda path: pytest.fail(f"{path} is read again"))
        checksums.write_checksums(tmp_path, 0, 1, {"item/good": entry})
    assert not checksums.find_corruption(tmp_path)
    path.write_bytes(path.read_bytes() + b"!")
    assert checksums.find_corruption(tmp_path)


def test_a_disk_that_cannot_read_a_file_is_damage_too(step, monkeypatch):
    opened = type(step).open

    def bad_sector(path, mode="r", *args, **more):
        if mode == "rb" and path.name == "_METADATA":
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, mode, *args, **more)

    monkeypatch.setattr(type(step), "open", bad_sector)
    assert "_METADATA" in checksums.find_corruption(step)


def test_checksums_of_a_step_that_retention_removed_leaves_nothing(tmp_path):
    gone = tmp_path / "checkpoints" / "4"
    gone.parent.mkdir()
    with contextlib.suppress(FileNotFoundError):
        checksums.write_checksums(gone, 0, 1)
    assert not gone.exists()


def test_sums_of_a_file_that_goes_while_they_are_made_do_not_break_reading(step, tmp_path, monkeypatch):
    home = tmp_path / "1"
    shutil.copytree(step, home)
    monkeypatch.setattr(checksums, "_contents", lambda step, real=checksums._contents: [*real(step), step / "gone"])
    checksums.write_checksums(home, 0, 1)
    (home / "gone").write_bytes(b"back")
    assert isinstance(checksums.find_corruption(home), str)


# --- which checkpoint -----------------------------------------------------------------------------------------------------


def hurt(step):
    path = next(p for p in contents(step / "params") if p.stat().st_size > 20)
    path.write_bytes(path.read_bytes()[:-1])


def test_the_newest_good_one_is_taken_and_the_others_put_aside(tmp_path):
    saved(tmp_path, 2, 4, 6, keep=5).close()
    for step in (4, 6):
        hurt(tmp_path / "checkpoints" / str(step))
    told, checkpoints = [], Checkpoints(tmp_path, keep=5)
    assert newest(checkpoints, lambda step, wrong: told.append(step)) == 2 and told == [6, 4]
    assert float(checkpoints.restore(2, STATE).params["w"][0]) == 2.0
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "damaged-4", "damaged-6"]
    again = Checkpoints(tmp_path, keep=5)
    assert newest(again, pytest.fail) == 2
    again.close()


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("whole", [True, False])
def test_a_run_killed_before_the_sums_of_its_newest_step_were_written(tmp_path, keep, whole):
    """It cannot be verified: the one before is taken; where there is none, it is tried, and failing to read it is no error."""
    saved(tmp_path, 2, 4, keep=keep).close()
    (tmp_path / "checkpoints/4/sums-0-of-1.json").unlink()
    if not whole:
        hurt(tmp_path / "checkpoints/4")
    told, checkpoints = [], Checkpoints(tmp_path, keep)
    expected = 2 if keep == 3 else 4 if whole else None
    assert newest(checkpoints, lambda step, wrong: told.append(step)) == expected
    assert told == ([] if expected == 4 else [4])
    checkpoints.close()


@pytest.mark.parametrize("cut", ["params", "optimizer", "meta"])
def test_a_step_without_sums_that_cannot_be_read_is_told_and_the_run_starts_anew(tmp_path, cut):
    saved(tmp_path, 2).close()
    (tmp_path / "checkpoints/2/sums-0-of-1.json").unlink()
    for path in contents(tmp_path / "checkpoints/2" / cut):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    told, checkpoints = [], Checkpoints(tmp_path)
    assert newest(checkpoints, lambda step, wrong: told.append(step)) is None and told == [2]
    checkpoints.close()


def test_the_sums_of_some_processes_are_not_those_of_all(tmp_path):
    step = tmp_path / "1"
    step.mkdir()
    for n in range(3):
        assert not checksums.has_checksums(step)
        checksums.write_checksums(step, n, 3)
    assert checksums.has_checksums(step)


def test_where_all_are_damaged_there_is_none(tmp_path):
    saved(tmp_path, 2, 4).close()
    for step in (2, 4):
        hurt(tmp_path / "checkpoints" / str(step))
    checkpoints = Checkpoints(tmp_path)
    assert newest(checkpoints, lambda step, wrong: None) is None and checkpoints.steps() == []
    checkpoints.save(2, state_of(7.0), {})  # the run starts anew
    checkpoints.close()
    assert (
        checksums.find_corruption(tmp_path / "checkpoints" / "2") == ""
        and (tmp_path / "checkpoints/2/sums-0-of-1.json").is_file()
    )


def test_damage_to_a_step_that_was_put_aside_before_replaces_it(tmp_path):
    for value in (1.0, 2.0):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(2, state_of(value), {})
        checkpoints.close()
        hurt(tmp_path / "checkpoints/2")
        checkpoints = Checkpoints(tmp_path)
        assert newest(checkpoints, lambda step, wrong: None) is None
        checkpoints.close()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["damaged-2"]


def test_going_back_puts_later_steps_aside_and_the_run_saves_them_anew(tmp_path):
    checkpoints = saved(tmp_path, 2, 4, 6, keep=5)
    checkpoints.go_back(2)
    assert checkpoints.steps() == [2] and newest(checkpoints, pytest.fail) == 2
    checkpoints.save(4, state_of(40.0), {})
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=5)
    assert float(again.restore(4, STATE).params["w"][0]) == 40.0
    again.close()
    assert sorted(p.name for p in again.directory.iterdir()) == ["2", "4", "left-4", "left-6"]


def test_every_checkpoint_that_is_kept_has_its_sums(tmp_path):
    saved(tmp_path, *range(1, 9), keep=3).close()
    kept = sorted(p for p in (tmp_path / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["6", "7", "8"] and all((p / "sums-0-of-1.json").is_file() for p in kept)


def test_a_save_that_fails_leaves_no_thread_that_waits_for_it(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 2)

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(checkpoints._manager), "check_for_errors", full)
    monkeypatch.setattr(checksums, "write_checksums", lambda *args: time.sleep(0.1))
    checkpoints._checksum_thread = threading.Thread(
        target=checkpoints._write_checksums, args=(4,), name="seal"
    )  # of a step that never comes
    checkpoints._checksum_thread.start()
    with pytest.raises(UserError, match="is full"):
        checkpoints.save(6, state_of(6.0), {})
    time.sleep(0.2)
    assert "seal" not in {thread.name for thread in threading.enumerate()}


def test_only_the_loop_asks_whether_the_run_is_to_stop(tmp_path, monkeypatch):
    """JAX's service stops all one call after the last count that it was asked with; a step number would be another count."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    saved(tmp_path, 2, 4, 6, keep=2).close()
    assert not asked


def test_a_save_that_fails_in_the_background_is_noticed_before_the_next_one(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 2)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checksums, "write_checksums", full)
    checkpoints.save(4, state_of(4.0), {})
    checkpoints._checksum_thread.join()
    until = time.monotonic() + 5
    with pytest.raises(UserError, match="is full"):
        while time.monotonic() < until:  # Orbax may still be tidying up
            checkpoints.check()
            time.sleep(0.01)


def test_a_save_that_orbax_cannot_finish_is_noticed_before_the_next_one(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 2)

    async def read_only(self, *args, **more):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", read_only)
    checkpoints.save(4, state_of(4.0), {})
    until = time.monotonic() + 5
    while checkpoints._manager.is_saving_in_progress() and time.monotonic() < until:
        checkpoints.check()
        time.sleep(0.01)
    with pytest.raises(UserError, match="cannot be written to"):
        checkpoints.check()


def test_checking_a_save_that_went_well_says_nothing_and_it_is_sealed(tmp_path):
    checkpoints = saved(tmp_path, 2)
    checkpoints.save(4, state_of(4.0), {})
    until = time.monotonic() + 5
    while not checksums.has_checksums(tmp_path / "checkpoints/4") and time.monotonic() < until:
        checkpoints.check()
        time.sleep(0.01)
    checkpoints.check()
    assert newest(checkpoints, pytest.fail) == 4
    checkpoints.close()


def test_after_a_failed_save_all_of_orbax_s_threads_together_are_waited_for_half_a_minute(monkeypatch):
    """There is one for each array, and each waits for minutes for what will not come."""
    now, waited = [0.0], []

    def join(thread, timeout=None):
        waited.append(timeout)
        now[0] += timeout

    waiting = [threading.Thread(target=time.sleep, args=(1,), name="async_save", daemon=True) for _ in range(8)]
    for thread in waiting:
        thread.start()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", join)
        patch.setattr(time, "monotonic", lambda: now[0])
        manager.join_orbax()
    assert len(waited) >= 8 and sum(waited) <= 31
