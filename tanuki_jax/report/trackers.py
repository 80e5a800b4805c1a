"""Where metrics go beside metrics.jsonl while a run goes on: Prometheus asks for them, Weights & Biases gets them."""

from __future__ import annotations

import contextlib
import http.server
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from tanuki_jax import config, files
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import UserError

MetricsCallback = Callable[[str, dict[str, Any]], None]  # a stage and a row of its metrics


@contextlib.contextmanager
def open_trackers(recipe: Recipe, workdir: Path) -> Iterator[MetricsCallback]:
    """What a stage's rows are to be told to, on the first process; nothing that fails there touches the run."""
    with contextlib.ExitStack() as stack:
        told: list[MetricsCallback] = []
        if jax.process_index() == 0 and recipe.prometheus_port:
            told.append(stack.enter_context(_prometheus(recipe.prometheus_port)))
        if jax.process_index() == 0 and recipe.wandb_project:
            told.append(stack.enter_context(_wandb(recipe, workdir)))

        def tell(stage: str, row: dict[str, Any]) -> None:
            for one in list(told):
                try:
                    one(stage, row)
                except Exception as error:  # of a network, say: training is worth more
                    told.remove(one)
                    print(f"metrics are no longer told to {one.__name__}: {error}", file=sys.stderr, flush=True)

        yield tell


def flatten(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row; lists and groups become one number for each part, name/part."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= flatten({f"{name}/{part}": v for part, v in value.items()})
        elif isinstance(value, list):
            found |= flatten({f"{name}/{part}": v for part, v in enumerate(value)})
        elif isinstance(value, int | float):
            found[name] = value
    return found


@contextlib.contextmanager
def _prometheus(port: int) -> Iterator[MetricsCallback]:
    page = "# tanuki\n"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path.split("?")[0] in ("/metrics", "/")
            body = page.encode() if known else b"metrics are at /metrics\n"
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Says nothing of each visit."""

    try:
        server = http.server.ThreadingHTTPServer(("", port), Handler)
    except OSError as error:
        raise UserError(f"config: prometheus_port {port} cannot be opened: {error.strerror}; use another, or 0") from error
    thread = threading.Thread(target=server.serve_forever, name="prometheus", daemon=True)
    thread.start()

    def prometheus(stage: str, row: dict[str, Any]) -> None:
        nonlocal page
        page = exposition(stage, row)

    try:
        yield prometheus
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def exposition(stage: str, row: dict[str, Any]) -> str:
    """A row in Prometheus' text format 0.0.4, a line `tanuki_metric{stage="...",name="moe/load/3"} value` for each number."""
    label = stage.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = ["# HELP tanuki_metric The last logged step of a stage, by name.", "# TYPE tanuki_metric gauge"]
    for name, value in flatten(row).items():
        lines.append(f'tanuki_metric{{stage="{label}",name="{name}"}} {float(value)!r}')
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _wandb(recipe: Recipe, workdir: Path) -> Iterator[MetricsCallback]:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "config: wandb_project needs the package wandb: pip install 'tanuki-jax[wandb]', or leave it empty"
        ) from error
    # The same id again after a restart, so that the curves go on.
    identity = files.fingerprint(str(workdir.absolute()), recipe.name, recipe.seed)
    settings: dict[str, Any] = json.loads(json.dumps(config.to_dict(recipe)))
    try:
        run = wandb.init(
            project=recipe.wandb_project,
            name=recipe.name or None,
            id=identity,
            resume="allow",
            dir=str(workdir),
            config=settings,
        )
        for stage in recipe.stages:
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    except Exception as error:  # of the network or of the account
        print(f"metrics are not told to Weights & Biases: {error}", file=sys.stderr, flush=True)
        yield lambda stage, row: None
        return

    def wandb_project(stage: str, row: dict[str, Any]) -> None:
        run.log({f"{stage}/{name}": value for name, value in flatten(row).items()})

    try:
        yield wandb_project
    finally:
        with contextlib.suppress(Exception):  # the run's own end must be told, not that of its copy
            run.finish()
