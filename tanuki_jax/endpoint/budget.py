"""What a run may spend, and what it has spent."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tanuki_jax.config.synthesis import Endpoint
from tanuki_jax.endpoint.job import Job
from tanuki_jax.errors import UserError


class BudgetSpent(UserError):
    """Nothing more may be asked.  A scheduler must not start the run again by itself: only a larger budget helps."""


@dataclass(frozen=True)
class Budget:
    """The most that may be spent by all runs in a directory; 0 = no limit."""

    max_calls: int = 0  # requests, failed ones included
    max_tokens: int = 0  # of prompts and answers
    max_cost: float = 0.0  # by the endpoints' prices


@dataclass
class Amount:
    """Requests, tokens and money."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def add(self, other: Amount, sign: int = 1) -> None:
        self.calls += sign * other.calls
        self.prompt_tokens += sign * other.prompt_tokens
        self.completion_tokens += sign * other.completion_tokens
        self.cost += sign * other.cost

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Meter:
    """Lets a call begin only where what it may cost still fits; so at most one call goes beyond the budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.spent = budget, Amount()
        self._reserved = Amount()
        self._changed: asyncio.Event | None = None

    async def reserve(self, bound: Amount) -> None:
        """Waits until a call that costs `bound` may begin; near the end that is when those under way have ended.

        Raises:
          BudgetSpent: the budget is spent.
        """
        while True:
            self.check()
            if not self._reserved.calls or not self._beyond(bound):
                self._reserved.add(bound)
                return
            self._changed = self._changed or asyncio.Event()
            await self._changed.wait()

    def settle(self, bound: Amount, spent: Amount) -> None:
        """A call has ended: `spent` in place of the `bound` that was reserved."""
        self._reserved.add(bound, -1)
        self.spent.add(spent)
        if self._changed:
            self._changed.set()
            self._changed = None

    def check(self) -> None:
        """Raises BudgetSpent where the budget is spent."""
        for name, used, limit in self._amounts():
            if limit and used >= limit:
                raise BudgetSpent(
                    f"the budget {name}={limit:,} is spent ({used:,.6g}); all answers are saved: raise it, and the same "
                    "command goes on"
                )

    def _beyond(self, bound: Amount) -> bool:
        total = Amount()
        for part in (self.spent, self._reserved, bound):
            total.add(part)
        return any(limit and used > limit for _, used, limit in self._amounts(total))

    def _amounts(self, amount: Amount | None = None) -> tuple[tuple[str, float, float], ...]:
        amount, budget = amount or self.spent, self.budget
        return (
            ("max_calls", amount.calls, budget.max_calls),
            ("max_tokens", amount.tokens, budget.max_tokens),
            ("max_cost", amount.cost, budget.max_cost),
        )


def cost(endpoint: Endpoint, prompt_tokens: int, completion_tokens: int) -> float:
    """Money, by the endpoint's prices of a million tokens."""
    return (endpoint.input_price * prompt_tokens + endpoint.output_price * completion_tokens) / 1e6


def upper_bound(job: Job, endpoint: Endpoint) -> Amount:
    """What a call can cost at most: a token has at least one byte; each message has some of the chat template."""
    prompt = len(job.text().encode()) + 16 * (len(job.messages) + 1)
    completion = int(job.settings(endpoint)["max_tokens"])
    return Amount(1, prompt, completion, cost(endpoint, prompt, completion))
