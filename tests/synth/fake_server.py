"""A server of the OpenAI API on this machine whose answers a function writes."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serve(answer, completions=True, models=("fake", "judge")):
    """Gives the address and the list of request bodies.

    answer(body): the text of an answer, (text, finish_reason), (text, {token: logprob}), or the status of an error.
    """
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def send(self, value, status=200):
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.send({"object": "list", "data": [{"id": name, "object": "model"} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat = self.path.endswith("/chat/completions")
            if not chat and not completions:
                self.send({"detail": "Not Found"}, 404)
                return
            bodies.append(body)
            result = answer(body)
            if isinstance(result, int):
                self.send({"error": {"message": "no"}}, result)
                return
            text, more = (result, "stop") if isinstance(result, str) else result
            finish = more if isinstance(more, str) else "stop"
            top = [{"token": token, "logprob": value} for token, value in ({} if isinstance(more, str) else more).items()]
            logprobs = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": top}]} if top else None
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
            choice = {"index": 0, "finish_reason": finish, "logprobs": logprobs, **said}
            kind = "chat.completion" if chat else "text_completion"
            self.send({"id": "1", "object": kind, "created": 0, "model": "fake", "choices": [choice], "usage": usage})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def serve_judge(answer):
    """The same with one model, for an `answer` of the last message's text; gives the address and the list of these texts."""
    prompts = []

    def answer_prompt(body):
        prompts.append(body["messages"][-1]["content"])
        return answer(prompts[-1])

    with serve(answer_prompt, models=("judge-model",)) as (url, _):
        yield url, prompts
