"""Live metrics besides metrics.jsonl: Prometheus scrapes them, Weights & Biases receives them."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import jax

from tanuki_jax import config, files
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import UserError
from tanuki_jax.train.metrics import Row

if TYPE_CHECKING:
    from wandb import Run

logger = logging.getLogger(__name__)

MetricsCallback: TypeAlias = Callable[[str, Row], None]  # receives the name of a stage and a row of its metrics


@contextlib.contextmanager
def open_trackers(recipe: Recipe, workdir: Path) -> Iterator[MetricsCallback]:
    """A callback that receives a stage's rows on process 0; no failure in there affects the run."""
    with contextlib.ExitStack() as stack:
        callbacks: list[MetricsCallback] = []
        if jax.process_index() == 0 and recipe.prometheus_port:
            callbacks.append(stack.enter_context(_prometheus(recipe.prometheus_port)))
        if jax.process_index() == 0 and recipe.wandb_project:
            callbacks.append(stack.enter_context(_wandb(recipe, workdir)))

        def on_metrics(stage: str, row: Row) -> None:
            for callback in list(callbacks):
                try:
                    callback(stage, row)
                except Exception as error:  # of a network, say: training is worth more
                    callbacks.remove(callback)
                    logger.warning("metrics no longer go to %s: %s", getattr(callback, "__name__", callback), error)

        yield on_metrics


def flatten(row: Row) -> dict[str, float]:
    """The numbers of a row; lists and groups become one number for each part, name/part."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= flatten({f"{name}/{part}": v for part, v in value.items()})
        elif isinstance(value, list):
            flat |= flatten({f"{name}/{part}": v for part, v in enumerate(value)})
        elif isinstance(value, int | float):
            flat[name] = value
    return flat


@contextlib.contextmanager
def _prometheus(port: int) -> Iterator[MetricsCallback]:
    page = "# tanuki\n"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            has_page = self.path.split("?")[0] in ("/metrics", "/")
            body = page.encode() if has_page else b"metrics are at /metrics\n"
            self.send_response(200 if has_page else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Logs no requests."""

    try:
        server = http.server.ThreadingHTTPServer(("", port), Handler)
    except OSError as error:
        raise UserError(f"config: prometheus_port {port} cannot be opened: {error.strerror}; use another, or 0") from error
    thread = threading.Thread(target=server.serve_forever, name="prometheus", daemon=True)
    thread.start()

    def prometheus(stage: str, row: Row) -> None:
        nonlocal page
        page = exposition(stage, row)

    try:
        yield prometheus
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def exposition(stage: str, row: Row) -> str:
    """A row in Prometheus' text format 0.0.4: a line `tanuki_metric{stage="...",name="moe/load/3"} value` per number."""
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
    # The same id after a restart, so that the curves continue.
    identity = files.fingerprint(str(workdir.absolute()), recipe.name, recipe.seed)
    settings = json.loads(json.dumps(config.to_dict(recipe)))
    try:
        run: Run = wandb.init(
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
        logger.warning("metrics do not go to Weights & Biases: %s", error)
        yield lambda stage, row: None
        return

    def wandb_project(stage: str, row: Row) -> None:
        run.log({f"{stage}/{name}": value for name, value in flatten(row).items()})

    try:
        yield wandb_project
    finally:
        with contextlib.suppress(Exception):  # an error here must not hide the one that ends the run
            run.finish()
