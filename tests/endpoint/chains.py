"""Small chains for tests, and settings with which trouble passes quickly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tanuki_jax import endpoint
from tanuki_jax.config.synthesis import Endpoint
from tanuki_jax.endpoint import Answer, Ask, Job, Summary
from tests.endpoint.faulty_server import Server

SETTINGS = dict(concurrency=16, timeout_seconds=20.0, retries=8, license="apache-2.0")


def question(text: str, step: str = "q1", **more: Any) -> Job:
    return Job(messages=[{"role": "user", "content": text}], step=step, **more)


async def two_steps(item: Any, ask: Ask) -> list[dict[str, Any]]:
    """A question, and an answer that depends on it."""
    first: Answer = await ask(question(f"question {item}"))
    second = await ask(question(first.text, "a1"))
    return [{"item": item, "question": first.text, "answer": second.text}]


def items(count: int) -> list[tuple[str, Any]]:
    return [(f"item-{number}", number) for number in range(count)]


class Lazy:
    """Items that cannot be counted, and that notes how far they were read."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, 0

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for number in range(self.count):
            self.read = number + 1
            yield f"item-{number}", number


def client(server: Server | str, **settings: Any) -> endpoint.Client:
    url = server if isinstance(server, str) else server.url
    return endpoint.Client(Endpoint(base_url=url, **{**SETTINGS, **settings}), "tiny")


def run(server: Server | str, directory: Path, count: Any = 3, chain: Any = two_steps, **more: Any) -> Summary:
    """A run with one endpoint; keyword arguments of the endpoint go to it, the others to the runner."""
    settings = {name: more.pop(name) for name in list(more) if name in Endpoint.__dataclass_fields__}
    work = items(count) if isinstance(count, int) else count
    return endpoint.run(
        work, chain, {"generator": client(server, **settings)}, directory, **{"recipe": "r", "quiet": True, **more}
    )


def after(server: Server, answers: int, action: Callable[[], Any]) -> None:
    """Does something in a thread once a server has sent some answers."""

    def work() -> None:
        while server.requests["answer"] < answers:
            time.sleep(0.005)
        action()

    threading.Thread(target=work, daemon=True).start()


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
