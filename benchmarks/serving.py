"""Many clients at once on `tanuki serve`: errors, memory, throughput over one client's, and slots after clients left early.

    python benchmarks/serving.py --checkpoint=runs/nano/stages/dpo --clients=64 --seconds=600 --leaving=0.3

Starts a server in a process of its own, lets one client ask for a while, and then many.  Prompts have 8 to 120 tokens,
answers 8 to 128; a share of the clients closes its stream after a few pieces.  Prints one line of JSON.  Exit code 1 where a
request failed, a slot stayed busy, or memory grew by more than 5 %, or by more than 1 % in the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import openai

WARM_UP = 60.0  # seconds of many clients before memory is read for the first time
READINGS = 20  # of memory while many clients ask


def main() -> int:
    """Runs the clients; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--leaving", type=float, default=0.0, help="share of requests whose client leaves early")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--streaming", type=float, default=0.5, help="share of requests that stream")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    flags = [f"--{name}={getattr(options, name)}" for name in ("checkpoint", "slots", "max_length")]
    command = [sys.executable, "-m", "tanuki_jax.cli", "serve", f"--port={port}", *flags]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        result = asyncio.run(measure(options, f"http://127.0.0.1:{port}", server.pid))
    finally:
        server.terminate()
        result_code = server.wait(60)
    result["exit_code"] = result_code
    print(json.dumps(result))
    memory = result["rss_mb"]
    grown = memory[-1] > 1.05 * memory[0] or memory[-1] > 1.01 * memory[len(memory) // 2]
    return int(bool(result["errors"]) or result["slots_busy_at_end"] > 0 or grown or result_code != 0)


async def measure(options: argparse.Namespace, address: str, pid: int) -> dict:
    """The figures."""
    begin = time.monotonic()
    while await asyncio.to_thread(status, address) != 200:
        await asyncio.sleep(0.2)
    ready = time.monotonic() - begin
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
    model = (await client.models.list()).data[0].id
    alone = await load(client, model, 1, min(20.0, options.seconds / 3), options, leaving=0.0)
    await load(client, model, options.clients, WARM_UP, options, options.leaving)
    cpu, memory = cpu_seconds(pid), [rss(pid)]
    reading = asyncio.create_task(keep_reading(pid, memory, options.seconds / READINGS))
    many = await load(client, model, options.clients, options.seconds, options, options.leaving)
    reading.cancel()
    cpu = cpu_seconds(pid) - cpu
    await asyncio.sleep(1)
    metrics = await asyncio.to_thread(read, f"{address}/metrics")
    whole = await client.completions.create(model=model, prompt=[5] * 8, max_tokens=8, n=options.slots)
    assert len(whole.choices) == options.slots
    return {
        "clients": options.clients,
        "seconds": round(many["seconds"], 1),
        "requests": many["requests"],
        "left_early": many["left"],
        "errors": dict(alone["errors"] + many["errors"]),
        "tokens_per_second_alone": round(alone["tokens"] / alone["seconds"], 1),
        "tokens_per_second": round(many["tokens"] / many["seconds"], 1),
        "gain": round(many["tokens"] / many["seconds"] / (alone["tokens"] / alone["seconds"]), 2),
        "server_cpu_ms_per_token": round(1000 * cpu / max(1, many["tokens"]), 2),
        "rss_mb": [*memory, rss(pid)],
        "slots_busy_at_end": int(float(re.search(r"^tanuki_serve_slots_busy (\S+)$", metrics, re.MULTILINE)[1])),
        "ready_after_s": round(ready, 1),
    }


async def load(
    client: openai.AsyncOpenAI, model: str, n_clients: int, seconds: float, options: argparse.Namespace, leaving: float
) -> dict:
    """So many clients for so long, each one request after the other; tokens are those that clients have read."""
    counts: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    begin = time.monotonic()

    async def ask(rng: random.Random) -> None:
        prompt = [rng.randrange(5, 500) for _ in range(rng.randint(8, min(120, options.max_length // 2)))]
        limit = rng.randint(8, min(128, options.max_length // 2))
        fields = dict(
            model=model, prompt=prompt, max_tokens=limit, temperature=rng.choice([0.0, 0.8]), seed=rng.randrange(1000)
        )
        fields["extra_body"] = {"ignore_eos": True}
        leaves = rng.random() < leaving
        counts["requests"] += 1
        if not leaves and rng.random() >= options.streaming:
            answer = await client.completions.create(**fields)
            counts["tokens"] += answer.usage.completion_tokens
            return
        n_pieces = rng.randint(0, 3)
        stream = await client.completions.create(**fields, stream=True, stream_options={"include_usage": True})
        async with stream:
            async for piece in stream:
                n_pieces -= 1
                if leaves and n_pieces < 0:
                    counts["left"] += 1
                    return
                counts["tokens"] += piece.usage.completion_tokens if piece.usage else 0

    async def go_on(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() - begin < seconds:
            try:
                await ask(rng)
            except openai.OpenAIError as error:
                errors[f"{type(error).__name__}: {error}"[:100]] += 1

    await asyncio.gather(*(go_on(number) for number in range(n_clients)))
    return {**counts, "left": counts["left"], "tokens": counts["tokens"], "errors": errors, "seconds": time.monotonic() - begin}


def status(address: str) -> int:
    """The status of /health; 0 where nobody answers."""
    try:
        read(f"{address}/health")
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
    return 200


def read(url: str) -> str:
    """The text at an address."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


def rss(pid: int) -> float:
    """Memory of a process in MB."""
    fields = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return round(int(re.search(r"VmRSS:\s+(\d+)", fields)[1]) / 1024, 1)


async def keep_reading(pid: int, memory: list[float], every: float) -> None:
    """Adds the memory of a process again and again."""
    while True:
        await asyncio.sleep(every)
        memory.append(rss(pid))


def cpu_seconds(pid: int) -> float:
    """CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


if __name__ == "__main__":
    sys.exit(main())
