"""What a run would ask and cost, without a request."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

from tanuki_jax.config.synthesis import Endpoint
from tanuki_jax.endpoint import budget
from tanuki_jax.endpoint.job import Answer, Chain, Drop, Job, estimate_tokens


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of a whole run, without what fails and is asked again; tokens of prompts are rough, those of answers the most."""

    items: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float

    def __str__(self) -> str:
        return (
            f"{self.items:,} items, about {self.calls:,} calls, {self.prompt_tokens:,} prompt tokens and at most "
            f"{self.completion_tokens:,} answer tokens, cost at most {self.cost:,.2f}"
        )


def estimate(
    items: Iterable[tuple[str, Any]],
    chain: Chain,
    endpoints: Mapping[str, Endpoint],
    *,
    reply: Callable[[Job], str],
    sample: int = 200,
) -> Estimate:
    """Calls the chain for the first `sample` items with answers that nobody wrote, and counts what it asks.

    reply: the text of such an answer.
    endpoints: by the role that jobs name.
    """
    source = iter(items)
    first = list(itertools.islice(source, sample))
    total = len(items) if isinstance(items, Sized) else len(first) + sum(1 for _ in source)
    amount = asyncio.run(_count(first, chain, endpoints, reply))
    factor = total / max(len(first), 1)
    calls, prompt, completion = (round(factor * n) for n in (amount.calls, amount.prompt_tokens, amount.completion_tokens))
    return Estimate(total, calls, prompt, completion, factor * amount.cost)


async def _count(
    items: Iterable[tuple[str, Any]], chain: Chain, endpoints: Mapping[str, Endpoint], reply: Callable[[Job], str]
) -> budget.Amount:
    amount = budget.Amount()

    async def ask(job: Job) -> Answer:
        endpoint = endpoints[job.role]
        prompt, completion = estimate_tokens(job.text()), int(job.settings(endpoint)["max_tokens"])
        amount.add(budget.Amount(1, prompt, completion, budget.cost(endpoint, prompt, completion)))
        return Answer(reply(job))

    for _, item in items:
        try:
            await chain(item, ask)
        except Drop:
            continue
    return amount
