"""A call begins only where what it may cost still fits."""

import asyncio

import pytest

from tanuki_jax.config.synthesis import Endpoint
from tanuki_jax.endpoint import Job
from tanuki_jax.endpoint.budget import Amount, Budget, BudgetSpent, Meter, cost, upper_bound


def spend(budget, bound, spent, wanted=1000, at_once=8):
    """Calls until the budget is spent; returns what was spent."""

    async def work():
        meter, remaining = Meter(budget), list(range(wanted))

        async def worker():
            while remaining:
                remaining.pop()
                await meter.reserve(bound)
                await asyncio.sleep(0)
                meter.settle(bound, spent)

        results = await asyncio.gather(*(worker() for _ in range(at_once)), return_exceptions=True)
        assert all(isinstance(result, BudgetSpent) for result in results if result)
        return meter.spent, results

    return asyncio.run(work())


def test_calls_are_never_more_than_the_budget():
    spent, results = spend(Budget(max_calls=37), Amount(1), Amount(1))
    assert spent.calls == 37
    assert "max_calls=37 is spent" in str(results[0])


def test_tokens_go_beyond_the_budget_by_one_call_at_most():
    spent, _ = spend(Budget(max_tokens=1000), Amount(1, 50, 50), Amount(1, 7, 20))
    assert 1000 <= spent.tokens < 1000 + 27


def test_money_goes_beyond_the_budget_by_one_call_at_most():
    spent, _ = spend(Budget(max_cost=1.0), Amount(1, cost=0.09), Amount(1, cost=0.04))
    assert 1.0 <= spent.cost < 1.0 + 0.04 + 1e-9


def test_no_budget_no_end():
    spent, results = spend(Budget(), Amount(1, 9, 9, 9.0), Amount(1, 9, 9, 9.0))
    assert spent.calls == 1000 and results == [None] * 8


def test_what_a_call_may_cost():
    endpoint = Endpoint(input_price=2.0, output_price=10.0, max_tokens=100)
    bound = upper_bound(Job(messages=[{"role": "user", "content": "狸" * 10}]), endpoint)
    assert (bound.calls, bound.prompt_tokens, bound.completion_tokens) == (1, 62, 100)
    assert bound.cost == pytest.approx((62 * 2 + 100 * 10) / 1e6) == cost(endpoint, 62, 100)
