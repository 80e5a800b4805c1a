"""Jobs to answers: each job is asked once, tried again where it makes sense, and recorded."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tanuki_jax.endpoint import budget
from tanuki_jax.endpoint.budget import Amount, Meter
from tanuki_jax.endpoint.client import MAX_REQUESTS, Client
from tanuki_jax.endpoint.gate import Gate, back_off
from tanuki_jax.endpoint.job import NO_ANSWER, Answer, Failed, Job, NoAnswer, estimate_tokens
from tanuki_jax.endpoint.log import AnswerLog, LineLog
from tanuki_jax.endpoint.reply import Failure
from tanuki_jax.endpoint.summary import Summary
from tanuki_jax.errors import UserError

EMPTY_TRIES = 4  # in a row, after which an answer is taken to be empty
RATE_ROUNDS = 4  # times `retries` + 1: pauses that an endpoint may ask for without an answer in between
MIN_STREAK = 8  # failures of any kind without an answer in between, or as many as may be under way: all wait
STREAK_ROUNDS = 2  # times `retries` + 1: such pauses, after which the run ends
BAD_REQUESTS = 20  # refused requests before the first answer, after which the run ends


class Stopped(Exception):
    """The run ends; the job was not asked."""


class Asker:
    """The open clients of a run, its budget and its records."""

    def __init__(
        self, clients: Mapping[str, Client], meter: Meter, answers: AnswerLog, failures: LineLog, summary: Summary
    ) -> None:
        same: dict[Any, Client] = {}
        self.clients = {role: same.setdefault(client.endpoint, client) for role, client in clients.items()}
        self._gates = {id(client): Gate(min(client.endpoint.concurrency, MAX_REQUESTS)) for client in same.values()}
        self._meter, self._answers, self._failures, self._summary = meter, answers, failures, summary
        self._bad_requests = 0
        self._has_answer = summary.outcomes["answer"] > 0
        self._start: asyncio.Task[None] | None = None
        self.stopping = False
        self.under_way: set[asyncio.Task[Any]] = set()  # tasks whose request has been sent

    def places(self) -> int:
        """Requests that may be under way."""
        return sum(client.endpoint.concurrency for client in self._distinct())

    async def start(self) -> None:
        """Opens the clients, at the first call."""
        self._start = self._start or asyncio.create_task(self._start_all())
        await asyncio.shield(self._start)

    async def close(self) -> None:
        for client in self._distinct():
            await client.close()

    async def answer(self, job: Job, job_id: str, number: int) -> Answer:
        """Asks until there is an answer, and records it.

        number: of the item; lower ones go first.

        Raises:
          NoAnswer: there is none, which is recorded, too.
          Failed: the tries are used up, which is recorded apart.
          UserError: no request can succeed, or the budget is spent.
        """
        try:
            return await self._answer(job, job_id, number)
        except (UserError, OSError):  # the end of the run; until all tasks know it no other request is to be sent
            self.stopping = True
            raise

    async def _answer(self, job: Job, job_id: str, number: int) -> Answer:
        self._meter.check()
        await self.start()
        client = self.clients[job.role]
        gate, endpoint = self._gates[id(client)], client.endpoint
        bound = budget.upper_bound(job, endpoint)
        faults: Counter[str] = Counter()
        wasted: Counter[str] = Counter()
        empties = 0  # in a row

        def record(outcome: str, **more: Any) -> dict[str, Any]:
            usage = more.get("usage") or {}
            total = Counter(wasted)
            total.update(usage)
            row: dict[str, Any] = {"id": job_id, "outcome": outcome, "item": job.item, "role": job.role, "step": job.step}
            row |= {"sample": job.sample, "model": endpoint.model, **more, "license": endpoint.license}
            row |= {"cost": budget.cost(endpoint, total["prompt_tokens"], total["completion_tokens"])}
            row |= {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            optional = {"faults": dict(faults), "wasted": dict(wasted)}
            return row | {name: value for name, value in optional.items() if value}

        while True:
            try:
                answer = await self._request(client, gate, job, job_id, number, bound)
            except NoAnswer as none:
                details = dict(none.row or {})
                self._keep(record(none.reason, **details))
                raise
            except Failure as failure:
                if failure.kind == "unreachable":
                    self._summary.outcomes["unreachable"] += 1
                    if self.stopping:
                        raise Stopped from None
                    continue
                faults[failure.kind] += 1
                wasted.update(failure.usage)
                empties = empties + 1 if failure.kind == "empty" else 0
                pause = self._pause_before_retry(failure, faults, endpoint.retries)
                if pause is None or empties >= EMPTY_TRIES:
                    message = f"{failure}"
                    if empties >= EMPTY_TRIES:
                        self._keep(record("empty", message=message))
                        raise NO_ANSWER["empty"]("empty", {"message": message}) from None
                    row = record(failure.kind, message=message)
                    self._failures.append(row)
                    self._summary.add_record(row)
                    raise Failed(failure.kind, message) from None
                if self.stopping:
                    raise Stopped from None
                await asyncio.sleep(pause)
            else:
                self._has_answer = True
                details = {"finish_reason": answer.finish_reason, "text": answer.text, "usage": dict(answer.usage)}
                if answer.model and answer.model != endpoint.model:
                    details["served_model"] = answer.model
                if answer.logprobs:
                    details["logprobs"] = dict(answer.logprobs)
                self._keep(record("answer", **details))
                return answer

    async def _request(self, client: Client, gate: Gate, job: Job, job_id: str, number: int, bound: Amount) -> Answer:
        """One request, with a place at the endpoint and in the budget; troubles that all share hold all back."""
        await gate.acquire(number)
        spent: Amount | None = None
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task
        try:
            if self.stopping:
                raise Stopped
            await self._meter.reserve(bound)
            spent = Amount(1)
            began = loop.time()
            self.under_way.add(task)
            try:
                answer = await client.ask(job, job_id)
            except NoAnswer as none:
                gate.reset()
                self._charge(spent, client, (none.row or {}).get("usage", {}))
                if none.reason == "overflow":
                    self._count_refused(client, (none.row or {}).get("message"), "lower max_tokens")
                raise
            except Failure as failure:
                self._charge(spent, client, failure.usage)
                if failure.kind == "unreachable":
                    spent = Amount()
                self._hold_back(client, gate, failure, began)
                raise
            gate.reset()
            if not answer.usage:  # the server does not say
                answer = _with_usage(answer, job)
            self._charge(spent, client, answer.usage)
            return answer
        finally:
            self.under_way.discard(task)
            if spent is not None:
                self._meter.settle(bound, spent)
            gate.release()

    def _charge(self, spent: Amount, client: Client, usage: Mapping[str, int]) -> None:
        prompt, completion = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        spent.add(Amount(0, prompt, completion, budget.cost(client.endpoint, prompt, completion)))

    def _hold_back(self, client: Client, gate: Gate, failure: Failure, began: float) -> None:
        """A pause for all where the endpoint is in trouble; UserError where that does not end.

        It is in trouble where it cannot be reached, asks to wait, or as many calls as may be under way failed in a row.
        """
        retries, limit = client.endpoint.retries, 0
        gate.failures += 1
        if failure.kind == "unreachable":
            limit, fix = retries, "start its server and run the same command again"
        elif failure.kind == "rate_limit" or failure.retry_after is not None:
            limit, fix = RATE_ROUNDS * (retries + 1), "run the same command again later, or lower `concurrency`"
        elif failure.kind == "bad_request":
            self._count_refused(client, failure, "correct the endpoint's settings")
            return
        elif gate.failures >= max(MIN_STREAK, client.endpoint.concurrency):
            limit, fix = STREAK_ROUNDS * (retries + 1), "look at its server and run the same command again"
        else:
            return
        if gate.pause(began, failure.retry_after) > limit:
            message = f"{failure}, {gate.rounds} times in a row; what was answered is saved"
            raise UserError(f"{client.label}: {message}: {fix}") from failure

    def _count_refused(self, client: Client, message: object, fix: str) -> None:
        """Ends a run in which no request is ever accepted, before all items are used up."""
        self._bad_requests += not self._has_answer
        if self._bad_requests >= BAD_REQUESTS:
            raise UserError(f"{client.label}: it refuses every request ({message}); {fix}")

    def _pause_before_retry(self, failure: Failure, faults: Counter[str], retries: int) -> float | None:
        """Seconds to wait, without a place; None where there is to be no other try."""
        if failure.kind == "rate_limit":
            return 0.0  # the gate waits
        if failure.kind == "bad_request":
            return None
        tries = faults.total() - faults["rate_limit"]
        return back_off(tries - 1, failure.kind) if tries <= retries else None

    def _keep(self, row: dict[str, Any]) -> None:
        self._answers.append(row)
        self._summary.add_record(row)

    def _distinct(self) -> list[Client]:
        return list({id(client): client for client in self.clients.values()}.values())

    async def _start_all(self) -> None:
        for client in self._distinct():
            await client.start()


def _with_usage(answer: Answer, job: Job) -> Answer:
    """With an estimate of its tokens."""
    usage = {"prompt_tokens": estimate_tokens(job.text()), "completion_tokens": estimate_tokens(answer.text)}
    return Answer(answer.text, answer.finish_reason, usage, answer.model, answer.logprobs)


def recorded_answer(row: Mapping[str, Any]) -> Answer:
    """The answer in a row of answers.jsonl.

    Raises:
      NoAnswer: it says that there is none.
    """
    if row["outcome"] != "answer":
        raise NO_ANSWER[row["outcome"]](row["outcome"], {"message": row.get("message", "")})
    return Answer(
        row["text"],
        row["finish_reason"],
        row["usage"],
        row.get("served_model") or row["model"],
        row.get("logprobs", {}),
    )
