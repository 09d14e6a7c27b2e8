"""Slots: from the first byte of a request to the last of its answer."""

import asyncio
import threading

import pytest

from kairos_jax.api import slots as slots_module
from kairos_jax.api.slots import SMALL_BYTES, Lane, Slots
from kairos_jax.routing.fleet import Full


def test_a_slot_is_held_until_its_block_ends_whatever_ends_it():
    async def main():
        slots, full = Slots(2), []
        slots.on_full, slots.wait_s = lambda: full.append(1), lambda: 7.0
        with slots.take(), slots.take():
            with pytest.raises(Full, match="2 requests are in progress") as error:
                slots.take()
            assert (error.value.limit, error.value.retry_after_s, full) == (
                "max_requests",
                7.0,
                [1],
            )
        assert slots.num_held == 0
        with pytest.raises(KeyError), slots.take():
            raise KeyError
        assert slots.num_held == 0

    asyncio.run(main())


def test_a_request_holds_a_slot_for_each_of_its_choices():
    async def main():
        slots = Slots(4)
        with slots.take() as slot:
            slot.grow(3)
            assert slots.num_held == 3
            with slots.take() as other, pytest.raises(Full):
                other.grow(2)
            assert slots.num_held == 3
        assert slots.num_held == 0

    asyncio.run(main())


def test_who_waits_for_idle_waits_for_the_last_slot():
    async def main():
        slots = Slots(2)
        await asyncio.wait_for(slots.idle(), 1)
        with slots.take():
            waiting = asyncio.ensure_future(slots.idle())
            await asyncio.sleep(0)
            assert not waiting.done()
        await asyncio.wait_for(waiting, 1)

    asyncio.run(main())


def test_few_are_tokenized_at_once():
    async def main():
        slots, running, most = Slots(9), 0, 0
        lock = asyncio.Lock()
        loop = asyncio.get_running_loop()

        def job():
            nonlocal running, most
            running += 1
            most = max(most, running)
            asyncio.run_coroutine_threadsafe(turn(), loop).result(30)
            running -= 1

        async def turn():
            async with lock:
                await asyncio.sleep(0)

        await asyncio.gather(*(slots.tokenize(job) for _ in range(9)))
        assert most <= slots._lanes[Lane.SHORT]._value

    asyncio.run(main())


def test_what_takes_long_holds_up_its_own_lane_alone():
    async def main():
        slots, ending = Slots(9), threading.Event()
        slow = [
            asyncio.ensure_future(slots.tokenize(lambda: ending.wait(30), lane))
            for lane in (Lane.LONG, Lane.TEMPLATE)
            for _ in range(5)
        ]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(slots.tokenize(lambda: "at once"), 20) == "at once"
        ending.set()
        await asyncio.gather(*slow)

    asyncio.run(main())


def test_more_templates_of_clients_than_wait_are_turned_away(monkeypatch):
    monkeypatch.setattr(slots_module, "_MOST_TEMPLATES", 2)

    async def main():
        slots, ending, full = Slots(9), threading.Event(), []
        slots.on_full = lambda: full.append(1)
        some = [
            asyncio.ensure_future(slots.tokenize(lambda: ending.wait(30), Lane.TEMPLATE))
            for _ in range(2)
        ]
        await asyncio.sleep(0)
        with pytest.raises(Full, match="2 requests with chat templates of their own"):
            await slots.tokenize(str, Lane.TEMPLATE)
        assert full == [1]
        ending.set()
        await asyncio.gather(*some)
        assert await slots.tokenize(str, Lane.TEMPLATE) == ""

    asyncio.run(main())


def test_a_lane_is_for_what_a_request_may_cost():
    assert Lane.of(1000, False) is Lane.SHORT
    assert Lane.of(1 << 20, False) is Lane.LONG
    assert Lane.of(1000, True) is Lane.of(1 << 20, True) is Lane.TEMPLATE


def test_bodies_in_progress_are_bounded_in_all_and_small_ones_always_pass():
    async def main():
        slots = Slots(9)
        slots.max_bytes = 10 << 20
        with slots.take() as one, slots.take() as other:
            for size in (1, SMALL_BYTES, 1 << 20, 8 << 20):  # as it comes
                one.hold_body(size)
            with pytest.raises(Full, match="in progress have 8 MiB; at most 10 MiB are taken"):
                other.hold_body(3 << 20)
            other.hold_body(SMALL_BYTES)
            one.hold_body(0)
            other.hold_body(3 << 20)
        assert slots.num_bytes == 0

    asyncio.run(main())
