"""The flags of `tanuki data filter` and `tanuki data audit` beside those that all verbs share; docs/filters.md has more."""

from __future__ import annotations

import argparse

from tanuki_jax.cli.flags import number, path
from tanuki_jax.config.ranges import Range
from tanuki_jax.config.synthesis import PII, Endpoint, Filters


def add_filter(parser: argparse.ArgumentParser) -> None:
    """One flag for each key of `Filters`, and what is compared with, and the judge."""
    parser.add_argument("--against", default="", help="globs of other sets, of whose rows near-duplicates are dropped, too")
    parser.add_argument("--skip_invalid", action="store_true", help="drop rows that cannot be read, instead of stopping at one")
    for name, key in Filters.__dataclass_fields__.items():
        text, default = key.metadata["doc"].replace("%", "%%"), key.default
        if name == "judge":
            _add_judge(parser)
        elif isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true", help=text)
        elif isinstance(default, str):
            parser.add_argument(f"--{name}", choices=PII if name == "pii" else None, default=default, help=text)
        else:
            kind = number(int if isinstance(default, int) else float, key.metadata["range"])
            parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default %(default)s)")
    parser.epilog = "Killed while the judge is asked, the same command goes on with the answers that it has."


def add_audit(parser: argparse.ArgumentParser) -> None:
    """Size of the sample, categories, and who labels."""
    parser.add_argument("--output", type=path, required=True, help="directory of the audit; the same command goes on with it")
    parser.add_argument("--sample", type=number(int, Range(1, 1_000_000)), default=1500, help="rows (default %(default)s)")
    parser.add_argument("--categories", type=path, help="file with a line `name: what it means` each, in place of our list")
    parser.add_argument("--port", type=number(int, Range(0, 65_535)), default=0, help="of the page; 0 = a free one (default)")
    parser.add_argument(
        "--page_only", action="store_true", help="serve nothing: only write page.html, whose labels are downloaded"
    )
    _add_judge(parser)
    parser.epilog = "Without --judge the rows are labelled by hand, on a page that this command serves on 127.0.0.1 alone."


def _add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge", default="", help="address of an OpenAI-compatible API that judges: http://127.0.0.1:8000/v1")
    parser.add_argument("--judge_model", default=Endpoint.model, help="name of its model; empty = the only one that it lists")
    parser.add_argument("--judge_api_key_env", default="", help="environment variable that holds its key; empty = none is sent")
