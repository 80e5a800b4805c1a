"""The running server: its socket, its signals, and the engine behind it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import uvicorn

from tanuki_jax import checkpoint, config, parallel
from tanuki_jax.checkpoint.restore import Loaded
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.serve.app import MAX_BODY, Access, Api
from tanuki_jax.serve.decoder import SlotsDecoder, memory_bytes, slots_bytes
from tanuki_jax.serve.engine import Engine
from tanuki_jax.serve.prompts import warm_up
from tanuki_jax.serve.requests import ServedModel

FAILURE_SECONDS = 2.0  # during which /health says that the engine has failed, before the process ends
POLL_SECONDS = 0.1
KEEP_ALIVE = 65  # seconds; clients that keep connections for a minute are never cut off


@dataclass(frozen=True)
class Options:
    """How to serve.

    Args:
      slots: rows that are decoded together.
      max_length: tokens of a prompt and its answer; 0 = the longest row that the checkpoint's stages trained on.
      queue: rows that may wait for a slot.
      model_name: under which clients ask for the model; empty = the name of the stage.
      keys: API keys, of which requests must have one; none = no key is needed.
      grace: seconds that running requests have when the server is to stop.
      max_body: bytes of a request.
      compile_first: whether every program is compiled before the server is ready; otherwise each is when it is first used.
    """

    slots: int = 32
    max_length: int = 0
    queue: int = 256
    model_name: str = ""
    keys: tuple[str, ...] = ()
    grace: float = 30.0
    max_body: int = MAX_BODY
    compile_first: bool = True


@dataclass
class Model:
    """What is served.

    Args:
      params: a list with the parameters, which whoever takes them out removes: nobody else then holds them.
      max_seq_len: tokens of the longest row that it knows.
      mesh: over which the parameters lie, if they lie on several devices.
    """

    cfg: config.ModelConfig
    params: list[Any]
    tokenizer: Tokenizer
    max_seq_len: int
    name: str
    mesh: jax.sharding.Mesh | None = None


class Server(uvicorn.Server):
    """uvicorn's server around an engine: it stops when the engine does, and lets running requests end first."""

    def __init__(self, app: Any, engine: Engine[Any], grace: float) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=5,
            ws="none",
        )
        super().__init__(config)
        self._engine, self._grace = engine, grace
        self._must_stop = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first lets running requests end, the second does not."""
        self.force_exit = self._must_stop
        self.stop()

    def stop(self) -> None:
        """Takes no new requests, and ends when the running ones have ended or the time for that is over."""
        self._engine.drain()
        self._must_stop = True

    def check(self) -> None:
        """A UserError where the engine has failed."""
        if self._engine.state == "failed":
            raise UserError(f"serve: {self._engine.note}")

    async def watch(self, ready: Callable[[], None] = lambda: None) -> None:
        """Waits for the engine's end or the wish to stop, and then lets the server end."""
        loop = asyncio.get_running_loop()
        state = ""
        while not self._must_stop and self._engine.state not in ("failed", "stopped"):
            if state != self._engine.state == "ready":
                ready()
            state = self._engine.state
            await asyncio.sleep(POLL_SECONDS)
        if self._engine.state == "failed":
            await asyncio.sleep(FAILURE_SECONDS)
        deadline = loop.time() + self._grace
        while not self._engine.is_idle() and loop.time() < deadline and not self.force_exit:
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.to_thread(self._engine.stop)  # rows that are left end with an error
        self.should_exit = True

    async def run_with(self, sock: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
        """Starts the engine, and serves on a socket until it is to stop."""
        self._engine.deliver = asyncio.get_running_loop().call_soon_threadsafe
        self._engine.start()
        watching = asyncio.create_task(self.watch(ready))
        try:
            await self.serve([sock])
        finally:
            watching.cancel()
            await asyncio.to_thread(self._engine.stop)


def load(path: Path, tensor: int = 1) -> Model:
    """A checkpoint, its weights over so many devices."""
    if tensor > jax.device_count():
        raise UserError(f"serve: --tensor={tensor}, but JAX has {jax.device_count()} devices")
    sizes = config.Mesh(fsdp=1, tensor=tensor)
    mesh = parallel.make_mesh(sizes, jax.devices()[:tensor]) if tensor > 1 else None
    return as_model(checkpoint.load(path, mesh), mesh)


def as_model(loaded: Loaded, mesh: jax.sharding.Mesh | None = None) -> Model:
    """A loaded checkpoint as a model to serve."""
    tokenizer = Tokenizer(loaded.tokenizer_directory)
    name = loaded.stage_directory.resolve().name
    return Model(loaded.cfg, [loaded.params], tokenizer, checkpoint.max_seq_len(loaded.meta), name, mesh)


def make_server(model: Model, options: Options, loopback: bool = True) -> Server:
    """A server for a model, which it takes over; nothing runs yet."""
    length = options.max_length or model.max_seq_len
    if length < 2:
        raise UserError(f"serve: max_length {length} has no room for a prompt and an answer; it must be at least 2")
    if length > model.max_seq_len:
        raise UserError(f"serve: max_length {length} is more than the {model.max_seq_len} tokens of the model's longest row")
    _check_memory(model, options.slots, length)

    def build(take_note: Callable[[str], None]) -> SlotsDecoder:
        decoder = SlotsDecoder(model.cfg, model.params, options.slots, length, model.mesh)
        if options.compile_first:
            decoder.compile(take_note)
        warm_up(model.tokenizer)
        return decoder

    engine: Engine[Any] = Engine(build, model.tokenizer, options.queue)
    vocab_size = min(model.cfg.vocab_size, model.tokenizer.vocab_size)
    served = ServedModel(options.model_name or model.name, model.tokenizer, vocab_size, length)
    api = Api(engine, served, Access(options.keys, loopback), options.max_body)
    return Server(api.app(), engine, options.grace)


def _check_memory(model: Model, n_slots: int, length: int) -> None:
    """An error where the slots alone are more than the devices hold."""
    devices = [*model.mesh.devices.flat] if model.mesh else jax.devices()[:1]
    needed, there = slots_bytes(model.cfg, n_slots, length), sum(map(memory_bytes, devices))
    if 0 < there < needed:
        raise UserError(
            f"serve: {n_slots} slots of {length:,} tokens need {needed / 1e9:,.1f} GB, and {len(devices)} "
            f"{devices[0].platform} device(s) have {there / 1e9:,.1f} GB; give fewer --slots, or a smaller --max_length"
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket that is ours, so that a port in use is found before anything is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"serve: {host}:{port} cannot be used: {error.strerror or error}; name another --port or --host"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def serve(path: Path, host: str, port: int, options: Options, tensor: int = 1) -> None:
    """Serves a checkpoint until a signal comes; a UserError where the engine has failed."""
    with bind(host, port) as sock:
        server = make_server(load(path, tensor), options, is_loopback(host))
        address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
        if not is_loopback(host) and not options.keys:
            print("anybody who reaches this machine can use the model; --api_key_env asks for a key", file=sys.stderr)
        print(f"compiling; {address}/health says when it is ready", file=sys.stderr, flush=True)
        asyncio.run(server.run_with(sock, lambda: print(f"ready: {address} (API: {address}/v1)", file=sys.stderr, flush=True)))
    server.check()


@contextlib.contextmanager
def background(model: Model | Loaded | Path | str, options: Options | None = None) -> Iterator[str]:
    """Serves a checkpoint, or one that is loaded, in threads of this process; gives its URL, http://127.0.0.1:PORT/v1.

    No signal is handled here.  The server's memory is free afterwards; the parameters of a loaded checkpoint stay.
    """
    options = replace(options or Options(), grace=0.0)
    with bind("127.0.0.1", 0) as sock:
        if isinstance(model, str | Path):
            model = load(Path(model))
        server = make_server(as_model(model) if isinstance(model, Loaded) else model, options)
        is_ready = threading.Event()
        failures: list[BaseException] = []

        def run() -> None:
            try:
                asyncio.run(server.run_with(sock, is_ready.set))
            except BaseException as error:  # uvicorn ends a server that cannot start with SystemExit
                failures.append(error)
            finally:
                is_ready.set()

        def check() -> None:
            server.check()
            if failures:
                raise UserError(f"serve: the server has ended: {failures[0]!r}") from failures[0]

        thread = threading.Thread(target=run, name="server", daemon=True)
        thread.start()
        try:
            is_ready.wait()
            check()
            yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        finally:
            server.stop()
            thread.join()
            gc.collect()
        check()
