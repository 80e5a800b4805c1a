"""From recorded answers to rows of training data with their provenance, without any request."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from tanuki_jax import files
from tanuki_jax.endpoint.asker import recorded_answer
from tanuki_jax.endpoint.client import Client
from tanuki_jax.endpoint.job import Answer, Chain, Drop, Failed, Job, seed_of
from tanuki_jax.endpoint.log import AnswerLog
from tanuki_jax.endpoint.summary import Summary
from tanuki_jax.errors import UserError

ROWS, DROPPED = "rows.jsonl", "dropped.jsonl"


@dataclasses.dataclass(frozen=True)
class Records:
    """The answers of a run, and what their jobs' ids depend on.

    recipe: fingerprint; clients: by role.
    """

    answers: AnswerLog
    clients: Mapping[str, Client]
    recipe: str

    def identify(self, job: Job, item_id: str) -> tuple[Job, str]:
        """A job with its item, and its id."""
        if job.role not in self.clients:
            raise UserError(f"step {job.step}: no endpoint for the role {job.role!r}; there are {', '.join(self.clients)}")
        job = job if job.item else dataclasses.replace(job, item=item_id)
        try:
            return job, job.id(self.recipe, self.clients[job.role].endpoint)
        except UnicodeEncodeError as error:  # half a surrogate pair, of a damaged seed
            raise Drop("invalid_text") from error

    def call(self, job: Job, job_id: str, record: Mapping[str, Any], item: object) -> dict[str, Any]:
        """Where an answer comes from, as a row's provenance says it."""
        seed_license = item.get("license") if isinstance(item, Mapping) else None
        return {
            "job": job_id,
            "model": record.get("served_model") or record["model"],
            "role": job.role,
            "step": job.step,
            "sample": job.sample,
            "template": job.template,
            "prompt_sha256": job.prompt_sha256(),
            "sampling": job.settings(self.clients[job.role].endpoint),
            "seed": seed_of(job_id),
            "item": job.item,
            "date": record["date"],
            "license": self.clients[job.role].endpoint.license,
            **({"seed_license": seed_license} if seed_license else {}),
        }


def assemble(
    items: Iterable[tuple[str, Any]], chain: Chain, records: Records, directory: Path, failed: Set[int], summary: Summary
) -> None:
    """Writes rows.jsonl and dropped.jsonl in the order of the items; a row gets `provenance`, the calls that it came from.

    failed: numbers of items that are dropped.
    """
    for name in (ROWS, DROPPED):
        files.remove_unfinished(directory / name)
    digest = hashlib.sha256()
    with (
        files.atomic_path(directory / ROWS) as rows_path,
        files.atomic_path(directory / DROPPED) as dropped_path,
        rows_path.open("wb") as rows_file,
        dropped_path.open("wb") as dropped_file,
    ):

        async def write_all() -> None:
            for number, (item_id, item) in enumerate(items):
                rows, calls = await _replay(item_id, item, chain, records, number in failed)
                for row in rows:
                    if isinstance(row, Drop):
                        summary.dropped[row.reason] += 1
                        content, origin = _split(row.row or {}, calls)
                        left_out = {"row": content} if content else {}
                        jobs = [call["job"] for call in origin]
                        dropped_file.write(files.json_line({"item": item_id, "reason": row.reason, **left_out, "jobs": jobs}))
                    else:
                        summary.rows += 1
                        content, origin = _split(row, calls)
                        line = files.json_line({**content, "provenance": origin})
                        digest.update(line)
                        rows_file.write(line)

        asyncio.run(write_all())
        for file in (rows_file, dropped_file):
            file.flush()
            os.fsync(file.fileno())
    summary.rows_sha256 = digest.hexdigest()


def _split(row: Mapping[str, Any], calls: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row without its field `steps`, and the calls of these steps; all calls of its item where it names none."""
    steps = row.get("steps")
    content = {name: value for name, value in row.items() if name != "steps"}
    return content, calls if steps is None else [call for call in calls if call["step"] in steps]


async def _replay(
    item_id: str, item: Any, chain: Chain, records: Records, failed: bool
) -> tuple[Sequence[Mapping[str, Any] | Drop], list[dict[str, Any]]]:
    """What the chain makes of an item and the recorded answers, and the calls."""
    calls: list[dict[str, Any]] = []

    async def ask(job: Job) -> Answer:
        job, job_id = records.identify(job, item_id)
        record = records.answers.get(job_id)
        if not record:
            raise Failed("missing", f"step {job.step} has no recorded answer")
        calls.append(records.call(job, job_id, record, item))
        return recorded_answer(record)

    try:
        return await chain(item, ask), calls
    except Drop as drop:
        return [drop], calls
    except Failed as failure:
        if failed:
            return [Drop("failed")], calls
        raise UserError(f"item {item_id}: {failure}; a chain must ask the same of the same item and answers") from failure
