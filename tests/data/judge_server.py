"""A judge on this machine: an OpenAI-compatible server whose answers are a function of the prompt."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def judge_server(answer):
    """Serves `answer(prompt) -> (text, {token: logprob})`; yields its address and the list of prompts that it got."""
    prompts = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send({"data": [{"id": "judge-model", "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            prompts.append(prompt)
            result = answer(prompt)
            if isinstance(result, int):
                self.send({"error": {"message": "no"}}, result)
                return
            text, logprobs = result
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            if logprobs:
                top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
                choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": top}]}
            self.send(
                {"id": "1", "model": "judge-model", "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
            )

        def send(self, value, status=200):
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *values):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", prompts
    finally:
        server.shutdown()
        server.server_close()
