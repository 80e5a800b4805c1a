"""Before anything is compiled: are the processes of a run alike, can they write, is there room, do their devices answer?"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tanuki_jax import config, files, model, multihost
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.config.checkpoint_paths import list_steps
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import UserError
from tanuki_jax.recipe.workdir import Workdir

MAX_CLOCK_SKEW = 60.0  # seconds by which the clocks of machines may differ: file systems and certificates begin to fail later


def check(recipe: Recipe, stages: Sequence[str], workdir: Workdir, versions: Mapping[str, str]) -> None:
    """Says on stderr what it sees; what would fail in the stages, or go wrong unseen, is an error."""
    began, (process, processes) = time.monotonic(), multihost.process_slice()
    multihost.enter_phase("preflight")
    facts = {
        "versions": versions,
        "local devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        "recipe (fingerprint)": files.fingerprint(config.to_dict(recipe)),
    }
    _check_same([json.loads(text) for text in multihost.all_gather_text(json.dumps(facts), "preflight")])
    # All processes come from the line above, so their clocks are read at nearly one time.
    clocks = multihost.all_gather_text(str(time.time()), "preflight, clocks")
    times = [float(text) for text in clocks]
    apart = max(times) - min(times)
    if apart > MAX_CLOCK_SKEW:
        earliest, latest = (multihost.process_label(times.index(pick(times))) for pick in (min, max))
        raise UserError(f"preflight: the clock of {latest} is {apart:.0f} s ahead of that of {earliest}; set them by NTP")
    _check_writable(workdir.root, process, processes)
    free = multihost.on_process_zero(lambda: check_disk_space(recipe, stages, workdir), "preflight, room on the disk")
    took = _time_all_reduce()
    if processes > 1 and process == 0:
        _log(
            f"{processes} processes alike, clocks within {apart:.2f} s, all write to {workdir.root}, {_gb(free or 0)} free, "
            f"a sum over {jax.device_count()} devices took {took:.2f} s, all {time.monotonic() - began:.1f} s"
        )


def _check_same(facts: list[dict[str, Any]]) -> None:
    first = _flat(facts[0])
    for process, other in enumerate(map(_flat, facts)):
        for key in first:
            if other.get(key) != first[key]:
                raise UserError(
                    f"preflight: {key} is {other.get(key)} on {multihost.process_label(process)} and {first[key]} on "
                    f"{multihost.process_label(0)}; all processes must have the same"
                )


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    versions = facts["versions"]
    return {f"version of {name}" if name != "device" else "all devices": versions[name] for name in versions} | {
        key: value for key, value in facts.items() if key != "versions"
    }


def _check_writable(workdir: Path, process: int, processes: int) -> None:
    """Each process writes a file that all others must see."""
    probe, wrong = workdir / f".preflight-{process}", ""
    try:
        probe.write_text(multihost.hostname(), encoding="utf-8")
    except OSError as error:
        wrong = f"{multihost.process_label(process)} cannot write to {workdir}: {error.strerror}"
    wrong = multihost.first_error(wrong, "preflight, writing")
    unseen = [n for n in range(processes) if not wrong and not (workdir / f".preflight-{n}").is_file()]
    if unseen:
        wrong = (
            f"{multihost.process_label(process)} does not see in {workdir} what {multihost.process_label(unseen[0])} wrote; "
            "--workdir must lie on a file system that all share"
        )
    wrong = multihost.first_error(wrong, "preflight, reading")
    probe.unlink(missing_ok=True)
    if wrong:
        raise UserError(f"preflight: {wrong}")


def check_disk_space(recipe: Recipe, stages: Sequence[str], workdir: Workdir) -> int:
    """Bytes that are free; an error where not one checkpoint fits, a warning where not all do that are kept."""
    free = shutil.disk_usage(workdir.root).free
    for stage in stages:
        options = recipe.stages[stage]
        if not STAGE_KINDS[options.kind].trains or options.lora.rank or workdir.done_file(stage).is_file():
            continue
        size, saved = checkpoint_bytes(recipe, stage), len(list_steps(workdir.stage_dir(stage)))
        if free < size:
            raise UserError(
                f"preflight: a checkpoint of stage {stage} has {_gb(size)}, and {workdir.root} {_gb(free)} free; make room, or "
                "use another --workdir"
            )
        needed = max(1, options.keep_latest + 1 - saved) * size
        if free < needed:
            _log(
                f"the checkpoints of stage {stage} will need {_gb(needed)} (keep_latest={options.keep_latest}, and the one "
                f"that is being written); {workdir.root} has {_gb(free)} free"
            )
    return free


def checkpoint_bytes(recipe: Recipe, name: str) -> int:
    """Bytes of a stage's parameters and both moments."""
    leaves = jax.tree.leaves(model.parameter_shapes(config.model_config(recipe, name)))
    moments = 2 * jnp.dtype(recipe.stages[name].optimizer.moment_dtype).itemsize
    return sum((leaf.dtype.itemsize + moments) * math.prod(leaf.shape) for leaf in leaves)


def _time_all_reduce() -> float:
    """Seconds of a sum over all devices; an error where it is wrong."""
    began = time.monotonic()
    multihost.enter_phase("a sum over all devices")
    mesh = Mesh(jax.devices(), ("all",))
    sharded, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("all",), ()))
    count = jax.device_count()
    ones = jax.jit(lambda: jnp.arange(count, dtype=jnp.float32), out_shardings=sharded)()
    total = float(jax.jit(jnp.sum, out_shardings=whole)(ones))
    if total != count * (count - 1) / 2:
        raise UserError(
            f"preflight: the sum over {count} devices is {total}, not {count * (count - 1) / 2}; a device is broken"
        )
    return time.monotonic() - began


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def _log(text: str) -> None:
    print(f"preflight: {text}", file=sys.stderr, flush=True)
