"""How the reports of the benchmarks that need a working directory begin."""

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any


def begin(title: str, doc: str | None, **options: Any) -> argparse.Namespace:
    """Reads `--workdir` and the options, given with their defaults; prints the title, the date, the machine and the command."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="for all that is made; not removed")
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    found = parser.parse_args()
    found.workdir = found.workdir.absolute()
    found.workdir.mkdir(parents=True, exist_ok=True)
    given = " ".join(argument for argument in sys.argv[1:] if not argument.startswith("--workdir"))
    print(f"# {title}, {time.strftime('%Y-%m-%d')}\n\n{platform.machine()}, {os.cpu_count()} cores, CPU\n")
    print(f"    python benchmarks/{Path(sys.argv[0]).name} {given}\n", flush=True)
    return found
