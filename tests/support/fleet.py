"""Real workers on fake engines that come and go under one router, and what is asked of them."""

import asyncio
import functools

import fakes

from kairos_jax.kv.transport import LocalTransport
from kairos_jax.routing.router import Router
from kairos_jax.worker.build import build_worker
from kairos_jax.worker.messages import HandBack
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo

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
