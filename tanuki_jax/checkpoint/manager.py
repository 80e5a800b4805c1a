"""The saves of a stage while it runs: asynchronous, atomic, restored on any mesh; by Orbax."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tanuki_jax import files, multihost
from tanuki_jax.checkpoint import checksums
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock

ORBAX_THREADS = ("async_save", "save_finalize", "write_metadata_after_commits")
CHUNK = 128 << 20  # bytes
POLL = 0.02  # seconds
SAVE_SECONDS = 1800  # that a save may take in the background, before it is an error
KEEP_ALL = 1_000_000  # keep all checkpoints: for opening without deleting


class _Manager(ocp.CheckpointManager):
    """Leaves preemption to the loop.

    JAX's service stops all processes one call after the last count that any asked with; Orbax asks with its own step number,
    which made a run that had been resumed at step n go on for n more steps.
    """

    def reached_preemption(self, step: int) -> bool:
        """Never; see `parallel.told_to_stop`."""
        return False


class _Pinned(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps chosen steps."""

    def __init__(self) -> None:
        self.steps: set[int] = set()

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """One answer for each checkpoint."""
        return [info.step in self.steps for info in checkpoints]


class Checkpoints:
    """The checkpoints of one stage: the `keep` newest, and those that the last save was told to keep.

    Opening them writes nothing, since another run may be saving there.  What a killed run left of a save is removed by the
    first save, which only the holder of the workdir's lock may begin.
    """

    def __init__(self, stage_directory: Path, keep: int = 1) -> None:
        self.directory = files.absolute(stage_directory) / "checkpoints"
        self._pinned = _Pinned()
        policies = [ocp.checkpoint_managers.LatestN(keep), self._pinned]
        several = set(range(jax.process_count())) if jax.process_count() > 1 else None
        options = ocp.CheckpointManagerOptions(
            create=False,
            # Naming the processes makes Orbax meet through the coordination service, where every wait has a time-out.
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=several),
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
            cleanup_tmp_directories=False,
        )
        with files.disk_errors(self.directory):
            self._manager = _Manager(self.directory, options=options)
        self._given_up = self._begun = False
        self._sealing: threading.Thread | None = None
        self._unsealed: OSError | None = None  # why the sums could not be written

    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All steps of which there is a checkpoint, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def resume(
        self, like: Any, check: Callable[[dict[str, Any]], None], told: Callable[[int, str], None]
    ) -> tuple[int, Any] | None:
        """The newest step that is whole and its state, with the shardings of `like`; `check` sees the meta before.

        Damaged steps are told and put aside as `damaged-<step>`.  A step whose sums were not written, because the run was
        killed in between, cannot be verified; it is tried only where there is no other.
        """
        waiting = _from_process_zero(
            sorted((checksums.has_checksums(self.directory / str(step)), step) for step in self.steps())
        )
        while waiting:
            sealed, step = waiting.pop()
            wrong, state = (
                multihost.first_error(
                    checksums.find_corruption(self.directory / str(step), *multihost.process_slice()), "check sums"
                ),
                None,
            )
            if not wrong:
                try:
                    check(self.meta(step))
                    state = self.restore(step, like)
                except UserError:
                    raise
                except Exception as error:  # whatever a damaged file makes of Orbax
                    if sealed:
                        raise
                    wrong = f"it cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"
                wrong = multihost.first_error(wrong, "restoring")
            if not wrong:
                for later in (s for _, s in waiting if s > step):
                    told(later, "the run was killed before its check sums were written")
                    self._put_aside(later, "damaged")
                return step, state
            told(step, wrong)
            self._put_aside(step, "damaged")
        return None

    def go_back(self, step: int) -> int:
        """To the newest checkpoint up to `step` once the last save is done; later ones are put aside as `left-<step>`.

        Returns its step, 0 where there is none.
        """
        with self._saving():
            self._wait()
        steps = _from_process_zero(self.steps())
        for later in (s for s in steps if s > step):
            self._put_aside(later, "left")
        return max((s for s in steps if s <= step), default=0)

    def _put_aside(self, step: int, why: str) -> None:
        def move() -> None:
            target = self.directory / f"{why}-{step}"
            shutil.rmtree(target, ignore_errors=True)
            (self.directory / str(step)).rename(target)

        multihost.on_process_zero(move, "putting a checkpoint aside")
        self._manager.reload()

    def save(self, step: int, state: Any, meta: dict[str, Any], kept: Iterable[int] = ()) -> None:
        """Starts writing a train state (train/step.py); its arrays are copied before this returns, so it may be donated.

        kept: the steps that stay however old they are; all others do not.
        Errors of the save before come up here or in `close`.
        """
        self._pinned.steps = set(kept)
        optimizer = {"opt_state": state.opt_state, "step": state.step, "rate": state.lr_scale}
        optimizer["key"] = jax.random.key_data(state.key)
        balance = {"balance": state.balance} if state.balance else {}
        self.save_items(step, {"params": state.params, "optimizer": optimizer, **balance}, meta)

    def save_items(self, step: int, trees: dict[str, Any], meta: dict[str, Any]) -> None:
        """The same for named trees of arrays."""
        items = {name: ocp.args.StandardSave(tree, save_args=_by_layer(tree)) for name, tree in trees.items()}
        with self._saving():
            self._wait()
            self._probe(trees)
            self._begin()
            self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave({"step": step, **meta})))
            self._sealing = threading.Thread(target=self._seal, args=(step,), name="seal", daemon=True)
            self._sealing.start()

    def check(self) -> None:
        """Raises what went wrong with the last save, if that is known already; waits for nothing."""
        if not self._sealing or self._manager.is_saving_in_progress():
            return
        with self._saving():
            self._manager.wait_until_finished()  # which it has: this raises what its thread met with
            if not self._sealing.is_alive():
                self._wait()

    def _begin(self) -> None:
        """Before the first save, removes what a killed run left of one."""
        if not self._begun:
            multihost.on_process_zero(lambda: _remove_unfinished(self.directory), "removing unfinished saves")
        self._begun = True

    def _probe(self, trees: dict[str, Any]) -> None:
        """An OSError on all processes where one cannot write here, or there is no room: some would find out in the middle of a
        save, and the others wait for them.  A UserError where the run's lock is another's by now.
        """
        multihost.on_process_zero(lock.check, "the lock on the workdir")
        probe, size = self.directory / f".probe-{jax.process_index()}", sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        wrong = ""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(bytes(4096))
            probe.unlink()
            if shutil.disk_usage(self.directory).free < size / 2:  # it may be compressed
                wrong = "No space left on device"
        except OSError as error:
            wrong = str(error)
            with suppress(OSError):
                probe.unlink()
        if wrong := multihost.first_error(wrong, "a save"):
            raise OSError(wrong)

    def _seal(self, step: int) -> None:
        """Once the save is whole, writes the sums of its files."""
        home = self.directory / str(step)
        while not home.is_dir():  # Orbax gives it its name last
            if self._given_up:
                return
            time.sleep(POLL)
        try:
            checksums.write_checksums(home, *multihost.process_slice())
        except FileNotFoundError:
            pass  # retention was faster
        except OSError as error:
            self._unsealed = error

    def _wait(self) -> None:
        """Until the last save is durable and sealed; raises what went wrong with it."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        if self._sealing:
            self._sealing.join()
            self._sealing = None
        if self._unsealed:
            raise self._unsealed

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, with the shardings of `like` (a tree of ShapeDtypeStructs)."""
        key = jax.eval_shape(jax.random.key_data, like.key)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=like.step.sharding)
        optimizer = {"opt_state": like.opt_state, "step": like.step, "rate": like.lr_scale, "key": key}
        balance = {"balance": like.balance} if like.balance else {}
        saved = self.restore_items(step, {"params": like.params, "optimizer": optimizer, **balance})
        optimizer = saved.pop("optimizer")
        optimizer |= {"key": jax.random.wrap_key_data(optimizer["key"]), "lr_scale": optimizer.pop("rate")}
        return dataclasses.replace(like, **saved, **optimizer)

    def restore_items(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Some of the named trees of a step."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in like}

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def close(self) -> None:
        """Waits for the last save to be durable."""
        if self._given_up:
            return
        with self._saving():
            self._wait()
            self._manager.close()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """A save that fails leaves nothing half-written behind, and no thread that still writes."""
        try:
            with files.disk_errors(self.directory):
                yield
        except BaseException:
            self._given_up = True
            join_orbax()
            with suppress(Exception):
                self._manager.close()
            if self._begun and jax.process_index() == 0:
                with suppress(UserError):  # nothing where another run writes by now
                    lock.check()
                    _remove_unfinished(self.directory)
            raise


def _remove_unfinished(directory: Path) -> None:
    for unfinished in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _from_process_zero(found: Any) -> Any:
    """What process 0 sees of a shared file system, on all processes."""
    return json.loads(multihost.all_gather_text(json.dumps(found), "checkpoints")[0])


def join_orbax() -> None:
    """Waits for Orbax's threads, half a minute for all together."""
    until = time.monotonic() + 30
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax") or thread.name in ORBAX_THREADS:
            # Orbax's own join would raise the error once more
            threading.Thread.join(thread, max(0.0, until - time.monotonic()))


def _by_layer(tree: Any) -> Any:
    """Chunks on disk of at most CHUNK bytes; what is stacked is cut between layers, so that one can be read alone."""

    def chunks(path: Any, leaf: Any) -> ocp.SaveArgs:
        stacked = any(getattr(part, "key", None) == "layers" for part in path)
        return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if stacked else ())

    return jax.tree_util.tree_map_with_path(chunks, tree)
