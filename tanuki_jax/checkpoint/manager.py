"""The saves of a running stage: asynchronous, atomic, restored on any mesh; by Orbax."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import orbax.checkpoint as ocp

from tanuki_jax import files, multihost
from tanuki_jax.checkpoint import checksums
from tanuki_jax.checkpoint.meta import Meta
from tanuki_jax.checkpoint.sharding import Tree
from tanuki_jax.config.checkpoint_paths import checkpoints_directory, step_directory
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock

ORBAX_THREADS = ("async_save", "save_finalize", "write_metadata_after_commits")
CHUNK = 128 << 20  # bytes
POLL = 0.02  # seconds
SAVE_SECONDS = 1800  # that a save may take in the background, before it is an error
KEEP_ALL = 1_000_000  # keep all checkpoints: for opening without deleting


class TrainState(Protocol):
    """What is saved of a train state (train/step.py): arrays, or shapes of them where it says what to restore."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def step(self) -> jax.Array: ...
    @property
    def params(self) -> Tree: ...
    @property
    def opt_state(self) -> Tree: ...
    @property
    def key(self) -> jax.Array: ...
    @property
    def balance(self) -> Tree: ...
    @property
    def lr_scale(self) -> jax.Array: ...


class HasStep(Protocol):
    """What Orbax says of a checkpoint to those who decide whether it stays."""

    step: int


StateT = TypeVar("StateT", bound=TrainState)
T = TypeVar("T")


class _Manager(ocp.CheckpointManager):
    """Leaves preemption to the loop.

    JAX's service stops all processes one call after the last count that any asked with; Orbax asks with its own step number,
    which made a run that had been resumed at step n go on for n more steps.
    """

    def reached_preemption(self, step: int) -> bool:
        """Never; see `multihost.preemption_requested`."""
        return False


class _KeepSteps(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps chosen steps."""

    def __init__(self) -> None:
        self.steps: set[int] = set()

    def should_preserve(self, checkpoints: Sequence[HasStep], *, context: object) -> list[bool]:
        """One answer per checkpoint."""
        return [info.step in self.steps for info in checkpoints]


class Checkpoints:
    """The checkpoints of one stage: the `keep` newest, and those that the last save asked to keep.

    Opening them writes nothing, since another run may be saving there.  What a killed run left of a save is removed by the
    first save, which only the holder of the workdir's lock may begin.
    """

    def __init__(self, stage_directory: Path, keep: int = 1) -> None:
        self._stage_directory = files.absolute(stage_directory)
        self.directory = checkpoints_directory(self._stage_directory)
        self._keep_steps = _KeepSteps()
        policies = [ocp.checkpoint_managers.LatestN(keep), self._keep_steps]
        processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
        options = ocp.CheckpointManagerOptions(
            create=False,
            # Naming the processes makes Orbax meet through the coordination service, where every wait has a time-out.
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=processes),
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
            cleanup_tmp_directories=False,
        )
        with files.disk_errors(self.directory):
            self._manager = _Manager(self.directory, options=options)
        self._abandoned = self._started = False
        self._checksum_thread: threading.Thread | None = None
        self._checksum_error: OSError | None = None  # why the check sums could not be written

    def _step_directory(self, step: int) -> Path:
        return step_directory(self._stage_directory, step)

    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All steps of which there is a checkpoint, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def resume(
        self, like: StateT, check: Callable[[Meta], None], on_damaged: Callable[[int, str], None]
    ) -> tuple[int, StateT] | None:
        """The newest intact step and its state, with the shardings of `like`; `check` is called with the meta first.

        Damaged steps are reported to `on_damaged` and put aside as `damaged-<step>`.  A step without check sums, because the
        run was killed before they were written, cannot be verified; it is tried only if there is no other.
        """
        candidates = _from_process_zero(
            sorted((checksums.has_checksums(self._step_directory(step)), step) for step in self.steps())
        )
        while candidates:
            has_checksums, step = candidates.pop()
            damage = checksums.find_corruption(self._step_directory(step), *multihost.process_slice())
            damage, state = multihost.first_error(damage, "check sums"), None
            if not damage:
                try:
                    check(self.meta(step))
                    state = self.restore(step, like)
                except UserError:
                    raise
                except Exception as error:  # a damaged file can make Orbax raise anything
                    if has_checksums:
                        raise
                    damage = f"it cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"
                damage = multihost.first_error(damage, "restoring")
            if state is not None and not damage:
                for later in (s for _, s in candidates if s > step):
                    on_damaged(later, "the run was killed before its check sums were written")
                    self._put_aside(later, "damaged")
                return step, state
            on_damaged(step, damage)
            self._put_aside(step, "damaged")
        return None

    def go_back(self, step: int) -> int:
        """Returns the step of the newest checkpoint up to `step`, 0 if there is none; puts later ones aside as `left-<step>`.

        Waits for the last save first.
        """
        with self._abandon_on_error():
            self._wait()
        steps = _from_process_zero(self.steps())
        for later in (s for s in steps if s > step):
            self._put_aside(later, "left")
        return max((s for s in steps if s <= step), default=0)

    def _put_aside(self, step: int, prefix: str) -> None:
        def move() -> None:
            target = self.directory / f"{prefix}-{step}"
            shutil.rmtree(target, ignore_errors=True)
            self._step_directory(step).rename(target)

        multihost.on_process_zero(move, "putting a checkpoint aside")
        self._manager.reload()

    def save(self, step: int, state: TrainState, meta: Meta, keep_steps: Iterable[int] = ()) -> None:
        """Starts writing a train state; its arrays are copied before this returns, so it may be donated.

        Errors of the previous save are raised here or in `close`.

        Args:
          keep_steps: the steps that stay however old they are; no others do.
        """
        self._keep_steps.steps = set(keep_steps)
        optimizer = {"opt_state": state.opt_state, "step": state.step, "rate": state.lr_scale}
        optimizer["key"] = jax.random.key_data(state.key)
        balance = {"balance": state.balance} if state.balance else {}
        self.save_items(step, {"params": state.params, "optimizer": optimizer, **balance}, meta)

    def save_items(self, step: int, trees: Mapping[str, Tree], meta: Meta) -> None:
        """The same for named trees of arrays."""
        items = {name: ocp.args.StandardSave(tree, save_args=_by_layer(tree)) for name, tree in trees.items()}
        with self._abandon_on_error():
            self._wait()
            self._check_writable(trees)
            self._remove_leftovers()
            self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave({"step": step, **meta})))
            self._checksum_thread = threading.Thread(target=self._write_checksums, args=(step,), name="checksums", daemon=True)
            self._checksum_thread.start()

    def check(self) -> None:
        """Raises what went wrong with the last save, if that is known already; waits for nothing."""
        if not self._checksum_thread or self._manager.is_saving_in_progress():
            return
        with self._abandon_on_error():
            self._manager.wait_until_finished()  # which it is: this raises the error of its thread
            if not self._checksum_thread.is_alive():
                self._wait()

    def _remove_leftovers(self) -> None:
        """Before the first save, removes what a killed run left of one."""
        if not self._started:
            multihost.on_process_zero(lambda: _remove_unfinished(self.directory), "removing unfinished saves")
        self._started = True

    def _check_writable(self, trees: Mapping[str, Tree]) -> None:
        """Raises OSError on all processes if one of them cannot write here, or the disk is full.

        Otherwise some would notice in the middle of a save, and the others would wait for them.  Raises UserError if another
        run holds the lock by now.
        """
        multihost.on_process_zero(lock.check, "the lock on the workdir")
        probe, size = self.directory / f".probe-{jax.process_index()}", sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        reason = ""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(bytes(4096))
            probe.unlink()
            if shutil.disk_usage(self.directory).free < size / 2:  # it may be compressed
                reason = "No space left on device"
        except OSError as error:
            reason = str(error)
            with suppress(OSError):
                probe.unlink()
        if reason := multihost.first_error(reason, "a save"):
            raise OSError(reason)

    def _write_checksums(self, step: int) -> None:
        """Once the save is complete, writes the check sums of its files."""
        step_dir = self._step_directory(step)
        while not step_dir.is_dir():  # Orbax gives it its name last
            if self._abandoned:
                return
            time.sleep(POLL)
        try:
            checksums.write_checksums(step_dir, *multihost.process_slice())
        except FileNotFoundError:
            pass  # retention has removed the step already
        except OSError as error:
            self._checksum_error = error

    def _wait(self) -> None:
        """Until the last save is durable and has its check sums; raises what went wrong with it."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        if self._checksum_thread:
            self._checksum_thread.join()
            self._checksum_thread = None
        if self._checksum_error:
            raise self._checksum_error

    def restore(self, step: int, like: StateT) -> StateT:
        """The state of a step, with the shardings of `like` (a tree of ShapeDtypeStructs)."""
        key = jax.eval_shape(jax.random.key_data, like.key)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=like.step.sharding)
        optimizer = {"opt_state": like.opt_state, "step": like.step, "rate": like.lr_scale, "key": key}
        balance = {"balance": like.balance} if like.balance else {}
        saved = self.restore_items(step, {"params": like.params, "optimizer": optimizer, **balance})
        optimizer = saved.pop("optimizer")
        optimizer |= {"key": jax.random.wrap_key_data(optimizer["key"]), "lr_scale": optimizer.pop("rate")}
        return dataclasses.replace(like, **saved, **optimizer)

    def restore_items(self, step: int, like: Mapping[str, Tree]) -> dict[str, Tree]:
        """Some of the named trees of a step."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in like}

    def meta(self, step: int) -> Meta:
        """What was saved beside the arrays."""
        meta: Meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        return meta

    def close(self) -> None:
        """Waits for the last save to be durable."""
        if self._abandoned:
            return
        with self._abandon_on_error():
            self._wait()
            self._manager.close()

    @contextmanager
    def _abandon_on_error(self) -> Iterator[None]:
        """A save that fails leaves nothing half-written behind, and no thread that still writes."""
        try:
            with files.disk_errors(self.directory):
                yield
        except BaseException:
            self._abandoned = True
            join_orbax()
            with suppress(Exception):
                self._manager.close()
            if self._started and jax.process_index() == 0:
                with suppress(UserError):  # which removes nothing if another run writes here by now
                    lock.check()
                    _remove_unfinished(self.directory)
            raise


def _remove_unfinished(directory: Path) -> None:
    for unfinished in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _from_process_zero(steps: T) -> T:
    """A JSON value of process 0, on all processes: what it sees of a shared file system."""
    value: T = json.loads(multihost.all_gather_text(json.dumps(steps), "checkpoints")[0])
    return value


def join_orbax() -> None:
    """Waits for Orbax's threads, half a minute for all together."""
    deadline = time.monotonic() + 30
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax") or thread.name in ORBAX_THREADS:
            # Orbax's own join would raise the error again
            threading.Thread.join(thread, max(0.0, deadline - time.monotonic()))


def _by_layer(tree: Tree) -> Tree:
    """Chunks on disk of at most CHUNK bytes; stacked arrays are cut between layers, so that one layer can be read alone."""

    def chunks(path: jax.tree_util.KeyPath, leaf: object) -> ocp.SaveArgs:
        stacked = any(getattr(part, "key", None) == "layers" for part in path)
        return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if stacked else ())

    return jax.tree_util.tree_map_with_path(chunks, tree)
