"""Slots: from the first byte of a request to the last of its answer."""

import asyncio

import pytest

from kairos_jax.api.slots import Slots
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
        assert most <= slots._tokenizing._value

    asyncio.run(main())
