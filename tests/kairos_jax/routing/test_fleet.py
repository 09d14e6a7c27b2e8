"""Streams that go on when workers are lost or drain: token by token, with real workers."""

import asyncio
import random

import fakes
import jax
import pytest
from fleet import COST, Counted, Fleet, asked, in_loop

from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.functions import Shapes
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.routing import dispatch
from kairos_jax.routing.router import Router
from kairos_jax.worker.build import build_worker
from models.checkpoint import open_checkpoint
from models.sampling import SamplingParams
from models.sharding import Rules, make_mesh
from schedulers.ledger.instance import Role


async def check_whole(prompts, asking, heads):
    """The streams go on after their first outputs, to the last of 12 tokens; none was lost."""
    for prompt, stream, head in zip(prompts, asking, heads, strict=True):
        rest = [output.token.id async for output in stream]
        assert [head.token.id, *rest] == fakes.expected_tokens(prompt, 12)
        assert stream.num_lost == 0


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("last", [0, 1, 3])
@in_loop
async def test_a_worker_dies_and_no_token_is_lost_doubled_or_changed(role, last):
    fleet = Fleet(engine=Counted)
    dying = fleet.of(role)[0]
    dying.engine.last = last
    prompts = [[i] * (i + 1) for i in range(24)]
    answers = await asyncio.gather(*(fleet.answer(prompt, 20) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == fakes.expected_tokens(prompt, 20)
    died = await asyncio.wait_for(fleet.router.died, 30)
    assert died.instance == dying.instance.id
    fleet.gone.append(fleet.alive.pop(died.instance))
    await fleet.close()


@in_loop
async def test_a_drained_decode_worker_hands_over_what_waits_and_what_runs():
    fleet = Fleet(num_prefill=1, num_decode=1)
    (first,) = fleet.of(Role.DECODE)
    first.engine.gate.clear()  # some run in its first step, and the others wait
    prompts = [[i, i + 1] for i in range(20)]
    asking = [fleet.router.submit(asked(prompt, 12)) for prompt in prompts]
    heads = [await anext(aiter(stream)) for stream in asking]
    fleet.add(Role.DECODE)
    fleet.drain(first)
    first.engine.gate.set()
    await check_whole(prompts, asking, heads)
    await fleet.close()


@in_loop
async def test_a_drained_decode_worker_gives_back_the_kv_that_it_has_no_room_for():
    fleet = Fleet(SCARCE, num_prefill=1, num_decode=1)
    (prefill,), (first,) = fleet.of(Role.PREFILL), fleet.of(Role.DECODE)
    first.engine.gate.clear()
    prompts = [[i] * 60 for i in range(12)]
    asking = [fleet.router.submit(asked(prompt, 12)) for prompt in prompts]
    heads = [await anext(aiter(stream)) for stream in asking]
    num_reads = prefill.engine.num_reads
    fleet.add(Role.DECODE)
    fleet.drain(first)
    first.engine.gate.set()
    await check_whole(prompts, asking, heads)
    most = SCARCE.limits(Role.DECODE).num_pages // (60 // SCARCE.page_size)
    assert 1 <= prefill.engine.num_reads - num_reads <= most, "those alone that had pages there"
    await fleet.close()


@in_loop
async def test_colocated_workers_take_over_from_each_other():
    config = fakes.altered(colocated=True)
    fleet = Fleet(config, 0, 0, Counted)
    dying = fleet.add(Role.BOTH)
    fleet.add(Role.BOTH)
    dying.engine.last = 5
    prompts = [[i] * (i + 1) for i in range(16)]
    answers = await asyncio.gather(*(fleet.answer(prompt, 20) for prompt in prompts))
    assert answers == [fakes.expected_tokens(prompt, 20) for prompt in prompts]
    assert dying.engine.fail
    fleet.gone.append(fleet.alive.pop(dying.instance.id))
    await fleet.close()


SCARCE = fakes.altered(decode__kv_tokens=128)


@pytest.mark.parametrize("config", [fakes.CONFIG, SCARCE], ids=["ample", "scarce"])
@pytest.mark.parametrize("seed", range(2))
@in_loop
async def test_workers_come_and_go_while_hundreds_of_requests_run(config, seed, monkeypatch):
    """Some are killed, some drained, some requests are cancelled, and some KV is lost."""
    monkeypatch.setattr(dispatch, "MAX_RECOVERIES", 100)
    monkeypatch.setattr(dispatch, "MAX_ABOARD", 100)
    rng, fleet = random.Random(seed), Fleet(config)
    ended = 0

    def disturb():
        worker = rng.choice(fleet.of(rng.choice([Role.PREFILL, Role.DECODE])))
        if rng.random() < 0.1:
            for ticket in list(fleet.transport._offers)[:2]:
                fleet.transport.release(ticket)
        else:
            fleet.add(worker.instance.role)
            fleet.kill(worker) if rng.random() < 0.5 else fleet.drain(worker)

    async def client(prompts):
        nonlocal ended
        for prompt, count, cancel_after in prompts:
            answer = await fleet.answer(prompt, count, cancel_after)
            assert answer == fakes.expected_tokens(prompt, cancel_after or count)
            ended += 1
            if ended % 20 == 0:
                disturb()

    def prompt():
        count = rng.randrange(1, 30)
        cancel_after = rng.randrange(1, count + 1) if rng.random() < 0.2 else None
        return [rng.randrange(97)] * rng.randrange(1, 60), count, cancel_after

    await asyncio.gather(*(client([prompt() for _ in range(12)]) for _ in range(25)))
    assert ended == 300
    await fleet.close()


class Dying:
    """An engine whose fourth step fails."""

    def __init__(self, engine):
        self.engine, self.num_steps = engine, 0

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def start(self, work):
        self.num_steps += 1
        if self.num_steps == 4:
            raise RuntimeError("killed")
        return self.engine.start(work)


def build(directory, role):
    checkpoint, limits = open_checkpoint(directory), fakes.CONFIG.limits(role)
    mesh, rules = make_mesh(jax.devices()[:1]), Rules()
    params = checkpoint.load(mesh, rules, "float32")
    shapes = Shapes.for_role(role, limits)
    return JaxEngine(checkpoint.config, params, mesh, rules, limits, shapes)


@pytest.mark.slow
@in_loop
async def test_a_real_engine_goes_on_with_the_same_tokens(tiny_llama):
    """Greedy and seeded: the sampler looks at the place in the whole, not at who computes it."""
    prefill, *decode = [build(tiny_llama, role) for role in (Role.PREFILL, *2 * [Role.DECODE])]
    requests = [
        asked([5, 6, 7], 16, sampling=SamplingParams(temperature=0.0)),
        asked([8, 9], 16, sampling=SamplingParams(temperature=1.0, seed=3)),
        asked([8, 9], 16, sampling=SamplingParams(temperature=0.8, top_p=0.9, seed=4)),
    ]

    async def tokens(*engines):
        router, transport = Router(asyncio.get_running_loop(), 10, COST), LocalTransport()
        workers = [
            build_worker(fakes.CONFIG, role, str(i), engine, COST, transport, router.emit)
            for i, (role, engine) in enumerate(engines)
        ]
        router.connect(workers)
        for worker in workers:
            worker.start()
        asking = [router.submit(each) for each in requests]
        answers = [[output.token.id async for output in stream] for stream in asking]
        for worker in workers:
            await asyncio.to_thread(worker.stop)
        assert transport.num_offers == 0
        transport.close()
        return answers, sum(stream.num_lost for stream in asking)

    first, second = decode
    undisturbed, num_lost = await tokens((Role.PREFILL, prefill), (Role.DECODE, first))
    assert num_lost == 0
    recovered, num_lost = await tokens(
        (Role.PREFILL, prefill), (Role.DECODE, Dying(first)), (Role.DECODE, second)
    )
    assert num_lost > 0
    assert recovered == undisturbed
