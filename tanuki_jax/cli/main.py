"""`tanuki <verb>`: parses the flags, runs the verb, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

from tanuki_jax.cli import jax_platform
from tanuki_jax.cli.parser import make_parser, split_config
from tanuki_jax.cli.verbs import WORK
from tanuki_jax.errors import PeerLost, Preempted, UserError
from tanuki_jax.files import lock

PREEMPTED = 75  # exit code EX_TEMPFAIL: try again
PEER_LOST = 77  # exit code: another process of the run is gone; start all again
STREAMING = {"upcycle", "import", "export"}  # verbs from file to file
LOG_FORMAT = "%(asctime)s %(levelname)s pid %(process)d %(name)s: %(message)s"
XLA_STATUS = ("UNKNOWN:", "UNAVAILABLE:", "INTERNAL:", "ABORTED:", "CANCELLED:", "DEADLINE_EXCEEDED:")  # begin its messages


def command() -> int:
    """Entry point of `tanuki`: `main`, on huge pages, with a higher GC threshold, and GC frozen at exit.

    JAX and similar libraries create some 100,000 objects that live as long as the process.  Scanning them takes a sixth of
    their import time, and 0.3 seconds at the end.
    """
    _tune_malloc()
    gc.set_threshold(100_000)
    try:
        return main()
    finally:
        gc.freeze()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = make_parser()
        config_flags, others = split_config(arguments)
        options = parser.parse_args(others)
        if not hasattr(options, "work"):
            parser.print_help()
            return 0
        if config_flags and options.verb not in ("run", "train", "plan", "launch", "synth"):
            raise UserError(f"tanuki {options.verb}: takes no --config")
        options.config_flags = config_flags
        _configure_logging()
        jax_platform.choose_platform()
        with _hold_output(options):
            WORK[options.work](options)
        return 0
    except UserError as error:
        print(f"tanuki: {error}", file=sys.stderr)
        _exit(1)
    except Preempted as stopped:
        print(f"tanuki: {stopped}; the same command goes on from there", file=sys.stderr)
        _exit(PREEMPTED)
        return PREEMPTED
    except PeerLost as error:
        print(f"tanuki: {error}; start all processes again", file=sys.stderr)
        _exit(PEER_LOST)
        return PEER_LOST
    except BrokenPipeError:
        if arguments[:1] not in (["run"], ["train"]):
            return 0  # the reader of the answer has read enough
        _exit(1)
    except KeyboardInterrupt:
        resumes = arguments[:1] in (["run"], ["train"], ["data"], ["synth"])
        effect = "the same command goes on from where it was" if resumes else "no output was written"
        effect = "what it has started goes on" if arguments[:1] == ["launch"] else effect
        print(f"\ntanuki: interrupted; {effect}", file=sys.stderr)
        _exit(130)
        return 130
    except Exception as error:
        if not _several_processes():
            raise
        traceback.print_exception(error)
        _exit(PEER_LOST if _caused_by_peer(error) else 1)
    return 1


def _several_processes() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _caused_by_peer(error: Exception) -> bool:
    """Whether a collective or a barrier failed, most likely because another process is gone."""
    if any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")):
        return False
    waited = isinstance(error, sys.modules["jax"].errors.JaxRuntimeError | TimeoutError) or str(error).startswith(XLA_STATUS)
    return waited or type(error).__module__.startswith("orbax")


def _exit(code: int) -> None:
    """Ends one of several processes at once: JAX's own shutdown would wait for the others, which may wait for this one."""
    if _several_processes():
        sys.stdout.flush()
        sys.stderr.flush()
        if sys.modules["jax"].process_index() == 0:
            time.sleep(1)  # hosts the coordinator: without it JAX would end the others before they print their message
        os._exit(code)


def _tune_malloc() -> None:
    """Restarts this process with malloc on huge pages (Linux): XLA's large CPU buffers then cost far fewer page faults.

    Verbs that stream weights from file to file free as much as they allocate, so there malloc keeps 256 MiB of it, and maps
    only blocks above 32 MiB by themselves.  Measured by benchmarks/cpu_step.py and benchmarks/interop.py.  Set
    TANUKI_HUGE_PAGES=0 to leave malloc alone.
    """
    enabled = os.environ.get("TANUKI_HUGE_PAGES", "1") != "0" and "GLIBC_TUNABLES" not in os.environ
    if enabled and sys.platform == "linux":
        streaming = f":glibc.malloc.mmap_threshold={32 << 20}:glibc.malloc.trim_threshold={256 << 20}"
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1" + (streaming if STREAMING.intersection(sys.argv[1:2]) else "")
        os.execv(sys.executable, [sys.executable, "-m", "tanuki_jax.cli", *sys.argv[1:]])


def _configure_logging() -> None:
    """Logs to stderr, and keeps libraries' own reports of an error off the screen: an error that matters is raised."""
    logging.basicConfig(format=LOG_FORMAT, level=logging.WARNING)
    logging.getLogger("tanuki_jax").setLevel(logging.INFO)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _print_unraisable


def _print_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    if "Event loop is closed" not in str(unraisable.exc_value):  # Orbax's threads, when a save or restore has failed
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def _hold_output(options: argparse.Namespace) -> Iterator[None]:
    """Holds the lock on the output of a verb, and takes it before anything slow is imported.

    Of several processes of a run, process 0 takes it once it knows its number.
    """
    with contextlib.ExitStack() as stack:
        makes = options.work == "run" or (options.work == "synth" and not options.dry_run)
        if makes and not os.environ.get("TANUKI_COORDINATOR"):
            stack.enter_context(lock.signals())
            stack.enter_context(lock.workdir(options.workdir))
        if hasattr(options, "output") and not getattr(options, "dry_run", False):
            stack.enter_context(lock.signals())
            stack.enter_context(lock.output(options.output))
        yield
