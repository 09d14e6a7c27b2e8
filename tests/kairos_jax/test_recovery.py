"""Streams that go on when workers are lost, drain, or lose KV: message by message with workers that
the test plays, and token by token with real ones on fake engines.
"""

import asyncio
import functools
import random
from dataclasses import replace

import fakes
import jax
import pytest

from kairos_jax import streams
from kairos_jax.engine import JaxEngine, Shapes, Token
from kairos_jax.instances import build_worker
from kairos_jax.messages import (
    Cancel,
    Died,
    Draining,
    HandBack,
    Handover,
    Lost,
    Moved,
    Output,
    Release,
    Returned,
    Stepped,
    Submit,
)
from kairos_jax.peers import Peer
from kairos_jax.streams import Router, WorkerLost
from kairos_jax.transfer import LocalTransport, Ticket
from models.checkpoint import open_checkpoint
from models.sampling import SamplingParams
from models.sharding import Rules, make_mesh
from schedulers.core import Role
from schedulers.cost import CostModel
from schedulers.request import Request, Slo

COST = CostModel.from_profile(fakes.PROFILE)
SLO = Slo(30.0, 30.0)
PROMPT = [3, 1, 4]


def asked(prompt=PROMPT, max_tokens=9, **fields):
    return Request("", 0.0, prompt, max_tokens, SLO, **fields)


def in_loop(test):
    """Runs an async test."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 120))

    return run


class Played:
    """A router whose workers are played by the test. posts: what each was sent and did not read."""

    def __init__(self, *ids, max_requests=10, **kwargs):
        loop = asyncio.get_running_loop()
        self.now = 0.0
        self.router = Router(loop, max_requests, COST, lambda: self.now, **kwargs)
        self.posts = {}
        for id in ids:
            self.join(id)

    def join(self, id):
        self.posts[id] = []
        role = {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}[id[0]]
        self.router.join(Peer(id, role, self.posts[id].append, COST, None, 0.0))

    async def say(self, event):
        self.router.emit(event)
        await asyncio.sleep(0)

    async def output(self, id, token, ticket=False, finish_reason=None):
        carried = Ticket(id, 1) if ticket else None
        at = self.now
        await self.say(Stepped((Output(id, Token(token), at, at, finish_reason, carried),)))

    def read(self, peer):
        """The one message that a peer was sent."""
        (message,) = self.posts[peer]
        self.posts[peer].clear()
        return message

    async def prefilled(self, token=11):
        """The request at p0 has its first token. Returns what the decode worker is told."""
        submit = self.read("p0")
        await self.output(submit.request.id, token, ticket=True)
        return self.read("d0")


@in_loop
async def test_ids_are_the_routers_own():
    one, two = Played("p0", "d0"), Played("p0", "d0")
    ids = []
    for played in (one, two):
        played.router.submit(replace(asked(), id="same"))
        ids.append(played.read("p0").request.id)
    assert len(set(ids)) == 2
    assert all(id.endswith("/same#1") for id in ids)


@in_loop
async def test_a_request_without_tokens_is_submitted_elsewhere_as_it_was():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    first = played.read("p0").request
    played.join("p1")
    await played.say(Died("p0", RuntimeError("gone")))
    again = played.read("p1").request
    assert again == replace(first, id=again.id, serial=again.serial)
    assert again.id != first.id
    await played.output(first.id, 99, ticket=True)
    assert not stream.tokens, "what was said of the lost one is passed over"
    assert not played.posts["d0"]
    assert not played.posts["p0"]


@in_loop
async def test_a_stream_goes_on_with_its_tokens_as_a_part_of_the_prompt():
    played = Played("p0", "d0")
    sampling = SamplingParams(temperature=1.0, seed=7)
    stream = played.router.submit(asked(sampling=sampling, stop=frozenset({5})))
    handed = await played.prefilled(11)
    assert played.posts["p0"] == []
    played.now = 2.0
    await played.say(Moved(handed.request.id, 1.0))
    assert played.read("p0") == Release(handed.request.id)
    await played.output(handed.request.id, 12)
    played.join("d1")
    played.now = 50.0
    await played.say(Died("d0", RuntimeError("gone")))
    rest = played.read("p0").request
    assert rest.prompt == [*PROMPT, 11, 12]
    assert (rest.max_tokens, rest.sampling, rest.stop) == (7, sampling, frozenset({5}))
    assert (rest.arrival, rest.slo) == (50.0, Slo(15.0, 30.0)), "due soon, yet not hopeless"
    await played.output(handed.request.id, 99)
    await played.output(rest.id, 13, ticket=True)
    again = played.read("d1")
    assert again.request == replace(handed.request, id=rest.id, serial=rest.serial)
    assert (again.tokens, again.first_token_at) == ((11, 12, 13), 0.0)
    await played.say(Moved(rest.id, 50.0))
    assert played.read("p0") == Release(rest.id)
    await played.output(rest.id, 14, finish_reason="length")
    assert [output.token.id async for output in stream] == [11, 12, 13, 14]
    assert (stream.begun_at, stream.first_token_at, stream.moved_at) == (0.0, 0.0, 1.0)
    assert played.router.num_streams == 0
    assert not any(played.posts.values())


@in_loop
async def test_parked_kv_whose_decode_worker_is_lost_is_dropped():
    played = Played("p0", "d0", "d1")
    played.router.submit(asked())
    submit = played.read("p0")
    await played.output(submit.request.id, 11, ticket=True)
    (had,) = [id for id in ("d0", "d1") if played.posts[id]]
    await played.say(Died(had, RuntimeError("gone")))
    cancel, again = played.posts["p0"]
    assert cancel == Cancel(submit.request.id)
    assert again.request.prompt == [*PROMPT, 11]


@in_loop
async def test_a_lost_transfer_is_cancelled_on_both_sides_and_begun_again():
    played = Played("p0", "d0")
    played.router.submit(asked())
    handed = await played.prefilled()
    await played.say(Lost(handed.request.id, LookupError("nothing there")))
    cancel, again = played.posts["p0"]
    assert cancel == played.read("d0") == Cancel(handed.request.id)
    assert isinstance(again, Submit)


@in_loop
async def test_a_prefill_worker_lost_after_the_fetch_is_no_loss():
    played = Played("p0", "d0", "p1")
    stream = played.router.submit(asked())
    (had,) = [id for id in ("p0", "p1") if played.posts[id]]
    id = played.read(had).request.id
    await played.output(id, 11, ticket=True)
    handed = played.read("d0")
    assert isinstance(handed, Handover)
    await played.say(Died(had, RuntimeError("gone")))
    await played.say(Moved(id, 1.0))
    await played.output(id, 12, finish_reason="stop")
    assert [output.token.id async for output in stream] == [11, 12]
    assert not any(played.posts.values())


@in_loop
async def test_a_peer_that_leaves_is_told_to_forget_its_requests():
    played = Played("b0", "b1")
    stream = played.router.submit(asked())
    (had,) = [id for id in ("b0", "b1") if played.posts[id]]
    other = {"b0": "b1", "b1": "b0"}[had]
    id = played.read(had).request.id
    await played.output(id, 11)
    played.router.leave(had)
    assert played.read(had) == Cancel(id)
    rest = played.read(other).request
    assert rest.prompt == [*PROMPT, 11]
    await played.output(rest.id, 12, finish_reason="length")
    assert [output.token.id async for output in stream] == [11, 12]
    played.router.leave(had)  # unknown by now


@in_loop
async def test_a_draining_peer_is_sent_nothing_new():
    played = Played("p0", "d0", "p1")
    await played.say(Draining("p0"))
    for _ in range(3):
        played.router.submit(asked())
    assert len(played.posts["p1"]) == 3
    id = played.posts["p1"][0].request.id
    await played.say(Draining("p1"))
    with pytest.raises(WorkerLost, match=r"prefills takes requests \(instance p1 is draining\)"):
        played.router.submit(asked())
    played.join("p2")
    await played.say(Returned(id))
    assert played.posts["p1"][-1] == Cancel(id)
    assert played.read("p2").request.prompt == PROMPT


@in_loop
async def test_kv_that_a_draining_peer_has_not_asked_for_goes_to_another_by_the_same_ticket():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    handed = await played.prefilled()
    for drained, other in (("d0", "d1"), ("d1", "d2")):
        played.join(other)
        await played.say(Draining(drained))
        await played.say(Returned(handed.request.id, handed.ticket))
        assert played.read(other) == handed
    assert not any(played.posts.values()), "it is not prefilled again"
    await played.say(Moved(handed.request.id, 1.0))
    assert played.read("p0") == Release(handed.request.id)
    await played.output(handed.request.id, 12, finish_reason="stop")
    assert [output.token.id async for output in stream] == [11, 12]
    assert not any(played.posts.values())


@in_loop
async def test_kv_given_back_is_computed_anew_where_who_had_it_is_lost_or_who_takes_it_fails():
    for lost in (True, False):
        played = Played("p0", "d0")
        stream = played.router.submit(asked())
        handed = await played.prefilled()
        played.join("d1")
        await played.say(Draining("d0"))
        if lost:
            played.join("p1")
            await played.say(Died("p0", RuntimeError("gone")))
        await played.say(Returned(handed.request.id, handed.ticket))
        if not lost:
            assert played.read("d1") == handed
            await played.say(Lost(handed.request.id, PermissionError("claimed already")))
            assert played.posts["p0"].pop(0) == Cancel(handed.request.id)
        assert played.read("p1" if lost else "p0").request.prompt == [*PROMPT, 11]
        assert stream.num_lost == (not lost)


@in_loop
async def test_kv_given_back_is_dropped_where_nobody_decodes():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    handed = await played.prefilled()
    await played.say(Draining("d0"))
    await played.say(Returned(handed.request.id, handed.ticket))
    assert played.read("p0") == Cancel(handed.request.id)
    with pytest.raises(WorkerLost, match="instance d0 is draining"):
        _ = [output async for output in stream]


@in_loop
async def test_without_another_of_its_role_a_stream_fails_at_once():
    for lost in ("p0", "d0"):
        played = Played("p0", "d0")
        stream = played.router.submit(asked())
        if lost == "d0":
            handed = await played.prefilled()
        await played.say(Died(lost, RuntimeError("on fire")))
        with pytest.raises(WorkerLost, match=f"instance {lost} failed: on fire"):
            _ = [output async for output in stream]
        assert played.router.num_streams == 0
        if lost == "d0":
            assert played.read("p0") == Cancel(handed.request.id)


@in_loop
async def test_no_decode_worker_is_left_when_the_prefill_ends():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    id = played.read("p0").request.id
    played.router.leave("d0")
    await played.output(id, 11, ticket=True)
    assert played.read("p0") == Cancel(id)
    with pytest.raises(WorkerLost, match="no instance that decodes"):
        _ = [output async for output in stream]


@in_loop
async def test_what_the_last_prefill_worker_still_had_goes_on():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    await played.say(Draining("p0"))
    handed = await played.prefilled()
    await played.say(Moved(handed.request.id, 0.0))
    await played.say(Died("p0", RuntimeError("gone")))
    await played.output(handed.request.id, 12, finish_reason="stop")
    assert [output.token.id async for output in stream] == [11, 12]


@in_loop
async def test_what_is_lost_again_and_again_fails_with_the_last_reason():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    for index in range(streams.MAX_RECOVERIES + 1):
        id = played.posts["p0"][-1].request.id
        await played.say(Lost(id, LookupError(f"reason {index}")))
    with pytest.raises(WorkerLost, match=f"reason {streams.MAX_RECOVERIES}"):
        _ = [output async for output in stream]
    assert played.router.num_streams == 0


@in_loop
async def test_drained_and_the_names_are_free_after_a_failure():
    played = Played("p0", "d0")
    played.router.submit(replace(asked(), id="same"))
    await played.say(Died("p0", RuntimeError("gone")))
    await played.router.drained()
    played.join("p1")
    played.router.submit(replace(asked(), id="same"))


class Fleet:
    """Workers on fake engines that come and go under one router."""

    def __init__(self, config=fakes.CONFIG, num_prefill=2, num_decode=2, engine=fakes.FakeEngine):
        self.config, self.engine = config, engine
        self.router = Router(asyncio.get_running_loop(), 10_000, COST)
        self.transport = LocalTransport()
        self.alive, self.gone = {}, []
        self.count = 0
        for role, number in ((Role.PREFILL, num_prefill), (Role.DECODE, num_decode)):
            for _ in range(number):
                self.add(role)

    def add(self, role):
        id, self.count = f"{role.value}-{self.count}", self.count + 1
        engine = self.engine(self.config.limits(role))
        worker = build_worker(self.config, role, id, engine, COST, self.transport, self.router.emit)
        self.router.connect([worker])
        worker.start()
        self.alive[id] = worker
        return worker

    def of(self, role):
        return [worker for worker in self.alive.values() if worker.instance.role is role]

    def kill(self, worker):
        """Its next step fails."""
        self.gone.append(self.alive.pop(worker.instance.id))
        worker.engine.fail = RuntimeError("killed")
        worker.engine.gate.set()

    def drain(self, worker):
        """It gives back all that it has."""
        self.gone.append(self.alive.pop(worker.instance.id))
        worker.post(HandBack(running=False))
        worker.post(HandBack(running=True))

    async def answer(self, prompt, max_tokens, cancel_after=None):
        """All tokens; or the first, after which it is cancelled."""
        stream, tokens = self.router.submit(asked(prompt, max_tokens)), []
        try:
            async for output in stream:
                tokens.append(output.token.id)
                if len(tokens) == cancel_after:
                    break
        finally:
            self.router.cancel(stream)
        return tokens

    async def close(self):
        """Looks at all books."""
        await asyncio.wait_for(self.router.drained(), 60)
        assert not self.router._names
        for worker in self.gone:
            await asyncio.to_thread(worker.stop)
        living = [w for w in (*self.alive.values(), *self.gone) if not w.engine.fail]
        await fakes.assert_nothing_held(living, self.transport)
        self.transport.close()


class Counted(fakes.FakeEngine):
    """Fails by itself before the step after its `last`; waits for its gate before that, once."""

    last = None

    def step(self, work):
        if self.num_steps == self.last:
            self.fail = RuntimeError("killed")
        return super().step(work)


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
    for prompt, stream, head in zip(prompts, asking, heads, strict=True):
        rest = [output.token.id async for output in stream]
        assert [head.token.id, *rest] == fakes.expected_tokens(prompt, 12)
        assert stream.num_lost == 0
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
    for prompt, stream, head in zip(prompts, asking, heads, strict=True):
        rest = [output.token.id async for output in stream]
        assert [head.token.id, *rest] == fakes.expected_tokens(prompt, 12)
        assert stream.num_lost == 0
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
    monkeypatch.setattr(streams, "MAX_RECOVERIES", 100)
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

    def step(self, work):
        self.num_steps += 1
        if self.num_steps == 4:
            raise RuntimeError("killed")
        return self.engine.step(work)


def build(directory, role):
    checkpoint, limits = open_checkpoint(directory), fakes.CONFIG.limits(role)
    mesh, rules = make_mesh(jax.devices()[:1]), Rules()
    params = checkpoint.load(mesh, rules, "float32")
    shapes = Shapes.for_role(role, limits, row_tokens=16)
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
