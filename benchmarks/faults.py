"""A run of several processes on this machine, disturbed again and again, beside the same run left in peace.

python benchmarks/faults.py --workdir=runs/faults [--moments=10] [--seed=0] [--kinds=kill_one,full_disk] [--patience=150]

It starts 2 processes with 2 CPU devices each, breaks something at random steps, and starts them again as a launcher would,
until the run ends.  Then every loss and every counter of the data is compared.  Full and read-only disks need root (mount);
without it they are left out.  About 30 seconds a moment on 2 cores.  It is its own config file.
"""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STAGE, SAVE_EVERY, DEVICES = "pretrain", 10, 4
LAYOUTS = (2, 1, 4)  # numbers of processes, over the same devices
STEPS = 45  # a moment; the next one comes at most a third of them after the run goes on
LIMIT = 240  # seconds in which a start must come to its first step
KINDS = {
    "kill_one": "SIGKILL of one process",
    "kill_all": "SIGKILL of all",
    "term_one": "SIGTERM of one process",
    "term_all": "SIGTERM of all",
    "stop": "SIGSTOP of one, SIGCONT seconds later",
    "starting": "SIGKILL of one while the run starts",
    "truncated": "SIGKILL of all, newest checkpoint truncated",
    "flipped": "SIGKILL of all, a bit of the newest checkpoint flipped",
    "layout": "SIGTERM of all, then another number of processes",
    "full_disk": "disk full (small tmpfs, filled)",
    "read_only": "checkpoints read-only (bind mount)",
}
NEED_ROOT = ("full_disk", "read_only")


def get_config() -> Any:
    """A mixture of a few thousand parameters.

    Its learning rate is small: another number of processes sums in another order, and over thousands of large steps the last
    bit of a sum becomes another choice of an expert, and another curve.
    """
    from tanuki_jax import config

    c = config.recipe(name="faults", seed=0, tensorboard=False)
    c.model.update(dict(vocab_size=768, n_layers=2, d_model=16, d_ff=24, n_heads=2, n_kv_heads=1, head_dim=8, init_std=0.05))
    c.model.n_experts = 4
    c.compute.dtype = "float32"
    c.data = dict(ja="rules:documents_ja", synthetic="rules:synthetic_en")
    c.rules.update(dict(documents=150))
    c.tokenizer.update(dict(vocab_size=720, character_coverage=1.0, sources=("ja", "synthetic")))
    c.scoring.update(dict(prompts=0, pairs=0))
    c.mesh.update(dict(data=2, fsdp=2))
    c.stages[STAGE] = config.stage(
        "pretrain",
        mixture=dict(ja=(0.5,), synthetic=(0.5,)),
        moe=True,
        seq_len=64,
        batch_size=8,
        steps=STEPS,
        save_every=SAVE_EVERY,
        log_every=1,
        keep_latest=3,
        optimizer=dict(learning_rate=1e-4),
    )
    return c


# --- starting and watching --------------------------------------------------------------------------------------------------


class Run:
    """The processes of one start."""

    def __init__(self, workdir: Path, steps: int, processes: int, errors: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        errors.mkdir(parents=True, exist_ok=True)
        self.home, self.errors = workdir / "stages" / STAGE, errors
        command = [sys.executable, "-m", "tanuki_jax.cli", "run", f"--config={__file__}", f"--workdir={workdir}"]
        command.append(f"--config.stages.{STAGE}.steps={steps}")
        self.processes = []
        for process in range(processes):
            env = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
                "NPROC": "16",  # with fewer threads than devices XLA's CPU collectives would deadlock
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
                "JAX_COMPILATION_CACHE_DIR": str(errors.parent / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": str(ROOT),
                "PYTHONFAULTHANDLER": "1",  # SIGABRT prints the stacks
                "TANUKI_COORDINATOR": f"127.0.0.1:{port}" if processes > 1 else "",
                "TANUKI_JOIN_SECONDS": "60",
                "TANUKI_HEARTBEAT_SECONDS": "30",
                "TANUKI_PROCESSES": str(processes),
                "TANUKI_PROCESS_ID": str(process),
            }
            with (errors / f"{process}.txt").open("a") as file:
                self.processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=file, stderr=file))

    def alive(self) -> list[subprocess.Popen[bytes]]:
        """Processes that have not ended."""
        return [p for p in self.processes if p.poll() is None]

    def step(self) -> int:
        """The last step that is logged."""
        found = rows(self.home)
        return found[-1]["step"] if found else 0

    def attempts(self) -> set[float]:
        """The starts whose steps are logged, by the seconds that restoring had taken until then."""
        return {row["seconds_by_phase"]["restore"] for row in rows(self.home)}

    def signal(self, number: int, chosen: list[subprocess.Popen[bytes]]) -> None:
        """To some of the processes."""
        for process in chosen:
            if process.poll() is None:
                process.send_signal(number)

    def end(self, patience: float) -> tuple[float, int]:
        """Waits until all have ended; seconds that it took, and how many had to be killed."""
        began = time.monotonic()
        while self.alive() and time.monotonic() - began < patience:
            time.sleep(0.05)
        hung = self.alive()
        self.signal(signal.SIGABRT, hung)
        time.sleep(2 if hung else 0)
        self.signal(signal.SIGKILL, hung)
        for process in self.processes:
            process.wait()
        return time.monotonic() - began, len(hung)


def rows(home: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The whole lines of a file of a stage."""
    lines = (home / name).read_text().splitlines() if (home / name).is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def newest(home: Path) -> int:
    """The newest whole checkpoint."""
    return max((int(p.name) for p in (home / "checkpoints").glob("*") if p.name.isdigit()), default=0)


# --- what is done to it -----------------------------------------------------------------------------------------------------


def can_mount(place: Path) -> bool:
    """Whether this user may mount."""
    place.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        return False
    subprocess.run(["umount", place], check=True)
    return True


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """Keeps a file system full, whatever is removed from it meanwhile."""
    done = threading.Event()

    def fill() -> None:
        with (disk / "filler").open("wb", buffering=0) as f:
            while not done.is_set():
                with contextlib.suppress(OSError):
                    while not done.is_set():
                        f.write(bytes(4096))
                time.sleep(0.005)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        (disk / "filler").unlink()


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Nothing can be written below a directory."""
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        command = ["mount", "-o", "remount,ro,bind", directory]
        while subprocess.run(command, capture_output=True).returncode:  # busy while a file is open for writing
            time.sleep(0.01)
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def hurt(step: Path, how: str, rng: random.Random) -> None:
    """Truncates a file of a checkpoint, or flips one of its bits."""
    path = rng.choice(sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size))
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[rng.randrange(len(data)) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def disturb(run: Run, kind: str, rng: random.Random, disk: Path, patience: float) -> tuple[float, int]:
    """Does it, and waits until all processes have ended (but for `stop`); seconds that it took, and how many hung."""
    one = [rng.choice(run.processes)]
    if kind == "stop":
        run.signal(signal.SIGSTOP, one)
        time.sleep(rng.uniform(2, 8))
        run.signal(signal.SIGCONT, one)
        return 0.0, 0
    if kind == "full_disk":
        with full(disk):
            return run.end(patience)
    if kind == "read_only":
        (run.home / "checkpoints").mkdir(parents=True, exist_ok=True)
        with read_only(run.home / "checkpoints"):
            return run.end(patience)
    number = signal.SIGTERM if kind in ("term_one", "term_all", "layout") else signal.SIGKILL
    run.signal(number, one if kind in ("kill_one", "term_one", "starting") else run.processes)
    ended = run.end(patience)
    if kind in ("truncated", "flipped") and newest(run.home):
        hurt(run.home / "checkpoints" / str(newest(run.home)), kind, rng)
    return ended


# --- the whole --------------------------------------------------------------------------------------------------------------


def chaos(workdir: Path, disk: Path, kinds: list[str], steps: int, rng: random.Random, patience: float) -> list[dict[str, Any]]:
    """Runs to the end through one moment of each of `kinds`; what was found of each."""
    found: list[dict[str, Any]] = []
    layout, starts = 0, 0
    before: set[float]
    run = Run(disk / "run", steps, LAYOUTS[0], workdir / f"start-{starts}")
    for kind in kinds:
        if kind == "starting":
            run.signal(signal.SIGKILL, run.processes)
            run.end(patience)
            before = run.attempts()
            run = Run(disk / "run", steps, LAYOUTS[layout % 3], run.errors)
            until = time.monotonic() + rng.uniform(0.5, 10)
            while time.monotonic() < until and not run.attempts() - before:
                time.sleep(0.05)
        else:
            wait(run, run.step() + rng.randrange(1, STEPS // 3))
        if not run.alive():
            break
        done = run.step()
        began = time.monotonic()
        before = set()
        ended, hung = disturb(run, kind, rng, disk, patience)
        codes = sorted(p.returncode for p in run.processes) if kind != "stop" else []
        if kind != "stop":
            done, before = max(done, run.step()), run.attempts()
            starts += 1
            layout += kind == "layout"
            run = Run(disk / "run", steps, LAYOUTS[layout % 3], workdir / f"start-{starts}")
        running = wait(run, run.step() + 1) if kind == "stop" else wait(run, before)
        new = [row["step"] for row in rows(run.home) if row["seconds_by_phase"]["restore"] not in before]
        lost = 0 if kind == "stop" or not new else done - (new[0] - 1)
        seconds = time.monotonic() - began
        one = dict(kind=kind, step=done, ended=ended, hung=hung, codes=codes, lost=lost)
        found.append({**one, "seconds": seconds, "running": running})
        print(f"step {done}: {found[-1]}, errors in {run.errors}", file=sys.stderr, flush=True)
    run.end(10 * LIMIT)
    assert all(p.returncode == 0 for p in run.processes), f"the last start failed; see {run.errors}"
    return found


def wait(run: Run, until: int | set[float]) -> bool:
    """Until a step is logged, or one of a start that is not in `until`; False where a process fails or time is up."""
    end = time.monotonic() + LIMIT
    while True:
        alive = run.alive()
        if run.attempts() - until if isinstance(until, set) else run.step() >= until:
            return True
        if not alive or time.monotonic() > end:
            return all(p.returncode == 0 for p in run.processes)
        time.sleep(0.05)


def compared(home: Path, whole: Path, steps: int) -> list[str]:
    """What differs from the run in peace, and what must not be."""
    mine, theirs = rows(home), rows(whole)
    wrong = []
    if [row["step"] for row in mine] != list(range(1, steps + 1)):
        wrong.append("steps are missing or double in metrics.jsonl")
    far = [(abs(a["loss"] / b["loss"] - 1), a["step"]) for a, b in zip(mine, theirs, strict=False)]
    print(f"\nLargest relative difference of a loss: {max(far)[0]:.1e} (step {max(far)[1]}).")
    wrong += [f"the loss of step {step} differs by {by:.1e}" for by, step in far if by > 1e-5][:3]
    for a, b in zip(mine, theirs, strict=False):
        names = [n for n in b if n.startswith("data/") or n == "tokens"]
        wrong += [f"{name} of step {a['step']} is {a.get(name)}, not {b[name]}" for name in names if a.get(name) != b[name]]
    events = [row["event"] for row in rows(home, "events.jsonl")]
    print(f"Events: {', '.join(f'{events.count(e)} {e}' for e in sorted(set(events))) or 'none'}.")
    print(f"Goodput: {mine[-1]['goodput']}; times {mine[-1]['times']}.\n")
    return wrong + [f"an event that has no cause: {e}" for e in set(events) & {"rollback", "not_finite", "spike"}]


def table(found: list[dict[str, Any]], moments: int) -> list[str]:
    """Prints what was found by kind; returns what is wrong."""
    print("| fault | times | s until all had ended, median (most) | hung | exit codes | s to run again | steps lost, most |")
    print("|---|---|---|---|---|---|---|")
    wrong = [] if len(found) == moments else [f"only {len(found)} moments came before the end"]
    for kind, told in KINDS.items():
        of = [f for f in found if f["kind"] == kind]
        if not of:
            continue
        ended, again = [f["ended"] for f in of], [f["seconds"] for f in of]
        codes = sorted({" ".join(map(str, f["codes"])) or "none ended" for f in of})
        most, hung = max(f["lost"] for f in of), sum(f["hung"] for f in of)
        spread = f"{statistics.median(ended):.1f} ({max(ended):.1f}) | {hung} | {', '.join(codes)}"
        again_told = f"{statistics.median(again):.0f} ({max(again):.0f})"
        print(f"| {told} | {len(of)} | {spread} | {again_told} | {most} |")
        # A save under way when all are killed is lost, and so are the steps made meanwhile.
        allowed = SAVE_EVERY * (3 if kind in ("truncated", "flipped") else 2)
        wrong += [f"{kind}: {most} steps were lost"] * (most > allowed) + [f"{kind}: {hung} processes hung"] * bool(hung)
        wrong += [f"{kind}: the run did not go on"] * any(not f["running"] for f in of)
    return wrong


def main() -> None:
    """Runs both and prints a report."""
    from report import begin  # this file is a config as well, which is read from elsewhere

    options = begin("A run that is disturbed", __doc__, moments=10, seed=0, kinds=",".join(KINDS), patience=150.0)
    workdir, rng = options.workdir, random.Random(options.seed)
    mounted = can_mount(workdir / "disk")
    usable = [k for k in options.kinds.split(",") if mounted or k not in NEED_ROOT]
    kinds = rng.sample(usable * math.ceil(options.moments / len(usable)), options.moments)
    steps = STEPS * options.moments + 20
    print("" if mounted else f"Left out, for this user may not mount: {', '.join(NEED_ROOT)}.\n")
    peace = Run(workdir / "peace", steps, LAYOUTS[0], workdir / "start-peace")
    peace.end(10 * LIMIT)
    assert all(p.returncode == 0 for p in peace.processes), f"the run in peace failed; see {peace.errors}"
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", workdir / "disk"], check=True)
    try:
        found = chaos(workdir, workdir / "disk", kinds, steps, rng, options.patience)
        wrong = table(found, options.moments) + compared(workdir / "disk" / "run" / "stages" / STAGE, peace.home, steps)
    finally:
        shutil.copytree(workdir / "disk", workdir / "kept", dirs_exist_ok=True)
        if mounted:
            subprocess.run(["umount", "-l", workdir / "disk"], check=True)
    print("Result: " + ("; ".join(wrong) if wrong else "as if nothing had happened"))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
