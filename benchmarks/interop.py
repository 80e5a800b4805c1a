"""Import and export of a Hugging Face directory of 2 GB: time and memory beside `cp`, and whether every byte comes back.

python benchmarks/interop.py --workdir=runs/interop [--layers=14]
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from report import begin
from upcycle import ONE, made
from watched import watched


def main() -> None:
    """Imports, exports, compares, and prints a table."""
    options = begin("Import and export", __doc__, layers=14)
    home = options.workdir
    if not (home / "dense").is_dir():
        made(home / "dense", ONE, options.layers)
    for name in ("ours", "back", "copy"):
        shutil.rmtree(home / name, ignore_errors=True)
    print("| | seconds | GB | MB/s | cp and sync, MB/s | ratio | peak memory, GiB |\n|---|---|---|---|---|---|---|")
    measure("import", "hf", home / "dense", home / "ours")
    measure("export", "checkpoint", home / "ours", home / "back")
    print(f"\nEvery tensor of the exported directory is bitwise the original's: {same(home / 'dense', home / 'back')}")


def measure(verb: str, flag: str, source: Path, output: Path) -> None:
    """A row of the table: one command, and a copy of what it wrote; both from the disk until all is on the disk."""
    copy = output.with_name("copy")
    cold(source)
    began = time.monotonic()
    command = [sys.executable, "-m", "tanuki_jax.cli", verb, f"--{flag}={source}", f"--output={output}"]
    _, memory, _ = watched(command)
    os.sync()
    seconds = time.monotonic() - began
    size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    shutil.rmtree(copy, ignore_errors=True)
    cold(output)
    began = time.monotonic()
    subprocess.run(["cp", "-r", output, copy], check=True)
    os.sync()
    rate, peer = size / seconds / 1e6, size / (time.monotonic() - began) / 1e6
    cells = f"{seconds:.1f} | {size / 1e9:.2f} | {rate:.0f} | {peer:.0f} | {rate / peer:.2f} | {memory:.2f}"
    print(f"| {verb} | {cells} |", flush=True)


def cold(source: Path) -> None:
    """Takes files out of the page cache, and gives it the same room: writing is much slower where it must make some first."""
    room(source.parent)
    for path in (path for path in source.rglob("*") if path.is_file()):
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def room(home: Path, size: int = 4 << 30) -> None:
    """Fills the page cache with what is then removed."""
    with (home / "filler").open("wb") as f:
        for _ in range(size >> 24):
            f.write(bytes(1 << 24))
    (home / "filler").unlink()
    os.sync()


def same(first: Path, second: Path) -> bool:
    """Whether two directories hold the same tensors, bit for bit."""
    from safetensors import safe_open

    def opened(path: Path) -> dict[str, object]:
        files = [safe_open(str(file), framework="numpy") for file in sorted(path.glob("*.safetensors"))]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118  # a handle, not a dictionary

    a, b = opened(first), opened(second)
    bits = lambda files, name: files[name].get_tensor(name).view(np.uint16)  # noqa: E731
    return a.keys() == b.keys() and all(np.array_equal(bits(a, name), bits(b, name)) for name in a)


if __name__ == "__main__":
    main()
