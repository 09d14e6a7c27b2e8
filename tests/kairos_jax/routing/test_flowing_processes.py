"""Roles that flow between real processes."""

import asyncio
import json
import os

import fakes
import pytest
from clients import Ask, Load, check_ok, stub_of
from processes import Process, cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ASKS = [Ask(tuple(range(4 + i, 44 + i)), 24, seed) for i in range(6) for seed in (None, 3)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


async def answers_of(server):
    async with stub_of(server) as stub:
        answers = await Load(stub, ASKS, 100).done()
    for answer in answers:
        check_ok(answer)
    return [answer.tokens for answer in answers]


@pytest.fixture(scope="module")
def expected(cache):
    """From one process."""
    profile = cache / "one.json"
    profile.write_text(json.dumps(fakes.PROFILE))
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    server = Process("serve", f"--profile={profile}", env=env)
    try:
        return asyncio.run(answers_of(server.ready(300)))
    finally:
        server.end()


@pytest.mark.parametrize("kind", ["jax", "grpc"])
def test_tokens_are_those_of_one_process(cache, expected, kind):
    workers = (f"--kv_transport={kind}", "--config.fluid=True")
    with cluster(cache, 2, 1, of_workers=workers) as started:
        assert asyncio.run(answers_of(started.router)) == expected
        (decode,) = started.workers["decode"]
        assert decode.state()["pages_free"] == decode.state()["pages"]
        assert not any(prefill.state()["parked"] for prefill in started.workers["prefill"])
