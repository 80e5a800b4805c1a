"""How an attempt of a run stands, from the answer of worker.py's `status`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tanuki_jax.errors import UserError
from tanuki_jax.launch import worker

STRAGGLERS = 5  # looks that the other workers have to end after the first one has
BAD_INPUT = {1, worker.NO_PROGRAM}  # exit codes of a run that would fail in the same way again


def is_finished(status: Mapping[str, Any]) -> bool:
    """Whether the newest attempt ended well and the run itself says that every stage is done."""
    return bool(status.get("done")) and status["here"] == status["attempt"] and 0 in status["exits"].values()


def is_over(status: Mapping[str, Any], ended: int, workers: int) -> bool:
    """Whether the newest attempt is none of these slices, or has ended on them; `ended` looks ago the first worker did."""
    exits = status["exits"]
    if not status["attempt"] or status["here"] != status["attempt"]:
        return True
    if BAD_INPUT & set(exits.values()) or len(exits) >= workers or ended > STRAGGLERS:
        return True
    return not exits and not status["alive"]  # the process vanished with its machine


def check_end(status: Mapping[str, Any], workdir: str) -> None:
    """An error where the same would come again, or nobody wants it again."""
    codes = set(status["exits"].values())
    if codes & BAD_INPUT:
        raise UserError(f"launch: the run ended with exit code {min(codes & BAD_INPUT)}:\n{status.get('message', '')}")
    if status.get("stopped"):
        raise UserError("launch: the run was told to stop; the same command goes on from its last checkpoint")
    if codes == {0}:
        raise UserError(f"launch: the run ended with exit code 0, but {workdir}/summary.json does not list every stage")


def describe_end(status: Mapping[str, Any]) -> str:
    """Exit codes, or the last line where there are none."""
    codes = ", ".join(f"{host} {code}" for host, code in sorted(status["exits"].items())[:4])
    return f"exit codes: {codes}" if codes else f"no exit code; last line: {status['last']}"
