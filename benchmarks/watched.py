"""Runs a command and watches its memory; for the other benchmarks."""

import contextlib
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def watched(arguments: list[str]) -> tuple[float, float, str]:
    """Seconds of a command, the most memory that it and its children held together in GiB, and what it printed."""
    import psutil

    began = time.monotonic()
    process = psutil.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    most = 0
    running = True
    while running:
        held = 0
        for one in (process, *process.children(recursive=True)):
            try:
                held += one.memory_info().rss
            except psutil.Error:
                continue
        most = max(most, held)
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(0.1)
            running = False
    assert process.returncode == 0, arguments
    return time.monotonic() - began, most / 2**30, process.stdout.read()
