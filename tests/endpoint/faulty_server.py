"""An OpenAI-compatible server that fails on purpose, and says how much it could have answered.

python tests/endpoint/faulty_server.py --port=8000 --share=0.05 --slots=32 --seconds=0.1

It works on `slots` requests at a time, each for `seconds`; others wait in a queue.  After a 429 it refuses everything for
`retry_after` seconds, as rate limits do.  The text of an answer is a function of the request alone: `answer_text`.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

FAULTS = ("error_500", "rate_limit", "time_out", "cut_body", "cut_stream", "html", "garbage", "no_choices", "null_content")
HTML = b"<!DOCTYPE html><html><body>502 but we say 200</body></html>"


@dataclass
class Behaviour:
    """How a server behaves."""

    share: float = 0.0  # of each of `faults`
    faults: tuple[str, ...] = FAULTS
    slots: int = 64  # requests that it works on at a time
    seconds: float = 0.005  # that each takes
    retry_after: float = 0.05
    hang_seconds: float = 30.0  # of a request that is never answered
    keys: tuple[str, ...] = ()  # that are accepted; none = any, and none
    models: tuple[str, ...] = ("tiny",)
    context: int = 10**9  # characters of a prompt
    min_max_tokens: int = 0  # less is refused
    usage: bool = True  # tokens are counted
    random_seed: int = 0


@dataclass
class Server:
    """The state of a running server."""

    behaviour: Behaviour
    url: str = ""
    requests: Counter[str] = field(default_factory=Counter)  # by what they came to
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    busy_seconds: float = 0.0  # summed over the slots
    closed_seconds: float = 0.0  # in which it refused everything
    refused_early: int = 0  # requests that came although it had said to wait, later than a pause takes to begin
    first: float = 0.0  # time of the first request
    last: float = 0.0  # time of the last answer
    work: list[tuple[float, float]] = field(default_factory=list)  # time, and busy_seconds at that time
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.behaviour.random_seed)
        self.closed_until = self.closed_at = 0.0
        self.at_once = 0
        self.slots: asyncio.Semaphore
        self.stop: Callable[[], None]

    def busy_share(self, part: float = 1.0) -> float:
        """How busy its slots were, of 1, from the first request until a part of the work was done."""
        until, busy = self.work[int(part * len(self.work)) - 1]
        return busy / (self.behaviour.slots * (until - self.first))

    async def serve(self, port: int = 0) -> asyncio.Server:
        self.slots = asyncio.Semaphore(self.behaviour.slots)
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, backlog=1000)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        return server

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = re.search(r"content-length: *(\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length.group(1)) if length else 0)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    stays = await self._respond(head, body, writer)
                finally:
                    self.at_once -= 1
                await writer.drain()
                if not stays:
                    break
        writer.close()

    async def _respond(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; returns whether the connection stays open."""
        behaviour, now = self.behaviour, time.monotonic()
        path = head.split()[1]
        key = re.search(r"authorization: *bearer (\S+)", head, re.IGNORECASE)
        if behaviour.keys and (not key or key.group(1) not in behaviour.keys):
            self.requests["refused_key"] += 1
            message = f"Incorrect API key provided: {key.group(1) if key else ''}"
            return _send(writer, 401, {"error": {"message": message, "code": "invalid_api_key"}})
        if path == "/v1/models":
            return _send(writer, 200, {"object": "list", "data": [{"id": name} for name in behaviour.models]})
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return _send(writer, 404, {"detail": "Not Found"})
        request = json.loads(body)
        self.first = self.first or now
        self.bodies.append(request)
        self.headers.append(head)
        if request["model"] not in behaviour.models:
            return _send(writer, 404, {"error": {"message": f"The model {request['model']} does not exist"}})
        size = len(request.get("prompt") or "".join(m["content"] for m in request.get("messages", ())))
        if size > behaviour.context:
            self.requests["overflow"] += 1
            message = f"This model's maximum context length is {behaviour.context} tokens. You asked for {size}."
            return _send(writer, 400, {"error": {"message": message, "code": 400}})
        if request["max_tokens"] < behaviour.min_max_tokens:
            self.requests["bad_request"] += 1
            message = f"max_tokens must be at least {behaviour.min_max_tokens}"
            return _send(writer, 400, {"error": {"message": message}})
        if now < self.closed_until:
            self.requests["rate_limit"] += 1
            self.refused_early += now > self.closed_at + min(0.1, behaviour.retry_after)
            return self._send_rate_limit(writer, self.closed_until - now)
        fault = self._draw()
        self.requests[fault or "answer"] += 1
        if fault == "error_500":
            return _send(writer, 500, {"error": {"message": "The server had an error"}})
        if fault == "rate_limit":
            self.closed_at, self.closed_until = now, now + behaviour.retry_after
            self.closed_seconds += behaviour.retry_after
            return self._send_rate_limit(writer, behaviour.retry_after)
        if fault == "time_out":
            await asyncio.sleep(behaviour.hang_seconds)
            return False
        async with self.slots:
            began = time.monotonic()
            await asyncio.sleep(behaviour.seconds)
            self.busy_seconds += time.monotonic() - began
            self.last = time.monotonic()
            self.work.append((self.last, self.busy_seconds))
        return self._send_worked(fault, request, writer)

    def _draw(self) -> str:
        number = self.random.random()
        index = int(number / self.behaviour.share) if self.behaviour.share else len(self.behaviour.faults)
        return self.behaviour.faults[index] if index < len(self.behaviour.faults) else ""

    def _send_rate_limit(self, writer: asyncio.StreamWriter, seconds: float) -> bool:
        more = f"retry-after: {max(seconds, 0.001):.3f}\r\n"
        return _send(writer, 429, {"error": {"message": "Rate limit reached", "code": "rate_limit"}}, more=more)

    def _send_worked(self, fault: str, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        answer = completion(request)
        if not self.behaviour.usage:
            del answer["usage"]
        whole = json.dumps(answer).encode()
        if fault == "cut_body":
            writer.write(_head(200, len(whole)) + whole[: len(whole) // 2])
            return False
        if fault == "cut_stream":
            half = whole[: len(whole) // 2]
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
            writer.write(head + b"%x\r\n" % len(half) + half + b"\r\n")
            return False
        if fault == "html":
            writer.write(_head(200, len(HTML), "text/html") + HTML)
        elif fault == "garbage":
            writer.write(_head(200, 14) + b'{"choices": [{')
        elif fault == "no_choices":
            _send(writer, 200, {**answer, "choices": []})
        elif fault == "null_content":
            answer["choices"][0]["message" if "messages" in request else "text"] = (
                {"content": None} if "messages" in request else None
            )
            _send(writer, 200, answer)
        else:
            writer.write(_head(200, len(whole)) + whole)
        return True


def answer_text(request: dict[str, Any]) -> str:
    """The text of an answer, from the messages and the seed alone."""
    asked = json.dumps([request.get("messages") or request.get("prompt"), request.get("seed")])
    return f"answer {hashlib.sha256(asked.encode()).hexdigest()[:12]} 回答"


def completion(request: dict[str, Any]) -> dict[str, Any]:
    """A whole answer."""
    text, finish = answer_text(request), "stop"
    last = request.get("prompt") or request["messages"][-1]["content"]
    if "<cut>" in last:
        finish = "length"
    if "<filter>" in last:
        finish = "content_filter"
    if "<empty>" in last:
        text = ""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    if "messages" in request:
        refusal = "I cannot help with that." if "<refuse>" in last else None
        choice["message"] = {"role": "assistant", "content": None if refusal else text, "refusal": refusal}
        if request.get("logprobs"):
            tops = [{"token": "yes", "logprob": -0.25}, {"token": "no", "logprob": -1.5}]
            choice["logprobs"] = {"content": [{"token": "yes", "logprob": -0.25, "top_logprobs": tops}]}
    else:
        choice["text"] = text
        if request.get("logprobs"):
            choice["logprobs"] = {"top_logprobs": [{"yes": -0.25, "no": -1.5}]}
    usage = {"prompt_tokens": len(last), "completion_tokens": 5, "total_tokens": len(last) + 5}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [choice],
        "usage": usage,
    }


def _head(status: int, length: int, kind: str = "application/json", more: str = "") -> bytes:
    return f"HTTP/1.1 {status} x\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n{more}\r\n".encode()


def _send(writer: asyncio.StreamWriter, status: int, value: object, more: str = "") -> bool:
    body = json.dumps(value).encode()
    writer.write(_head(status, len(body), more=more) + body)
    return True


@contextlib.contextmanager
def serve(behaviour: Behaviour | None = None, port: int = 0) -> Iterator[Server]:
    """A server in a thread."""
    server = Server(behaviour or Behaviour())
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    def work() -> None:
        asyncio.set_event_loop(loop)
        listener = loop.run_until_complete(server.serve(port))
        ready.set()
        loop.run_forever()
        listener.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)

    def stop() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    server.stop = stop
    thread.start()
    ready.wait()
    try:
        yield server
    finally:
        stop()


def main() -> None:
    """Serves until stdin is closed, then prints its counts as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    for name in ("share", "seconds", "retry_after", "hang_seconds"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Behaviour, name))
    parser.add_argument("--slots", type=int, default=Behaviour.slots)
    parser.add_argument("--random_seed", type=int, default=0)
    found = vars(parser.parse_args())
    port = found.pop("port")
    with serve(Behaviour(**found), port) as server:
        print(server.url, flush=True)
        with contextlib.suppress(EOFError):
            input()
    counts = {"requests": dict(server.requests), "refused_early": server.refused_early, "most_at_once": server.most_at_once}
    seconds = {"wall_seconds": server.last - server.first, "closed_seconds": server.closed_seconds}
    busy = {"busy_share": server.busy_share(), "busy_share_95": server.busy_share(0.95)}
    print(json.dumps({**counts, **seconds, **busy}), flush=True)


if __name__ == "__main__":
    main()
