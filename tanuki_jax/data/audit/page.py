"""The page on which a person labels a sample: a file that works alone, or served on this machine."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import sys
from collections.abc import Callable
from importlib import resources

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from tanuki_jax import files
from tanuki_jax.data.audit.audit import Audit
from tanuki_jax.errors import UserError

HOST = "127.0.0.1"
MAX_BODY = 10_000  # bytes of a label
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def render(audit: Audit) -> str:
    """The page with the sample, the categories and the labels so far in it; it asks for nothing outside."""
    labels = audit.last_labels()
    document = {
        "id": files.fingerprint(str(audit.directory.resolve()), [row.text for row in audit.sample]),
        "categories": [category._asdict() for category in audit.categories],
        "rows": [row._asdict() for row in audit.sample],
        "labels": {str(number): label["category"] for number, label in labels.items()},
        "judges": {str(number): label["by"] for number, label in labels.items() if label.get("by", "hand") != "hand"},
    }
    template = (resources.files("tanuki_jax.data.audit") / "page.html").read_text("utf-8")
    return template.replace("{{DATA}}", json.dumps(document, ensure_ascii=False).replace("<", "\\u003c"))


def write_page(audit: Audit) -> None:
    """Writes page.html, whose labels are downloaded as labels.jsonl."""
    files.write_text(audit.directory / "page.html", render(audit))


def make_app(audit: Audit, key: str, on_label: Callable[[], None] = lambda: None) -> Starlette:
    """KEY/ is the page, and POST KEY/label appends {"number", "category"} to labels.jsonl, after which on_label is called.

    As `tanuki serve` does, it refuses requests that call this machine by another name, and those of another site's page.
    """

    async def show(http: Request) -> Response:
        return HTMLResponse(render(audit), headers=HEADERS)

    async def label(http: Request) -> Response:
        if http.headers.get("origin", "").partition("://")[2] not in ("", http.headers["host"]):
            return Response("a page of another site may not write labels", 403)
        try:
            length = int(http.headers.get("content-length", ""))
            if not 0 < length <= MAX_BODY or http.headers.get("content-type") != "application/json":
                raise ValueError("body")
            value = json.loads(await http.body())
            audit.add_label(int(value["number"]), str(value["category"]))
        except (ValueError, KeyError, TypeError, UserError):
            return Response("no label", 400)
        except OSError as error:
            return Response(f"the label could not be written: {error.strerror}", 507)
        on_label()
        return JSONResponse({})

    routes = [Route(f"/{key}/", show), Route(f"/{key}/label", label, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, [HOST, "localhost"])])


def serve(audit: Audit, port: int = 0) -> None:
    """Serves the page until every row has a label or Ctrl-C is pressed; labels are on the disk as soon as they are clicked.

    The address holds a random key, without which nothing is there.
    """

    def end_with_last() -> None:
        server.should_exit = len(audit.labels()) == len(audit.sample)

    key = secrets.token_urlsafe(16)
    app = make_app(audit, key, end_with_last)
    config = uvicorn.Config(
        app, lifespan="off", ws="none", log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    if len(audit.labels()) == len(audit.sample):
        return
    try:
        sock = socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(f"--port: cannot listen on {HOST}:{port}: {error.strerror}") from error
    address = f"http://{HOST}:{sock.getsockname()[1]}/{key}/"
    print(f"label the rows at {address} (Ctrl-C ends; the same command goes on)", file=sys.stderr, flush=True)
    with sock, contextlib.suppress(KeyboardInterrupt):
        server.run([sock])
