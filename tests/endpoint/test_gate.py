"""Places, who gets them, and pauses."""

import asyncio

import pytest

from tanuki_jax.endpoint import gate
from tanuki_jax.endpoint.gate import MAX_RETRY_AFTER, Gate, back_off


def test_the_lowest_number_gets_the_next_place_and_there_are_never_more():
    async def work():
        door, order, inside, largest = Gate(2), [], 0, 0

        async def enter(number):
            nonlocal inside, largest
            await door.acquire(number)
            inside += 1
            largest = max(largest, inside)
            order.append(number)
            await asyncio.sleep(0.001)
            inside -= 1
            door.release()

        await asyncio.gather(*(enter(number) for number in (9, 8, 5, 3, 4, 1)))
        return order, largest

    order, largest = asyncio.run(work())
    assert order[:2] == [9, 8] and order[2:] == [1, 3, 4, 5]
    assert largest == 2


def test_a_place_that_comes_to_a_cancelled_waiter_goes_to_the_next():
    async def work():
        door = Gate(1)
        await door.acquire(0)
        waiting = [asyncio.create_task(door.acquire(number)) for number in (1, 2)]
        await asyncio.sleep(0)
        door.release()  # the first one's, which has not run yet
        waiting[0].cancel()
        await asyncio.wait_for(waiting[1], 1)
        door.release()
        await asyncio.wait_for(door.acquire(3), 1)

    asyncio.run(work())


def test_a_pause_holds_back_all_and_one_trouble_is_one_round():
    async def work():
        loop, door = asyncio.get_running_loop(), Gate(4)
        began = loop.time()
        assert [door.pause(began, 0.05) for _ in range(3)] == [1, 1, 1]
        await asyncio.gather(*(door.acquire(number) for number in range(4)))
        assert loop.time() - began >= 0.05
        assert door.pause(loop.time(), None) == 2
        door.reset()
        assert door.rounds == 0

    asyncio.run(work())


def test_no_server_holds_a_run_back_for_a_day(monkeypatch):
    async def work():
        door, seconds = Gate(1), []

        async def sleep(wait):
            seconds.append(wait)
            door._until = 0

        monkeypatch.setattr(asyncio, "sleep", sleep)
        door.pause(asyncio.get_running_loop().time(), 1e9)
        await door.acquire(0)
        assert MAX_RETRY_AFTER - 1 < seconds[0] <= MAX_RETRY_AFTER + 1

    asyncio.run(work())


def test_pauses_of_a_job_grow_with_full_jitter(monkeypatch):
    monkeypatch.setattr(gate, "FIRST_PAUSE", 0.5)
    monkeypatch.setattr(gate, "MAX_BACK_OFF", {"server_error": 8.0})
    for failures, most in ((0, 0.5), (3, 4.0), (20, 8.0), (10_000, 8.0)):
        seconds = [back_off(failures, "server_error") for _ in range(300)]
        assert 0.9 * most < max(seconds) <= most and min(seconds) < 0.1 * most
        assert sum(seconds) / 300 == pytest.approx(most / 2, rel=0.2)
