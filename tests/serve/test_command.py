"""`tanuki serve` as a process: its start, its signals, its end."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import openai
import pytest

from tanuki_jax import checkpoint, config
from tanuki_jax.cli.main import main
from tests.serve.conftest import CFG

WAIT = 300  # seconds, after which a test has failed
START = "import sys; from tanuki_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
FAILING = """
from tanuki_jax.serve import decoder
read, count = decoder.SlotsDecoder.read, []
def fail(self, started):
    count.append(1)
    if len(count) > 3:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    return read(self, started)
decoder.SlotsDecoder.read = fail
"""


@pytest.fixture(scope="module")
def stage(loaded, tmp_path_factory):
    directory = tmp_path_factory.mktemp("command") / "tiny"
    checkpoint.save_params(directory, loaded.params, {"model": config.to_dict(CFG), "longest": 64})
    (directory / "tokenizer").symlink_to(loaded.tokenizer_directory)
    return directory


class Process(NamedTuple):
    process: subprocess.Popen
    address: str

    def health(self):
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=WAIT) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def client(self):
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def wait_until(self, condition):
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            try:
                if condition(self.health()):
                    return
            except OSError:
                assert self.process.poll() is None
            time.sleep(0.05)
        pytest.fail("the server did not come so far")


@pytest.fixture
def launch(stage):
    started = []

    def begin(*flags, before=""):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        words = ["serve", f"--checkpoint={stage}", f"--port={port}", "--slots=2", *flags]
        process = subprocess.Popen([sys.executable, "-c", before + START, *words], stderr=subprocess.PIPE, text=True)
        started.append(process)
        return Process(process, f"http://127.0.0.1:{port}")

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_what_cannot_be_is_one_line(stage, capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        for flags, words in (
            ([f"--port={port}"], "Address already in use"),
            ([f"--port={port}", "--host=192.0.2.1"], "cannot be used"),
            (["--port=0"], "at least 1"),
            ([f"--port={port}", "--api_key_env=NO_SUCH_KEY"], "NO_SUCH_KEY is empty"),
        ):
            assert main(["serve", f"--checkpoint={stage}", *flags]) == 1
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1


@pytest.mark.slow
def test_it_compiles_answers_lets_running_requests_end_and_exits_with_0(launch):
    server = launch("--grace=60")
    server.wait_until(lambda answer: answer[0] == 503 and "compiled" in answer[1]["message"])
    with pytest.raises(openai.InternalServerError, match="not ready"):
        server.client().completions.create(model="tiny", prompt="a")
    server.wait_until(lambda answer: answer[0] == 200)
    client = server.client()
    options = dict(model="tiny", prompt=[5], max_tokens=63, temperature=0, extra_body={"ignore_eos": True})
    whole = client.completions.create(**options).choices[0].text
    streams = [client.completions.create(**options, stream=True) for _ in range(8)]  # of which two run and six wait
    text = next(streams[0]).choices[0].text
    server.process.send_signal(signal.SIGTERM)
    refused = 0
    for stream in (streams[0], *streams[1:]):
        try:
            client.completions.create(**options)
        except openai.InternalServerError as error:
            refused += error.status_code == 503
        except openai.APIConnectionError:
            refused += 1
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == whole
        text = ""
    assert refused >= 7  # the first may come before the signal
    assert server.process.wait(WAIT) == 0


# Steps of two seconds: an answer that would take a minute.
SLOW_STEPS = """
import time
from tanuki_jax.serve.decoder import SlotsDecoder
start = SlotsDecoder.start
SlotsDecoder.start = lambda *arguments, **named: (time.sleep(2), start(*arguments, **named))[1]
"""


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(launch):
    server = launch("--grace=1000", before=SLOW_STEPS)
    server.wait_until(lambda answer: answer[0] == 200)
    stream = server.client().completions.create(
        model="tiny", prompt=[5], max_tokens=30, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    begin = time.monotonic()
    for _ in range(2):
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    with pytest.raises(openai.OpenAIError):
        list(stream)
    assert server.process.wait(WAIT) == 0 and time.monotonic() - begin < 30


@pytest.mark.slow
def test_where_the_engine_dies_everybody_hears_of_it_and_the_process_ends_with_1(launch):
    server = launch(before=FAILING)
    server.wait_until(lambda answer: answer[0] == 200)
    client = server.client()

    def ask(_):
        with pytest.raises(openai.InternalServerError, match="out of memory") as error:
            client.completions.create(model="tiny", prompt=[5], max_tokens=60, extra_body={"ignore_eos": True})
        return error.value.status_code

    with ThreadPoolExecutor(6) as threads:
        assert set(threads.map(ask, range(6))) == {500}
    status, health = server.health()
    assert status == 500 and "out of memory" in health["message"]
    assert server.process.wait(WAIT) == 1
    assert "tanuki: serve: the engine has failed" in server.process.stderr.read()
