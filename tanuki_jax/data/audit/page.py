"""The page on which a person labels a sample: a file that works alone, or served on this machine."""

from __future__ import annotations

import functools
import json
import secrets
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from threading import Lock
from typing import Any

from tanuki_jax import files
from tanuki_jax.data.audit.audit import Audit
from tanuki_jax.errors import UserError

HOST = "127.0.0.1"
MAX_BODY = 10_000  # bytes of a label
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"


def render(audit: Audit) -> str:
    """The page with the sample, the categories and the labels so far in it; it asks for nothing outside."""
    labels = audit.labels()
    document = {
        "id": files.fingerprint(str(audit.directory.resolve()), [row.text for row in audit.sample]),
        "categories": [category._asdict() for category in audit.categories],
        "rows": [row._asdict() for row in audit.sample],
        "labels": {str(number): category for number, category in labels.items()},
    }
    template = (resources.files("tanuki_jax.data.audit") / "page.html").read_text("utf-8")
    return template.replace("{{DATA}}", json.dumps(document, ensure_ascii=False).replace("<", "\\u003c"))


def write_page(audit: Audit) -> None:
    """Writes page.html, whose labels are downloaded as labels.jsonl."""
    files.write_text(audit.directory / "page.html", render(audit))


class _Server(ThreadingHTTPServer):
    """Quiet about clients that leave."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: a browser closes connections as it likes."""


def make_server(audit: Audit, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server on this machine that shows the page and appends each label to labels.jsonl, and its address.

    The address holds a random key; requests without it, or from a page of another site, are refused.
    """
    key = secrets.token_urlsafe(16)
    try:
        server = _Server((HOST, port), functools.partial(_Handler, audit, key, Lock()))
    except OSError as error:
        raise UserError(f"--port: cannot listen on {HOST}:{port}: {error.strerror}") from error
    return server, f"http://{HOST}:{server.server_port}/{key}/"


def serve(audit: Audit, port: int = 0) -> None:
    """Serves the page until every row has a label or Ctrl-C is pressed; labels are on the disk as soon as they are clicked."""
    server, address = make_server(audit, port)
    print(f"label the rows at {address} (Ctrl-C ends; the same command goes on)", file=sys.stderr, flush=True)
    server.timeout = 0.5
    try:
        while len(audit.labels()) < len(audit.sample):
            server.handle_request()
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """GET KEY/ is the page, POST KEY/label a label."""

    server_version, sys_version = "tanuki", ""
    timeout = 10  # seconds of a connection that says nothing

    def __init__(self, audit: Audit, key: str, lock: Lock, *request: Any) -> None:
        self.audit, self.key, self.lock = audit, key, lock
        super().__init__(*request)

    def do_GET(self) -> None:
        """The page."""
        if self._allowed(f"/{self.key}/"):
            self._answer(200, render(self.audit).encode(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        """A label: {"number", "category"}."""
        if not self._allowed(f"/{self.key}/label"):
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 < length <= MAX_BODY or self.headers.get_content_type() != "application/json":
                raise ValueError("body")
            label = json.loads(self.rfile.read(length))
            with self.lock:
                self.audit.add_label(int(label["number"]), str(label["category"]))
                self._answer(200, b"{}", "application/json")
        except (ValueError, KeyError, TypeError, UserError):
            self._answer(400, b"no label", "text/plain")
            return
        except OSError as error:
            self._answer(507, f"the label could not be written: {error.strerror}".encode(), "text/plain")

    def _allowed(self, path: str) -> bool:
        """Whether a request is for `path` on this machine, not from another site's page by way of a name."""
        port = self.server.server_port  # type: ignore[attr-defined]
        hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        same_site = self.headers.get("Host") in hosts and (origin is None or origin.removeprefix("http://") in hosts)
        if same_site and secrets.compare_digest(self.path.encode(), path.encode()):
            return True
        self._answer(404, b"not found", "text/plain")
        return False

    def _answer(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": POLICY,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: Any) -> None:
        """Logs nothing: the address holds the key."""
