"""Order and bound of what is on its way."""

import asyncio

from kairos_jax.kv.in_flight import InFlight, Priority


def test_bytes_are_bounded_and_the_urgent_go_first():
    async def run():
        in_flight, entered, gates = InFlight(100), [], {}

        async def take(name, num_bytes, priority):
            gates[name] = asyncio.Event()
            async with in_flight.admit(num_bytes, lambda: priority):
                assert in_flight.num_bytes <= 100 or in_flight.num_bytes == num_bytes
                entered.append(name)
                await gates[name].wait()

        async with asyncio.TaskGroup() as group:

            async def start(*args):
                task = group.create_task(take(*args))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                return task

            async def leave(name):
                gates[name].set()
                for _ in range(5):
                    await asyncio.sleep(0)

            await start("first", 60, Priority.BULK)
            await start("staged", 30, Priority.PREFETCH)
            await start("huge", 500, Priority.BULK)
            await start("small", 10, Priority.BULK)
            await start("urgent", 20, Priority.URGENT)
            assert entered == ["first", "staged"]
            await leave("staged")
            assert entered == ["first", "staged", "urgent"]
            await leave("first")
            await leave("urgent")
            assert entered[3:] == ["huge"]  # alone, and not overtaken for ever
            await leave("huge")
            assert entered[4:] == ["small"]
            await leave("small")
        assert in_flight.num_bytes == 0

    asyncio.run(run())


def test_one_that_gives_up_lets_the_next_in():
    async def run():
        in_flight, inside = InFlight(10), asyncio.Event()

        async def take(event):
            async with in_flight.admit(10, lambda: Priority.BULK):
                event.set()
                await asyncio.Event().wait()

        holder = asyncio.create_task(take(asyncio.Event()))
        waiting = asyncio.create_task(take(asyncio.Event()))
        last = asyncio.create_task(take(inside))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        holder.cancel()
        await asyncio.wait_for(inside.wait(), 10)
        assert in_flight.num_bytes == 10
        last.cancel()
        await asyncio.gather(holder, waiting, last, return_exceptions=True)
        assert in_flight.num_bytes == 0

    asyncio.run(run())


def test_what_becomes_urgent_while_it_waits_overtakes():
    async def run():
        in_flight, entered = InFlight(10), []
        priorities = {"one": Priority.BULK, "two": Priority.PREFETCH}

        async def take(name):
            async with in_flight.admit(10, lambda: priorities[name]):
                entered.append(name)

        async with asyncio.TaskGroup() as group, in_flight.admit(10, lambda: Priority.BULK):
            for name in priorities:
                group.create_task(take(name))
            await asyncio.sleep(0)
            priorities["two"] = Priority.URGENT
        assert entered == ["two", "one"]

    asyncio.run(run())
