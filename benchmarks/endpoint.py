"""How much of what a server could give the runner gets, while the server fails in nine ways and the runner is killed.

python benchmarks/endpoint.py --workdir=runs/endpoint [--jobs=5000] [--kills=10] [--slots=32] [--seconds=1.5]

The server (tests/endpoint/faulty_server.py, a process of its own) works on `slots` requests at a time, each for `seconds`, so
that it can give slots / seconds answers per second; it counts the time that its slots were busy.  Faults are 5 % of each kind.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report

from tanuki_jax import endpoint
from tanuki_jax.config.synthesis import Endpoint
from tanuki_jax.endpoint import Ask, Client, Job

ROOT = Path(__file__).parents[1]
SHARE = 0.05


async def chain(item: int, ask: Ask) -> list[dict[str, Any]]:
    """A question, and the answer to it."""
    question = await ask(Job(messages=[{"role": "user", "content": f"question {item}"}], step="q1"))
    answer = await ask(Job(messages=[{"role": "user", "content": question.text}], step="a1"))
    return [{"item": item, "question": question.text, "answer": answer.text}]


def work(url: str, directory: Path, jobs: int, concurrency: int) -> None:
    """One run; a process of its own."""
    settings = Endpoint(base_url=url, concurrency=concurrency, timeout_seconds=12.0, retries=12, license="apache-2.0")
    items = [(str(number), number) for number in range(jobs // 2)]
    summary = endpoint.run(items, chain, {"generator": Client(settings)}, directory, recipe="benchmark", quiet=True)
    print(json.dumps({**summary.to_json(), "cpu_seconds": time.process_time()}))


class Server:
    """The faulty server in a process of its own."""

    def __init__(self, **options: float) -> None:
        command = [sys.executable, "tests/endpoint/faulty_server.py", *(f"--{name}={value}" for name, value in options.items())]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self.url = self._process.stdout.readline().strip()

    def end(self) -> dict[str, Any]:
        """Ends it; returns its counts."""
        result: dict[str, Any] = json.loads(self._process.communicate("\n")[0])
        return result


def start(server: Server, directory: Path, jobs: int, concurrency: int) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    command = [sys.executable, __file__, "work", server.url, str(directory), str(jobs), str(concurrency)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file."""
    with path.open(encoding="utf-8") as f:
        yield from map(json.loads, f)


def count(path: Path) -> int:
    """Whole lines of a file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def throughput(directory: Path, jobs: int, concurrency: int, **options: float) -> None:
    """A line of the table: one run that nobody disturbs."""
    server = Server(**options)
    process = start(server, directory, jobs, concurrency)
    summary = json.loads(process.communicate()[0])
    counts = server.end()
    requests = counts["requests"]
    cells = [
        f"{options['share']:.0%}",
        f"{summary['calls']:,}",
        f"{requests['answer']:,}",
        f"{counts['wall_seconds']:.1f}",
        f"{counts['busy_share']:.1%}",
        f"{counts['busy_share_95']:.1%}",
        f"{counts['closed_seconds']:.1f}",
        str(counts["refused_early"]),
        f"{summary['cpu_seconds']:.0f}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def kill_often(directory: Path, jobs: int, kills: int, concurrency: int, **options: float) -> None:
    """Kills the runner at random moments; then every job must have exactly one final row."""
    server = Server(**options)
    chance, shown, answers = random.Random(0), [], directory / "answers.jsonl"
    for number in range(1, kills + 1):
        process = start(server, directory, jobs, concurrency)
        while process.poll() is None and count(answers) < number * jobs // (kills + 1):
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        shown.append(count(answers))
    runs = 0
    summary: dict[str, Any] = {}
    while not summary.get("complete") and runs < 3:
        summary = json.loads(start(server, directory, jobs, concurrency).communicate()[0])
        runs += 1
    counts = server.end()
    final = Counter(row["id"] for row in rows(answers))
    made = [row["item"] for row in rows(directory / "rows.jsonl")]
    print(f"answers recorded at the kills: {', '.join(map(str, shown))}; runs to the end after the last: {runs}\n")
    print("| jobs | final rows | twice | rows in order | asked by the server's count | answers that a kill threw away |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {jobs:,} | {len(final):,} | {sum(count > 1 for count in final.values())} | {made == list(range(jobs // 2))} | "
        f"{sum(counts['requests'].values()):,} | {counts['requests']['answer'] - summary['outcomes']['answer']} |"
    )
    assert len(final) == jobs and max(final.values()) == 1 and made == list(range(jobs // 2)), (
        "a job was lost, or is there twice"
    )


def main() -> None:
    """Prints the report."""
    options = report.begin("The endpoint runner", __doc__, jobs=5000, kills=10, slots=32, seconds=1.5)
    shutil.rmtree(options.workdir)
    server = dict(slots=options.slots, seconds=options.seconds)
    places = 4 * options.slots
    print(f"A server of {options.slots / options.seconds:g} answers per second at most, {places} requests under way.\n")
    head = "each fault | requests | answers | seconds | slots busy | busy until 95 % were done | seconds closed by 429s"
    print(f"| {head} | sent in a pause | the runner's CPU seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, share, retry_after in (("none", 0.0, 0.0), ("faults", SHARE, 0.1)):
        jobs = options.jobs if share else options.jobs // 5
        throughput(options.workdir / name, jobs, places, share=share, retry_after=retry_after, **server)
    print(f"\n{options.jobs:,} jobs at {SHARE:.0%} of each fault, the runner killed {options.kills} times.\n", flush=True)
    fast = dict(slots=64, seconds=0.1, share=SHARE, retry_after=0.1)
    kill_often(options.workdir / "kills", options.jobs, options.kills, places, **fast)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
