"""The prefix cache behind the whole server, and the keys by which pages are found."""

import asyncio
import math
import random
import re
import threading
import time

import fakes
import http_fakes
import pytest

from kairos_jax.routing.peer import Peer
from kairos_jax.worker.messages import Submit
from kairos_jax.worker.page_keys import page_keys
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies.routing import Summary

SECRET = bytes(32)
# Pages have 8 tokens.
PREFIX = list(range(1, 41))


def test_equal_beginnings_have_equal_keys_and_no_others():
    keys = page_keys(2, SECRET, [1, 2, 3, 4, 5])
    assert len(set(keys)) == len(keys) == 2
    assert page_keys(2, SECRET, [1, 2, 3, 4]) == keys
    assert page_keys(2, SECRET, [1, 2, 9, 4])[0] == keys[0]
    assert not {*page_keys(2, SECRET, [9, 2, 3, 4])} & {*keys}, "what comes before counts too"
    assert not {*page_keys(2, SECRET, [3, 4])} & {*keys}
    assert page_keys(4, SECRET, [1, 2, 3, 4]) == keys[1:], "a key tells what lies before its end"
    assert page_keys(2, SECRET, [1]) == ()


def test_keys_of_another_process_are_others():
    assert not {*page_keys(2, SECRET, [1, 2])} & {*page_keys(2, b"another", [1, 2])}
    assert all(0 <= key < 2**128 for key in page_keys(1, SECRET, [0, 1, 48_999]))


@pytest.mark.parametrize("colocated", [False, True])
def test_the_last_message_tells_how_much_was_cached(colocated):
    @fakes.served_as(fakes.altered(colocated=colocated))
    async def check(server):
        for tail, expected in (([7], 0), ([7], 40), ([8, 9], 40), ([], 32)):
            answer = await server.generate(PREFIX + tail, 5)
            assert fakes.ids(answer) == fakes.expected_tokens(PREFIX + tail, 5)
            assert answer[-1].usage.cached_tokens == expected
            assert not any(each.usage.cached_tokens for each in answer[:-1])
        await server.assert_nothing_held()

    check()


def test_http_and_metrics_tell_it_too():
    """Of several choices, it is told of the prompt that they share."""

    async def check():
        async with http_fakes.serving() as api:
            found = []
            for prompt, count in ((PREFIX, 1), ([*PREFIX, 7], 2), ([PREFIX, [*PREFIX, 8, 9]], 1)):
                answer = await api.complete(prompt=prompt, n=count, max_tokens=3)
                found.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            assert found == [0, 40, 32 + 40]
            text = api.harness.metrics.render()[0].decode()
            (value,) = re.findall(r"\nkairos_cached_prompt_tokens_total\{.*\} (\S+)", text)
            assert float(value) == 2 * 40 + 32 + 40

    asyncio.run(check())


@pytest.mark.parametrize("colocated", [False, True])
def test_a_prompt_goes_to_the_instance_that_has_its_prefix(colocated, monkeypatch):
    # Predicted to be so slow that what is saved outweighs all that a summary may be late to tell.
    monkeypatch.setitem(fakes.PROFILE, "prefill", fakes.PROFILE["prefill"] | {"per_token_s": 0.01})
    prefixes = [[first, *PREFIX[1:]] for first in (1, 2, 3)]

    @fakes.served_as(fakes.altered(colocated=colocated, prefill__instances=3))
    async def check(server):
        now, slo = time.monotonic(), Slo(30.0, 30.0)
        streams = [  # at once, so each to another
            server.router.submit(Request(str(prefix[0]), now, prefix, 2, slo))
            for prefix in prefixes
        ]
        for stream in streams:
            assert len([output async for output in stream]) == 2
        for prefix in prefixes[::-1] * 2:
            answer = await server.generate([*prefix, 7], 2)
            assert answer[-1].usage.cached_tokens == 40
        assert all(worker.instance.pages.num_cached for worker in server.workers[:3])
        await server.assert_nothing_held()

    check()


def test_a_router_knows_what_a_worker_has_by_what_it_was_sent_last():
    sent, cost = [], CostModel.from_profile(fakes.PROFILE)
    idle = Summary("p", Role.PREFILL, 0.0, [], [], 1.0, 0.0, math.inf)
    peer = Peer("p", Role.PREFILL, sent.append, cost, idle, kv_tokens=32, page_size=8)

    def asked(prompt):
        keys = page_keys(8, SECRET, prompt)
        return Request("r", 0.0, prompt, 1, Slo(30.0, 30.0), page_keys=keys)

    first = asked(PREFIX[:25])
    assert peer.cached(first) == 0
    peer.submit(Submit(first), 0.0)
    assert (peer.cached(first), peer.cached(asked(PREFIX[:24]))) == (24, 16)
    before = peer.summary.work_s(0.0)
    peer.submit(Submit(first), 0.0)
    again_s = peer.summary.work_s(0.0) - before
    assert again_s == pytest.approx(cost.prefill_s(1, 24))
    peer.submit(Submit(asked([9] * 16)), 0.0)
    assert peer.cached(first) == 16, "of what its pool cannot hold the ends are forgotten first"


@fakes.served_as(fakes.altered(prefill__prefix_cache=False))
async def test_switched_off_nothing_is_cached(server):
    for _ in range(2):
        answer = await server.generate(PREFIX, 2)
        assert answer[-1].usage.cached_tokens == 0
    assert server.workers[0].instance.pages.num_cached == 0


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("colocated", [False, True])
def test_every_token_is_right_while_prompts_share_and_evict_pages(colocated, overlaps):
    """So many that begin alike that they fill a small pool, and some are cancelled midway. The
    engine samples from what it finds in the pages.
    """
    rng = random.Random(3)
    prefixes = [[rng.randrange(fakes.VOCAB) for _ in range(100)] for _ in range(3)]
    prompts = [
        rng.choice(prefixes)[: rng.choice([8, 16, 33, 64, 100])]
        + [rng.randrange(fakes.VOCAB) for _ in range(rng.choice([0, 1, 8, 13]))]
        for _ in range(60)
    ]
    config = fakes.altered(colocated=colocated, prefill__kv_tokens=256, decode__kv_tokens=256)

    @fakes.served_as(config)
    async def check(server):
        server.transport.overlaps = overlaps
        evicted = threading.Event()
        for worker in server.workers:
            if worker.instance.role is not Role.DECODE:
                evict = worker.instance.pages._evict
                worker.instance.pages._evict = lambda count, evict=evict: (
                    evicted.set(),
                    evict(count),
                )

        async def one(index, prompt):
            if index % 7 == 3:
                call, _, _ = await server.stream(prompt, 20)
                call.cancel()
                return 0
            answer = await server.generate(prompt, 9)
            assert fakes.ids(answer) == fakes.expected_tokens(prompt, 9)
            return answer[-1].usage.cached_tokens

        cached = await asyncio.gather(*(one(*each) for each in enumerate(prompts)))
        assert sum(cached) > 0.2 * sum(map(len, prompts))
        assert evicted.is_set()
        await server.assert_nothing_held()

    check()
