"""The settings of a launch: one table of keys, read from a TOML file and from flags of the same names."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tanuki_jax.errors import UserError

PLATFORMS = ("tpu", "gke", "slurm")
PROVISIONING_MODELS = ("standard", "spot", "reserved", "reservation-bound", "flex-start")


def key(default: Any, text: str, *platforms: str, required: bool = False) -> Any:
    """A setting: its default, its documentation, the platforms that read it (all of them if none is named)."""
    metadata = {"text": text, "platforms": platforms or PLATFORMS, "required": required}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What a launch needs to know; `describe` lists the keys of a platform."""

    name: str = key("", "of the request, JobSet or Slurm job; letters, digits and '-'", required=True)
    config: str = key("", "recipe, configs/tanuki_8b.py:/mnt/runs/data say, as the workers see it", required=True)
    workdir: str = key("", "a directory that every worker sees; checkpoints, logs and the report go there", required=True)
    flags: list[str] = key([], "more flags of `tanuki run`: --config.mesh.slices=2 say")
    env: dict[str, str] = key({}, "environment of the run: --env=NAME=VALUE, or a table [env]; shown as ***")
    pass_env: list[str] = key([], "names of variables that are taken over from this machine: WANDB_API_KEY say")
    compilation_cache: str = key("workdir", "JAX's compilation cache: workdir, a directory or gs:// path, or none")
    max_restarts: int = key(10, "restarts without a new checkpoint after which it is given up; on GKE restarts of all kinds")

    # --- Cloud TPU and GKE
    project: str = key("", "Google Cloud project; gcloud's own if empty", "tpu", "gke")
    type: str = key("", "of a slice: v5p-256, v6e-64, v5e-16; GKE alone: tpu7x-128", "tpu", "gke", required=True)
    slices: int = key(1, "how many; becomes the recipe's mesh.slices", "tpu", "gke")
    provisioning_model: str = key("standard", " | ".join(PROVISIONING_MODELS), "tpu", "gke")
    reservation: str = key("", "name of the reservation (reserved, reservation-bound)", "tpu", "gke")
    service_account: str = key("", "of the VMs (tpu: an e-mail address) or pods (gke: a Kubernetes name)", "tpu", "gke")
    zone: str = key("", "of the slices: us-east5-a say", "tpu", "gke", required=True)
    max_run_duration: str = key("", "flex-start: how long the slices are needed, 24h say; at most 7d", "tpu", "gke")

    # --- Cloud TPU
    delete: str = key("done", "slices when the launch ends: done = after success, always, never", "tpu")
    queued: bool = key(True, "ask by a queued resource; false: one slice, at once or not at all", "tpu")
    runtime: str = key("", "runtime version; that of the type if empty", "tpu")
    network: str = key("", "VPC network", "tpu")
    subnetwork: str = key("", "subnetwork of it", "tpu")
    internal_ips: bool = key(False, "no external addresses; ssh goes through Identity-Aware Proxy", "tpu")
    valid_until: str = key("", "how long a request may wait in the queue: 24h say; no limit if empty", "tpu")
    setup: str = key("", "shell command that every worker runs before the installation: mounts, packages", "tpu")
    allow_boot_disk: bool = key(False, "let workdir lie on a disk that is deleted with the VM", "tpu")
    python: str = key("3.12", "version that is installed where the image has none from 3.11 on", "tpu")
    max_attempts: int = key(50, "requests for slices, at most; one that was preempted is followed by another", "tpu")
    poll: float = key(60.0, "seconds between two looks", "tpu")

    # --- GKE
    cluster: str = key("", "name of the cluster; `create` makes its node pools", "gke")
    location: str = key("", "region or zone of the cluster", "gke")
    namespace: str = key("default", "of the JobSet", "gke")
    image: str = key("", "container made from launch/Dockerfile", "gke", required=True)
    claim: str = key("", "persistent volume claim that is mounted at `mount` (Filestore, Lustre)", "gke")
    bucket: str = key("", "bucket that gcsfuse mounts at `mount`; needs service_account", "gke")
    mount: str = key("/mnt", "where claim or bucket is mounted; workdir lies below it", "gke")
    data_bucket: str = key("", "bucket of data that gcsfuse mounts read-only at `data_mount`, with a cache of files", "gke")
    data_mount: str = key("/data", "where data_bucket is mounted", "gke")
    queue: str = key("", "Kueue's local queue", "gke")
    grace_seconds: int = key(180, "from SIGTERM to the end of a pod; Spot machines give 105 at most", "gke")
    ttl_seconds: int = key(86_400, "that a finished JobSet stays, with its logs", "gke")

    # --- Slurm
    nodes: int = key(1, "how many", "slurm")
    gpus: int = key(8, "of a node, one process for each; 0 = CPUs alone, one process of a node", "slurm")
    cpus_per_gpu: int = key(8, "CPUs of each process", "slurm")
    time: str = key("24:00:00", "limit of one run of the job", "slurm")
    partition: str = key("", "Slurm's --partition", "slurm")
    account: str = key("", "Slurm's --account", "slurm")
    sbatch: list[str] = key([], "more flags of sbatch: --constraint=h100 say", "slurm")
    signal_seconds: int = key(180, "before the limit SIGTERM is sent: time to save", "slurm")
    max_requeues: int = key(100, "of the job, at most", "slurm")
    container_image: str = key("", "pyxis: image of the processes", "slurm")
    container_mounts: str = key("", "pyxis: SOURCE:TARGET,...", "slurm")


KEYS = {f.name: f for f in dataclasses.fields(Settings)}
TYPES = {name: type(getattr(Settings(), name)) for name in KEYS}


def describe(platform: str) -> dict[str, tuple[str, str]]:
    """A platform's keys: of each its help, with the default, and what its value looks like."""
    values = {str: "TEXT", int: "N", float: "X", bool: "true|false", list: "'A B'", dict: "NAME=VALUE"}
    result = {}
    for name, f in keys_of(platform).items():
        text = f.metadata["text"].replace("%", "%%")
        if f.metadata["required"]:
            text += " (required)"
        elif TYPES[name] not in (list, dict) and f.default != "":
            text += f" (default {str(f.default).lower() if TYPES[name] is bool else f.default})"
        result[name] = text, values[TYPES[name]]
    return result


def keys_of(platform: str) -> dict[str, dataclasses.Field[Any]]:
    """The keys that a platform reads."""
    return {name: f for name, f in KEYS.items() if platform in f.metadata["platforms"]}


def read(platform: str, path: Path | None, flags: Sequence[str]) -> Settings:
    """Settings from a TOML file, over which flags `--key=value` have the last word; `--config.a.b=value` is for the run."""
    values: dict[str, Any] = {}
    if path:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--settings: cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"--settings: {path} is not TOML: {error}") from error
        for name, value in values.items():
            _check_key(platform, name, f"{path}: ")
            values[name] = _check_type(name, value, f"{path}: ")
    for flag in flags:
        name, _, text = flag.removeprefix("--").partition("=")
        if name.startswith("config."):
            values["flags"] = [*values.get("flags", []), flag]
            continue
        _check_key(platform, name, "launch: ")
        value = _parse(name, text)
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return _check(platform, Settings(**values))


def _check_key(platform: str, name: str, where: str) -> None:
    if name not in KEYS:
        close = difflib.get_close_matches(name, keys_of(platform), 1)
        hint = f"; do you mean {close[0]}?" if close else f"; tanuki launch {platform} --help lists them"
        raise UserError(f"{where}there is no setting {name!r}{hint}")
    if platform not in KEYS[name].metadata["platforms"]:
        raise UserError(f"{where}{name} is a setting of {' and '.join(KEYS[name].metadata['platforms'])}, not of {platform}")


def _check_type(name: str, value: Any, where: str) -> Any:
    kind = TYPES[name]
    if kind is float and type(value) is int:
        return float(value)
    parts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    if type(value) is not kind or not all(isinstance(part, str) for part in parts):
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        names |= {list: "a list of texts", dict: "a table of texts"}
        raise UserError(f"{where}{name} is {value!r}; it must be {names[kind]}")
    return value


def _parse(name: str, text: str) -> Any:
    kind = TYPES[name]
    if kind is list:
        return text.split()
    if kind is dict:
        variable, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"launch: --{name}={text}: write --{name}=NAME=VALUE")
        return {variable: value}
    if kind is bool:
        if text not in ("true", "false"):
            raise UserError(f"launch: --{name} is {text!r}; it must be true or false")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"launch: --{name} is {text!r}; it must be a {'whole ' if kind is int else ''}number") from None


def _check(platform: str, settings: Settings) -> Settings:
    if settings.name and not re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", settings.name):
        raise UserError(f"launch: name is {settings.name!r}; use at most 50 small letters, digits and '-', a letter first")
    for name in keys_of(platform):
        value = getattr(settings, name)
        if TYPES[name] in (int, float) and not 0 < value < 1e9 and not (name in ("poll", "gpus") and value == 0):
            raise UserError(f"launch: {name} is {value}; it must be more than 0")
    for name, choices in (("provisioning_model", PROVISIONING_MODELS), ("delete", ("done", "always", "never"))):
        if getattr(settings, name) not in choices:
            raise UserError(
                f"launch: {name} is {getattr(settings, name)!r}; it must be {', '.join(choices[:-1])} or {choices[-1]}"
            )
    if settings.workdir and not settings.workdir.startswith("/"):
        raise UserError(f"launch: workdir is {settings.workdir!r}; give an absolute path, the same on every worker")
    for name in (*settings.env, *settings.pass_env):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"launch: {name!r} is no name of an environment variable")
    return settings


def require(settings: Settings, *names: str) -> None:
    """An error that names the first of the keys that is not set."""
    for name in names:
        if not getattr(settings, name):
            raise UserError(
                f"launch: {name} is not set: {KEYS[name].metadata['text']}; in the file of --settings, or --{name}=..."
            )


def run_flags(settings: Settings) -> list[str]:
    """The flags of `tanuki run`; several slices are a mesh of several slices, unless `flags` say otherwise."""
    named = any(flag.startswith("--config.mesh.slices") for flag in settings.flags)
    mesh = [f"--config.mesh.slices={settings.slices}"] if settings.slices > 1 and not named else []
    return [f"--config={settings.config}", f"--workdir={settings.workdir}", *mesh, *settings.flags]


def environment(settings: Settings, platform: str) -> dict[str, str]:
    """The environment of a run: an accelerator that is missing is an error, never a run on the CPU; then the user's variables.

    Args:
      settings: `pass_env` names variables of this machine; an error where one is not set.
      platform: JAX's name of the accelerator: tpu, cuda.
    """
    result = {"TANUKI_COORDINATOR": "auto", "JAX_PLATFORMS": platform}
    if settings.compilation_cache != "none":
        cache = settings.compilation_cache
        result["JAX_COMPILATION_CACHE_DIR"] = f"{settings.workdir}/compilation_cache" if cache == "workdir" else cache
    for name in settings.pass_env:
        if name not in os.environ:
            raise UserError(f"launch: pass_env names {name}, which is not set here")
        result[name] = os.environ[name]
    return result | settings.env


def hide(environ: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """The same with the user's values replaced by ***, for what is printed."""
    return {name: "***" if name in settings.env or name in settings.pass_env else value for name, value in environ.items()}
