"""Real workers on fake engines that come and go under one router, and what is asked of them."""

import asyncio
import functools
import math

import fakes

from kairos_jax.engine.calls import Token
from kairos_jax.kv.transport import LocalTransport, Ticket
from kairos_jax.routing.peer import Peer
from kairos_jax.routing.router import Router
from kairos_jax.worker.build import build_worker
from kairos_jax.worker.messages import Died, HandBack, Output, Stepped
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies.routing import Summary

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
        idle = Summary(id, role, 0.0, [], [], 1.0, 0.0, math.inf)
        self.router.join(Peer(id, role, self.posts[id].append, COST, idle))

    async def say(self, event):
        self.router.emit(event)
        await asyncio.sleep(0)

    async def output(self, id, token, ticket=False, finish_reason=None):
        carried = Ticket(id, 1) if ticket else None
        at = self.now
        await self.say(Stepped((Output(id, Token(token), at, at, finish_reason, carried),)))

    async def sent(self, peer, kind):
        """The next message of a kind that a peer is sent; those before it are dropped."""
        async with asyncio.timeout(30):
            while True:
                while self.posts[peer]:
                    if isinstance(message := self.posts[peer].pop(0), kind):
                        return message
                await asyncio.sleep(0)

    def taken(self, peer, kind):
        """All messages of a kind that a peer was sent; the others are dropped."""
        messages = self.posts[peer][:]
        self.posts[peer].clear()
        return [each for each in messages if isinstance(each, kind)]

    def read(self, peer):
        """The one message that a peer was sent."""
        (message,) = self.posts[peer]
        self.posts[peer].clear()
        return message

    async def fail(self, peer, *aboard):
        """A step with these streams fails there."""
        await self.say(Died(peer, RuntimeError("boom"), tuple(each.request.id for each in aboard)))

    async def replace_prefill(self, said):
        """A step of the one prefill worker fails with all that it has, and another joins. said: it
        raised; else the process crashed.
        """
        (old,) = [peer for peer in self.router.peers if peer.role is Role.PREFILL]
        self.join(f"p{int(old.id[1:]) + 1}")
        if said:
            await self.fail(old.id, *[s for s in self.router.streams if s.peers == [old]])
        else:
            await self.say(Died(old.id, ConnectionError("recvmsg: reset by 10.2.0.7:50071")))

    async def prefilled(self, token=11):
        """The request at p0 has its first token. Returns what the decode worker is told."""
        submit = self.read("p0")
        await self.output(submit.request.id, token, ticket=True)
        return self.read("d0")
