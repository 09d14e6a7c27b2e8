"""A prompt of many chunks is handed over while it is computed, between real processes."""

import asyncio
import json
import os

import fakes
import pytest
from clients import Ask, Load, check_ok, stub_of
from processes import Process, cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Room for one long prompt, in many short steps; few shapes to compile.
ARGUMENTS = ("--config.max_context=1024", "--config.max_tokens=64")
OF_WORKERS = (
    "--config.prefill.max_chunk=16",
    "--config.prefill.prefix_cache=False",  # else the second time there is nothing to compute
    "--config.decode.max_batch=1",
    *(f"--config.{name}_tokens=2048" for name in ("prefill.kv", "prefill.parked", "decode.kv")),
)
ASKS = [Ask(tuple(range(4, 204)) * 5, 20, seed) for seed in (None, 3)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


async def tokens_of(server, asks):
    """What it answers, one request after the other."""
    answers = []
    async with stub_of(server) as stub:
        for ask in asks:
            answers += await Load(stub, [ask], 100).done()
    for answer in answers:
        check_ok(answer)
    return [answer.tokens for answer in answers]


async def seen_midway(started, ask):
    """What the prefill worker held when its KV was on the way already, and the tokens."""
    (prefill,), (decode,) = started.workers["prefill"], started.workers["decode"]
    async with stub_of(started.router) as stub:
        load = Load(stub, [ask], 100)
        while not (await asyncio.to_thread(decode.state))["fetches"]:
            assert load.answers[0].code is None, "nothing was brought over ahead"
        held = await asyncio.to_thread(prefill.state)
        (answer,) = await load.done()
    check_ok(answer)
    return held, answer.tokens


@pytest.fixture(scope="module")
def expected(cache):
    """From one process, in which KV has no way to go."""
    profile = cache / "one.json"
    profile.write_text(json.dumps(fakes.PROFILE))
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    server = Process("serve", f"--profile={profile}", *ARGUMENTS, *OF_WORKERS, env=env)
    try:
        return asyncio.run(tokens_of(server.ready(300), ASKS))
    finally:
        server.end()


@pytest.mark.parametrize("kind", ["jax", "grpc"])
def test_kv_is_on_its_way_before_prefill_has_ended(cache, expected, kind):
    workers = (*OF_WORKERS, f"--kv_transport={kind}")
    with cluster(cache, 1, 1, *ARGUMENTS, of_workers=workers) as started:
        for ask, tokens in zip(ASKS, expected, strict=True):
            held, answer = asyncio.run(seen_midway(started, ask))
            assert answer == tokens
            assert (held["running"], held["offers"], held["parked"]) == (1, 1, 0)
