"""The HTTP API over real sockets, with fake engines: what ends a request before its time, and what
that leaves behind.
"""

import asyncio
import json

import fakes
import http_fakes
import httpx2
import pytest
from http_fakes import of, says, text_in

TEXT = "/v1/completions"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_all_with_the_steps_under_way(stream):
    async def run(api):
        _, engine = api.harness.engines
        stepped, step = asyncio.Event(), engine.step
        loop = asyncio.get_running_loop()

        def told(work):
            loop.call_soon_threadsafe(stepped.set)
            return step(work)

        engine.step = told
        body = {"prompt": ["a", "b"], "max_tokens": 60, "n": 2, "stream": stream}
        call = asyncio.ensure_future(api.post(TEXT, http_fakes.ASK | body))
        await asyncio.wait_for(stepped.wait(), 30)
        # The step under way, and the one dispatched behind it, are the last that may have it.
        engine.gate.clear()
        call.cancel()
        await asyncio.wait_for(api.harness.router.drained(), 30)
        before = engine.num_steps
        engine.gate.set()
        await api.harness.assert_nothing_held()
        assert engine.num_steps <= before + 2

    async def main():
        async with http_fakes.serving() as api:
            await run(api)

    asyncio.run(main())


def test_more_than_max_requests_are_told_when_to_retry():
    async def main():
        async with http_fakes.serving(fakes.altered(max_requests=2)) as api:
            api.harness.engines[1].gate.clear()
            body = http_fakes.ASK | {"prompt": "x", "max_tokens": 4}
            first = asyncio.ensure_future(api.post(TEXT, body))
            while not api.harness.router.num_streams:
                await asyncio.sleep(0)
            # Two choices, and room for one: the one that had begun is given up.
            for more in ({"n": 2}, {"n": 2, "stream": True}):
                answer = await api.post(TEXT, body | more)
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
                assert float(answer.headers["retry-after-ms"]) >= 1
                assert answer.json()["error"]["type"] == "rate_limit_error"
                assert api.harness.router.num_streams == 1
            api.harness.engines[1].gate.set()
            assert of((await first).json())["text"] == says("x", 4)

    asyncio.run(main())


@pytest.mark.parametrize("which", [0, 1])
def test_a_dead_engine_is_told_of(which):
    async def main():
        async with http_fakes.serving() as api:
            api.harness.engines[which].fail = RuntimeError("the device is on fire")
            body = http_fakes.ASK | {"prompt": "x", "max_tokens": 9, "stream": True}
            answer = await api.post(TEXT, body)
            if which == 0:  # before anything was written
                assert answer.status_code == 503
                error = answer.json()
            else:
                *_, event, rest = answer.text.split("\n\n")
                error, done = json.loads(event.removeprefix("data: ")), rest
                assert done == "", "what has failed is not DONE"
            message = error["error"]["message"]
            assert "its step failed" in message
            assert "on fire" not in message, "what failed is for the log"
            assert error["error"]["code"] == "service_unavailable"

    asyncio.run(main())


def test_a_drain_finishes_what_runs():
    async def main():
        async with http_fakes.serving() as api:
            engine = api.harness.engines[1]
            engine.gate.clear()
            body = http_fakes.ASK | {"prompt": "hello", "max_tokens": 10, "stream": True}
            async with api.client.stream("POST", TEXT, json=body) as answer:
                drain = asyncio.ensure_future(api.harness.server.drain(30))
                await asyncio.sleep(0)
                assert (await api.client.get("/health")).status_code == 503
                engine.gate.set()
                text = (await answer.aread()).decode()
            events = [json.loads(each[6:]) for each in text.split("\n\n")[:-2]]
            assert text_in(events) == says("hello", 10)
            assert await drain is True

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_what_waits_longer_than_a_drain_is_told(stream):
    async def main():
        async with http_fakes.serving() as api:
            api.harness.engines[0].gate.clear()
            body = http_fakes.ASK | {"prompt": "hello", "max_tokens": 10, "stream": stream}
            call = asyncio.ensure_future(api.post(TEXT, body))
            while not api.harness.router.num_streams:
                await asyncio.sleep(0)
            assert await api.harness.server.drain(0) is False
            answer = await call
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the server has ended"
            api.harness.engines[0].gate.set()
            await api.harness.assert_nothing_held()

    asyncio.run(main())


def test_a_stream_that_outlasts_a_drain_is_cut_off():
    async def main():
        async with http_fakes.serving() as api:
            api.harness.engines[1].gate.clear()
            body = http_fakes.ASK | {"prompt": "hello", "max_tokens": 10, "stream": True}
            async with api.client.stream("POST", TEXT, json=body) as answer:
                assert await api.harness.server.drain(0) is False
                with pytest.raises(httpx2.TransportError):
                    await answer.aread()
            api.harness.engines[1].gate.set()
            await api.harness.assert_nothing_held()

    asyncio.run(main())
